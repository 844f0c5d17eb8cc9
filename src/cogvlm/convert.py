"""A GGUF file of a Llama-type language model to float32 safetensors and a tokenizer.

The reading is transformers' own. What is written does not depend on its version: for SmolLM2 the
tokenizer is put together here from the vocabulary and merges alone, because its older versions
take the wrong end token from the file, and all of them lose that digits are cut off first.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from .errors import CheckpointError

# The rest of SmolLM2's tokenizer, as its authors published it: every digit is a piece of its own
# before the byte-level split, so "\n\n1" is the newlines' token and the digit's.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SMOLLM2: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES],
    },
    "post_processor": None,
    "decoder": {**_BYTES, "add_prefix_space": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    },
}
_SMOLLM2_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
}
_DROPPED = {"quantization_config", "architectures", "id2label", "label2id", "transformers_version"}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` (float32) and the tokenizer into ``folder``.

    Raises:
        CheckpointError: the file cannot be read, or is not of a kind that transformers knows.
    """
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .tensors import save_tensors

    note = f"converting {gguf.name}, once (about a minute)"
    with Console(file=sys.stderr).status(note), _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{gguf}: cannot be read as a GGUF model: {reason}") from error
        config = _plain_config(model.config.to_dict())
        tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            del tensors["lm_head.weight"]
        save_tensors(tensors, folder / "model.safetensors")
        _write_json(folder / "config.json", {"architectures": [type(model).__name__], **config})
        _write_tokenizer(tokenizer, folder, config["max_position_embeddings"])


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers without where it came from."""
    plain = {k: v for k, v in config.items() if k not in _DROPPED and not k.startswith("_")}
    # GGUF stores it in float32, where 1e-5 reads as 9.999999747378752e-06.
    plain["rms_norm_eps"] = float(f"{plain['rms_norm_eps']:.6g}")
    return plain


def _write_tokenizer(tokenizer: Any, folder: Path, length: int) -> None:
    if tokenizer.convert_tokens_to_ids("<|im_start|>") != 1 or len(tokenizer) != 49152:
        tokenizer.save_pretrained(folder)
        return
    read = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = {key: read["model"][key] for key in ("vocab", "merges")}
    written = {
        **_SMOLLM2,
        "added_tokens": read["added_tokens"],
        "model": {**_SMOLLM2["model"], **pieces},
    }
    _write_json(folder / "tokenizer.json", written)
    _write_json(folder / "tokenizer_config.json", {**_SMOLLM2_CONFIG, "model_max_length": length})
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """No notes and bars of transformers inside; its settings as before afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # One of its bars asks no setting, so standard error is away meanwhile; errors are raised.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
