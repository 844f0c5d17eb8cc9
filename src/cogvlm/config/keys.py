"""Checks that every configuration makes of the keys and values it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedConfig

from ..errors import ConfigError, refuse_unknown

# Keys that transformers wrote into every config.json of the 4.x series; they say nothing about
# the architecture, so they are read over.
LEGACY_KEYS = frozenset(
    """
    _commit_hash _name_or_path add_cross_attention attn_implementation auto_map
    bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder label2id length_penalty max_length min_length
    model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_scores prefix pruned_heads
    quantization_config remove_invalid_values repetition_penalty return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16
    """.split()  # noqa: SIM905
)


def check_keys(config: PreTrainedConfig, extra: Iterable[str], where: str) -> None:
    """Refuse keys that are neither a field of ``config`` nor left over from transformers 4.

    Raises:
        ConfigError: with the key and the nearest known one.
    """
    known = set(type(config).__dataclass_fields__)
    given = [k for k in extra if k not in LEGACY_KEYS and not k.startswith("_")]
    refuse_unknown(given, known, where)


def check_choice(value: str, options: tuple[str, ...], name: str) -> None:
    """Refuse a value that is not among ``options``.

    Raises:
        ConfigError: with the options.
    """
    if value not in options:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(options)}")


def check_pair(value: Sequence[int], name: str) -> tuple[int, int]:
    """Two whole numbers of at least 1, as a tuple whatever the file made of them.

    Raises:
        ConfigError: something else.
    """
    numbers = list(value) if isinstance(value, Sequence) else []
    if len(numbers) != 2 or any(type(n) is not int or n < 1 for n in numbers):
        raise ConfigError(f"{name} is {value!r}; give two whole numbers of at least 1")
    return numbers[0], numbers[1]
