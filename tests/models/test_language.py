"""With no image the model is the language model: against transformers' own Llama."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cogvlm.config import CogVLMConfig, preset
from cogvlm.errors import CheckpointError
from cogvlm.load import compose
from cogvlm.models.checkpoint import from_llama, is_vision, to_llama
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.language import inverse_frequencies, rotary_table

LLAMA3 = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5e5}
SMOL = {"num_attention_heads": 3, "num_key_value_heads": 1, "rope_theta": 1e5, "tied": True}
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 1e4, "head_dim": 24}


def llama(kind: dict[str, float]) -> tuple[LlamaForCausalLM, CogVLMConfig]:
    torch.manual_seed(3)
    options = dict(kind)
    tied, theta = bool(options.pop("tied", False)), options.pop("rope_theta")
    heads = int(options["num_attention_heads"])
    width = 16 * heads
    sizes = {"vocab_size": 90, "hidden_size": width, "intermediate_size": 40}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 128}
    config = LlamaConfig(
        **sizes,
        **options,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    options["num_multi_query_heads"] = options.pop("num_key_value_heads")
    ours = preset(
        "toy", **sizes, **options, rope_theta=theta, tie_word_embeddings=tied, eos_token_id=None
    )
    return LlamaForCausalLM(config).eval(), ours


def ours_with_broken_experts(
    reference: LlamaForCausalLM, config: CogVLMConfig
) -> CogVLMForCausalLM:
    """The language weights of ``reference``; every vision weight is NaN."""
    blank = CogVLMForCausalLM(config).state_dict()
    vision = {k: torch.full_like(v, torch.nan) for k, v in blank.items() if is_vision(k)}
    assert any("vision_mlp" in k for k in vision)
    language = from_llama(reference.state_dict())
    if config.tie_word_embeddings:
        language.pop("lm_head.weight")
    return compose(config, vision, language).eval()


@pytest.mark.parametrize("kind", [LLAMA3, SMOL, WIDE], ids=["llama3", "smollm2", "wide_heads"])
def test_text_equals_llama_and_no_expert_is_touched(kind: dict[str, float]) -> None:
    reference, config = llama(kind)
    model = ours_with_broken_experts(reference, config)
    ids = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = reference(ids).logits, model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = reference.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)


@pytest.mark.parametrize("kind", [LLAMA3, SMOL, WIDE], ids=["llama3", "smollm2", "wide_heads"])
def test_llama_tensors_come_back_to_the_bit(kind: dict[str, float]) -> None:
    reference, _ = llama(kind)
    theirs = reference.state_dict()
    back = to_llama(
        from_llama(theirs), int(kind["num_attention_heads"]), int(kind["num_key_value_heads"])
    )
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[k], theirs[k]) for k in theirs)


def test_a_llama_with_biases_is_refused_by_name() -> None:
    tensors = {"model.layers.0.self_attn.q_norm.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"q_norm\.weight"):
        from_llama(tensors)


def test_two_equal_coordinates_are_one_position() -> None:
    """RoPE-2D: R(n, n) is R(n), so a text token is where it was."""
    table = inverse_frequencies(16, 1e4)
    positions = torch.arange(9)[None]
    one = rotary_table(table, positions, torch.float32)
    two = rotary_table(table, torch.stack((positions, positions)), torch.float32)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_reference_rotary_rounds_positions_in_bfloat16_and_float32_does_not() -> None:
    ids = torch.arange(4, 304)[None] % 300
    outputs = {}
    for mode in ("reference", "float32"):
        torch.manual_seed(0)
        model = CogVLMForCausalLM(preset("toy", rotary=mode)).to(torch.bfloat16)
        outputs[mode] = model.model.rotary(torch.arange(300)[None], torch.bfloat16)[0]
        assert model(ids).logits.isfinite().all()
    assert torch.equal(outputs["reference"][0, 257], outputs["reference"][0, 256])
    assert not torch.equal(outputs["float32"][0, 257], outputs["float32"][0, 256])
