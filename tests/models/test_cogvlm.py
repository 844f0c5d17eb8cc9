"""The whole model: images in text, batches, cache, options, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogvlm.config import CogVLMConfig, preset
from cogvlm.errors import ConfigError, InputError
from cogvlm.load import load_model, skeleton
from cogvlm.models import cogvlm
from cogvlm.models.cogvlm import CogVLMForCausalLM
from fakes import image, left_pad, row, toy_model

PARITY = Path(__file__).parents[1] / "parity" / "cogvlm2"

NATIVE = {"grid": "native", "max_rows": 4, "max_cols": 6, "num_positions": 25}
OPTIONS: dict[str, dict[str, Any]] = {
    "released": {},
    "every_2nd": {"expert_every": 2},
    "mlp": {"visual_expert": "mlp"},
    "none": {"visual_expert": "none"},
    "low_rank": {"expert_rank": 3},
    "text_rank": {"expert_rank": 3, "text_rank": 2},
    "flat": {"image_positions": "flat"},
    "rope_tie": {"image_positions": "rope_tie"},
    "full": {"image_attention": "full"},
    "linear_glu": {"vision_config": {"adapter": "linear_glu"}},
    "qformer": {"vision_config": {"adapter": "qformer", "adapter_queries": 5}},
    "native": {"vision_config": NATIVE},
    "tall_tokens": {"vision_config": {"adapter_merge": [4, 1]}},
}


@pytest.fixture(params=OPTIONS, ids=list(OPTIONS))
def model(request: pytest.FixtureRequest) -> CogVLMForCausalLM:
    return toy_model(**OPTIONS[request.param])


@torch.no_grad()
def test_cached_decoding_equals_uncached(model: CogVLMForCausalLM) -> None:
    prompt = row(model, 3, image(1), 4)
    out = model.generate(
        **prompt,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences.shape[1] - prompt["input_ids"].shape[1]
    assert new == 8
    whole = {k: torch.nn.functional.pad(prompt[k], (0, new)) for k in ("token_type_ids",)}
    logits = model(
        out.sequences,
        token_type_ids=whole["token_type_ids"],
        pixel_values=prompt["pixel_values"],
    ).logits[0, -new - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), logits, rtol=0, atol=2e-4)


@torch.no_grad()
def test_left_padded_batch_equals_single_runs(model: CogVLMForCausalLM) -> None:
    rows = [row(model, 1, image(1), 3), row(model, 9), row(model, 2, image(2), 2, image(3), 6)]
    batch = model(**left_pad(rows)).logits
    for i, single in enumerate(rows):
        expected = model(**single).logits[0]
        torch.testing.assert_close(batch[i, -len(expected) :], expected, rtol=0, atol=3e-4)


@torch.no_grad()
def test_last_logits_alone_are_the_last_of_all(model: CogVLMForCausalLM) -> None:
    rows = [row(model, 3, image(1), 4), row(model, 2, image(2)), row(model, 6)]
    batch = left_pad(rows)
    alone = model(**batch, logits_to_keep=1, use_cache=True)
    assert alone.logits.shape == (3, 1, model.config.vocab_size)
    whole = model(**batch, use_cache=True)
    torch.testing.assert_close(alone.logits, whole.logits[:, -1:], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        alone.past_key_values.layers, whole.past_key_values.layers, strict=True
    ):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
    seen: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    model(**batch, logits_to_keep=1)
    assert seen == [3]  # one token a row went through the last MLP


@torch.no_grad()
def test_text_is_corrected_behind_a_picture_and_nowhere_else() -> None:
    model = toy_model(expert_rank=3, text_rank=2)
    plain = toy_model(expert_rank=3)
    named = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.copy_(named[name])
    text, seeing = row(model, 9), row(model, 4, image(1), 5)
    assert torch.equal(model(**text).logits, plain(**text).logits)
    ours, theirs = model(**seeing).logits[0], plain(**seeing).logits[0]
    end = 4 + int(seeing["token_type_ids"].sum()) - 1  # the picture's last token is text's own
    torch.testing.assert_close(ours[:end], theirs[:end], rtol=0, atol=1e-5)
    assert (ours[end:] - theirs[end:]).abs().amax(-1).min() > 1e-2
    both = left_pad([text, seeing])
    assert torch.equal(model(**both).logits[0], plain(**both).logits[0])


@torch.no_grad()
def test_batched_generation_equals_single() -> None:
    model = toy_model()
    rows = [row(model, 1, image(1), 3), row(model, 9), row(model, 2, image(2), image(3))]
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    batch = model.generate(**left_pad(rows), **settings)[:, -10:]
    for i, single in enumerate(rows):
        assert torch.equal(batch[i], model.generate(**single, **settings)[0, -10:])


@torch.no_grad()
def test_every_image_of_several_matters_and_in_its_place() -> None:
    model = toy_model()
    a, b = image(1), image(2)
    logits = [
        model(**row(model, 1, *pair, 4)).logits[0, -1] for pair in ((a, b), (b, a), (a, a), (b, b))
    ]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-2


@torch.no_grad()
def test_native_grids_of_several_sizes_in_one_prompt() -> None:
    model = toy_model(vision_config=NATIVE)
    wide, tall = image(1, 28, 84), image(2, 56, 28)
    both = model(**row(model, 1, wide, 2, tall, 3)).logits
    assert both.shape[1] == 1 + 5 + 2 + 4 + 3
    with pytest.raises(InputError, match="6x2 patches; this model takes at most 4x6"):
        model(**row(model, 1, image(0, 84, 28), 2))
    with pytest.raises(InputError, match="multiple of 28"):
        model.model.vision(image(0, 28, 30)[None])


@torch.no_grad()
def test_full_image_attention_lets_early_patches_see_late_ones() -> None:
    def first_patch(mode: str, changed: bool) -> torch.Tensor:
        model = toy_model(image_attention=mode)
        inputs = row(model, 1, image(1), 2)
        embeds = model.model.embed(
            inputs["input_ids"], inputs["token_type_ids"], inputs["pixel_values"]
        )
        embeds[0, 4] += float(changed)  # a later patch
        out = model.model(inputs_embeds=embeds, token_type_ids=inputs["token_type_ids"])
        return out.last_hidden_state[0, 2]

    assert torch.equal(first_patch("causal", False), first_patch("causal", True))
    assert (first_patch("full", False) - first_patch("full", True)).abs().max() > 1e-3


@torch.no_grad()
def test_low_rank_experts_begin_as_the_language_weights() -> None:
    torch.manual_seed(0)
    low = CogVLMForCausalLM(preset("toy", expert_rank=4)).eval()
    for name, parameter in low.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
    none = CogVLMForCausalLM(preset("toy", visual_expert="none")).eval()
    none.load_state_dict(low.state_dict(), strict=False)
    prompt = row(low, 2, image(0), 3)
    torch.testing.assert_close(low(**prompt).logits, none(**prompt).logits, rtol=0, atol=1e-5)


def test_logits_are_computed_only_where_labelled() -> None:
    model = toy_model()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel() // 64))
    inputs = row(model, 1, image(1), 8)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:] = inputs["input_ids"][0, -3:]
    loss = model(**inputs, labels=labels).loss
    logits = model(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits[0, -4:-1], labels[0, -3:])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    model(**inputs, logits_to_keep=1)
    assert seen == [3, inputs["input_ids"].shape[1], 1]


def test_a_loss_taken_in_parts_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model()
    inputs = row(model, 1, image(1), 8)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -5:] = inputs["input_ids"][0, -5:]
    found = []
    for most in (cogvlm.LOGITS, 2 * model.config.vocab_size, 1):  # one part, three, five
        monkeypatch.setattr(cogvlm, "LOGITS", most)
        seen: list[int] = []
        hook = model.lm_head.register_forward_hook(lambda _m, a, _o, s=seen: s.append(len(a[0])))
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        hook.remove()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads, seen))
    (loss, grads, seen), *parts = found
    assert seen == [5] and parts[0][2][:3] == [2, 2, 1] and parts[1][2][:5] == [1] * 5
    assert len(parts[0][2]) == 6  # the backward pass computed them again
    for again, others, _ in parts:
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(others[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_batch_without_labels_has_no_loss_but_a_gradient() -> None:
    model = toy_model()
    inputs = row(model, 1, image(1), 3)
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0.0


def test_images_and_placeholders_must_fit() -> None:
    model = toy_model()
    inputs = row(model, 1, image(1), 3)
    with pytest.raises(InputError, match="6 image tokens in input_ids, but no pixel_values"):
        model(**{**inputs, "pixel_values": None})
    with pytest.raises(InputError, match="2 images give 12"):
        model(**{**inputs, "pixel_values": [image(1), image(2)]})
    with pytest.raises(InputError, match="num_beams"):
        model.generate(**inputs, num_beams=2, max_new_tokens=2)


def test_names_and_shapes_are_those_of_the_19b_checkpoint() -> None:
    recorded = json.loads((PARITY / "real_checkpoint_tensors.json").read_text())
    model = skeleton(preset("cogvlm2"))
    ours = {name: list(t.shape) for name, t in model.state_dict().items()}
    assert ours == {name: entry["shape"] for name, entry in recorded.items()}


def test_released_layout_is_written_back_to_the_byte(tmp_path: Path) -> None:
    model = load_model(PARITY, device="cpu")
    model.save_pretrained(tmp_path)
    before = load_file(PARITY / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again = load_model(tmp_path, device="cpu")
    assert again.config.num_multi_query_heads == model.config.num_multi_query_heads


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'image_positions'"):
        CogVLMConfig(image_position="flat")
    with pytest.raises(ConfigError, match="did you mean 'num_heads'"):
        CogVLMConfig(vision_config={"num_head": 2})
    with pytest.raises(ConfigError, match="image_positions='round' is not one of"):
        preset("toy", image_positions="round")
    with pytest.raises(ConfigError, match="num_positions is 17, but a 6x6 grid"):
        preset("toy", vision_config={"image_size": 84})
