"""CogAgent: the large picture, rows without one, released names, folders, prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cogvlm.config import CogAgentConfig, CogVLMConfig, recognise
from cogvlm.engine import GenerationSettings, complete
from cogvlm.errors import ConfigError, InputError, MessageError
from cogvlm.load import load, load_model, skeleton
from cogvlm.models import spread
from cogvlm.models.cogagent import CogAgentForCausalLM
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.eva_large import grid_rotary
from cogvlm.processor import Processor, assistant, get_template, system, user
from fakes import image, left_pad, row
from parity.check import main
from processor.standin import Bytes, toy_tokenizer

PARITY = Path(__file__).parents[1] / "parity" / "cogagent"
PROMPTS = Path(__file__).parents[1] / "processor" / "data" / "tokens.json"
RECORDED = json.loads(PROMPTS.read_text())
# Of the full-size checkpoint: number of tensors, sha256 of the sorted lines "name [shape]\n".
RELEASED = (1831, "55de1de370a66fd773707e68d53983b8cd8b5b9c9a89f9f214249248f702c0df")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))

TOY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "cross_hidden_size": 32,
    "cross_compute_hidden_size": 24,
    "cross_image_size": 70,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "template_version": "chat",
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "intermediate_size": 56,
        "image_size": 56,
        "num_positions": 17,
        "patch_size": 14,
    },
    "cross_vision_config": {"layers": 3, "head_width": 16, "embed_dim": 20},
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def toy(seed: int = 0) -> CogAgentForCausalLM:
    torch.manual_seed(seed)
    model = CogAgentForCausalLM(recognise(TOY, "here")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                fan = parameter.shape[-1] if parameter.ndim > 1 else 1
                parameter.normal_(std=0.1 if parameter.ndim < 2 else 1.2 * fan**-0.5)
    return model


def seen(model: CogAgentForCausalLM, *parts: int | Tensor) -> dict[str, Any]:
    """A row and the large copy of its image, which here is another image."""
    large = [image(100 + i, 70, 70) for i, p in enumerate(parts) if isinstance(p, Tensor)]
    return {**row(model, *parts), "cross_pixel_values": large or None}


def join(rows: list[dict[str, Any]]) -> dict[str, Any]:
    large = [one for r in rows for one in r["cross_pixel_values"] or []]
    return {**left_pad(rows), "cross_pixel_values": large or None}


@pytest.fixture(scope="module")
def model() -> CogAgentForCausalLM:
    return toy()


def test_cogagent_matches_the_released_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PARITY) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    for name in ("image.logits", "image.cross_blocks.2", "cross_only.hidden_states.3"):
        assert tensors[name]["abs"] < 1e-3
    for name in ("image.greedy", "cross_only.greedy", "image.vision_expert_mask"):
        assert tensors[name]["abs"] == 0.0


def test_names_and_shapes_are_those_of_the_released_checkpoint() -> None:
    state = skeleton(CogAgentConfig()).state_dict()
    lines = "".join(f"{name} {list(state[name].shape)}\n" for name in sorted(state))
    assert (len(state), hashlib.sha256(lines.encode()).hexdigest()) == RELEASED


@torch.no_grad()
def test_cached_decoding_equals_uncached(model: CogAgentForCausalLM) -> None:
    prompt = seen(model, 2, image(1), 5)
    out = model.generate(**prompt, **GREEDY, output_logits=True, return_dict_in_generate=True)
    types = torch.nn.functional.pad(prompt["token_type_ids"], (0, 8))
    extra = {k: prompt[k] for k in ("pixel_values", "cross_pixel_values")}
    whole = model(out.sequences, token_type_ids=types, **extra).logits[0, -9:-1]
    torch.testing.assert_close(torch.cat(out.logits), whole, rtol=0, atol=2e-4)
    assert torch.equal(model.generate(**prompt, **GREEDY, use_cache=False), out.sequences)


@torch.no_grad()
def test_rows_with_and_without_a_picture_in_one_batch(model: CogAgentForCausalLM) -> None:
    rows = [seen(model, 1, image(1), 3), seen(model, 9), seen(model, 2, image(2), 6)]
    rows[2]["cross_pixel_values"] = [image(7, 70, 70)]
    batch = join(rows)
    logits = model(**batch).logits
    answers = model.generate(**batch, **GREEDY)[:, -8:]
    for i, single in enumerate(rows):
        expected = model(**single).logits[0]
        torch.testing.assert_close(logits[i, -len(expected) :], expected, rtol=0, atol=3e-4)
        assert torch.equal(answers[i], model.generate(**single, **GREEDY)[0, -8:])


@torch.no_grad()
def test_text_alone_is_the_language_model(model: CogAgentForCausalLM) -> None:
    values = {k: v for k, v in model.config.to_dict().items() if not k.startswith("cross_")}
    plain = CogVLMForCausalLM(CogVLMConfig(**values)).eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all("cross" in name or name.endswith("pos_embed") for name in unexpected)
    text = row(model, 11)
    assert torch.equal(model(**text).logits, plain(**text).logits)
    assert torch.equal(model.generate(**text, **GREEDY), plain.generate(**text, **GREEDY))


@torch.no_grad()
def test_the_large_picture_is_read_once_a_prompt(model: CogAgentForCausalLM) -> None:
    calls = {"encoder": 0, "key_value": 0}

    def count(what: str) -> Any:
        return lambda *_: calls.update({what: calls[what] + 1})

    hooks = [model.model.cross_vision.register_forward_hook(count("encoder"))]
    hooks += [
        layer.cross_attn.key_value.register_forward_hook(count("key_value"))
        for layer in model.model.layers
    ]
    model.generate(**seen(model, 2, image(1), 5), **GREEDY)
    for hook in hooks:
        hook.remove()
    assert calls == {"encoder": 1, "key_value": 3}


@torch.no_grad()
def test_what_is_read_of_the_large_picture() -> None:
    model = toy(1)
    prompt = seen(model, 2, image(1), 5)
    logits = model(**prompt).logits
    other = model(**{**prompt, "cross_pixel_values": [image(8, 70, 70)]}).logits
    assert (logits[0, 0] - other[0, 0]).abs().max() > 1e-2  # every token sees it, bos too
    encoder = model.model.cross_vision.vit.model
    for unused in (encoder.blocks[-1], encoder.norm, encoder.head):
        for parameter in unused.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(model(**prompt).logits, logits)
    encoder.blocks[-2].mlp.w3.bias.add_(1.0)
    assert not torch.equal(model(**prompt).logits, logits)


@torch.no_grad()
def test_a_second_turn_still_sees_the_picture(model: CogAgentForCausalLM) -> None:
    prompt, more = seen(model, 2, image(1), 5), torch.tensor([[31, 32, 33]])
    cache = model(**prompt, use_cache=True).past_key_values
    length = int(model.model.position_ids(prompt["token_type_ids"], None, None).max()) + 1
    places = torch.arange(length, length + 3)[None]
    later = model(more, position_ids=places, past_key_values=cache).logits
    ids = torch.cat((prompt["input_ids"], more), dim=1)
    types = torch.nn.functional.pad(prompt["token_type_ids"], (0, 3))
    extra = {k: prompt[k] for k in ("pixel_values", "cross_pixel_values")}
    whole = model(ids, token_type_ids=types, **extra).logits
    torch.testing.assert_close(later, whole[:, -3:], rtol=0, atol=3e-4)
    with pytest.raises(InputError, match="cached, but CogAgent takes its picture with the first"):
        model(more, position_ids=places, past_key_values=cache, cross_pixel_values=[image(1)])


@torch.no_grad()
def test_what_it_cannot_take_is_said(model: CogAgentForCausalLM) -> None:
    good = seen(model, 2, image(1), 5)
    with pytest.raises(InputError, match=r"0 large pictures .* for 1 rows with an image"):
        model(**{**good, "cross_pixel_values": None})
    with pytest.raises(InputError, match=r"2 large pictures .* for 1 rows with an image"):
        model(**{**good, "cross_pixel_values": [image(1, 70, 70)] * 2})
    with pytest.raises(InputError, match="large picture of 84x70 pixels; this model takes 70x70"):
        model(**{**good, "cross_pixel_values": [image(1, 70, 84)]})
    with pytest.raises(InputError, match="one image a conversation"):
        model(**seen(model, 1, image(1), 2, image(2), 3))
    with pytest.raises(InputError, match="several sequences a prompt"):
        model.generate(**{**good, "pixel_values": None}, max_new_tokens=2, num_beams=2)


def test_the_loss_reaches_the_large_picture() -> None:
    model = toy()
    prompt = seen(model, 2, image(1), 5)
    labels = prompt["input_ids"].masked_fill(prompt["token_type_ids"] == 1, -100)
    encoder = model.model.cross_vision
    watched = [
        encoder.vit.model.patch_embed.proj.weight,
        encoder.pos_embed,
        model.model.layers[1].cross_attn.key_value.weight,
        model.model.vision.pos_embed,
    ]
    plain = torch.autograd.grad(model(**prompt, labels=labels).loss, watched)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    # The later name first: the earlier one warns where both exist.
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)()
    model.train()
    again = torch.autograd.grad(model(**prompt, labels=labels).loss, watched)
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_bfloat16_takes_pixels_as_the_processor_makes_them() -> None:
    model = toy().to(torch.bfloat16)
    assert torch.isfinite(model(**seen(model, 2, image(1), 5)).logits).all()


def test_configuration() -> None:
    config = CogAgentConfig()
    assert (config.vision.image_size, config.cross_vision.side, config.cross_vision.inner) == (
        224,
        80,
        2730,
    )
    read = recognise(TOY, "here")
    assert type(read) is CogAgentConfig
    assert (read.num_multi_query_heads, read.expert_bias, read.vision.adapter) == (
        4,
        False,
        "linear_glu",
    )
    again = recognise(json.loads(read.to_json_string()), "here")
    assert again.to_dict() == read.to_dict()


@pytest.mark.parametrize(
    ("change", "say"),
    [
        ({"cross_image_sise": 70}, "did you mean 'cross_image_size'"),
        ({"cross_vision_config": {"depth": 3}}, "cross_vision_config: unknown key 'depth'"),
        ({"cross_vision_config": {"width": 48}}, "cross_hidden_size is 32, but .*width is 48"),
        ({"cross_vision_config": {"layers": 1}}, "layers is 1; give 2 or more"),
        ({"cross_image_size": 71}, "image_size 71 is not a multiple of 14"),
        ({"cross_compute_hidden_size": 30}, "30 is not a multiple of num_attention_heads 4"),
        ({"language_model": "x"}, "language_model is for folders without language weights"),
    ],
)
def test_an_impossible_configuration_is_refused(change: dict[str, Any], say: str) -> None:
    cross = {"head_width": 16, **change.pop("cross_vision_config", {})}
    with pytest.raises(ConfigError, match=say):
        recognise({**TOY, "cross_vision_config": cross, **change}, "here")


# --- prompts and pictures --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "vqa", "chat", "chat_old"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_prompts_equal_the_recorded_ones(name: str, count: int) -> None:
    messages = [user(RECORDED["query"])]
    for question, answer in reversed(RECORDED["history"][:count]):
        messages = [user(question), assistant(answer), *messages]
    recorded = RECORDED["prompts"]["cogagent"][name][str(count)]
    if name == "vqa" and count:  # the released code drops the history here; we do not
        chat = RECORDED["prompts"]["cogagent"]["chat_old"][str(count)]
        recorded = chat.replace(" Answer:", " Short answer:")
    segments = get_template(f"cogagent-{name}").segments(messages)
    assert [getattr(s, "text", s) for s in segments[1:]] == [recorded]


def test_a_system_text_stands_behind_the_opening() -> None:
    segments = get_template("cogagent-vqa").segments([system("Be brief."), user("Who?")])
    assert segments[-1].text == "<EOI>Be brief.\nQuestion: Who? Short answer:"  # type: ignore[union-attr]


def folder(path: Path, **changes: Any) -> Path:
    """A folder in the released layout: no trace of what the released code took for granted."""
    path.mkdir()
    model = toy()
    model.save_pretrained(path)
    config = {**TOY, "architectures": ["CogAgentForCausalLM"], "torch_dtype": "bfloat16", **changes}
    (path / "config.json").write_text(json.dumps(config))
    toy_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("name", ["image_chat", "image_base"])
def test_layout_and_sizes_equal_the_recorded_ones(name: str, tmp_path: Path) -> None:
    recorded = RECORDED["layouts"]["cogagent"][name]
    place = folder(tmp_path / "model", template_version=recorded["args"]["template_version"])
    messages = [user(recorded["args"]["query"])]
    for question, answer in reversed(recorded["args"]["history"]):
        messages = [user(question), assistant(answer), *messages]
    messages[0] = user(PICTURE, *messages[0].parts)
    processor = Processor.from_folder(place, Bytes())
    encoded = processor.encode(messages)
    for what in ("input_ids", "token_type_ids"):
        spread = [value for value, count in recorded[what] for _ in range(count)]
        assert getattr(encoded, what).tolist() == spread
    assert encoded.cross_pixel_values is not None
    assert [list(x.shape) for x in encoded.pixel_values] == recorded["images_shapes"]
    assert [list(x.shape) for x in encoded.cross_pixel_values] == recorded["cross_images_shapes"]
    # Both sizes are resized from the picture itself, not one from the other.
    direct = np.asarray(PICTURE.resize((70, 70), Image.Resampling.BICUBIC), np.float32)[..., 0]
    red = (direct / 255 - 0.48145466) / 0.26862954
    np.testing.assert_allclose(encoded.cross_pixel_values[0][0], red, atol=1e-5)


def test_a_folder_is_loaded_and_answers(tmp_path: Path) -> None:
    loaded = load(folder(tmp_path / "model"), device="cpu")
    assert isinstance(loaded.model, CogAgentForCausalLM)
    assert loaded.processor.template.name == "cogagent-chat"
    state = toy().state_dict()
    for name, tensor in load_model(tmp_path / "model", device="cpu").state_dict().items():
        assert torch.equal(tensor, state[name])
    settings = GenerationSettings(max_new_tokens=6)
    answers = [
        complete(loaded, [user(picture, "What is it?")], settings).ids
        for picture in (PICTURE, Image.new("RGB", (50, 40)))
    ]
    assert answers[0] != answers[1]
    # A batch of both kinds of rows, and what the processor hands to the model.
    rows = [loaded.processor.encode(m) for m in ([user(PICTURE, "a")], [user("a b c")])]
    batch = loaded.processor.batch(rows)
    assert batch.cross_pixel_values is not None
    assert (len(batch.pixel_values), len(batch.cross_pixel_values)) == (1, 1)
    assert complete(loaded, [user("Hello")], settings).ids
    with pytest.raises(MessageError, match="2 images, this model takes at most 1"):
        loaded.processor.encode([user(PICTURE, PICTURE, "Compare")])


def test_rotary_tables_are_the_recorded_ones() -> None:
    stored = load_file(PARITY / "model.safetensors")
    config = load_model(PARITY, dtype="float32", device="cpu").config
    assert isinstance(config, CogAgentConfig)
    cross = config.cross_vision
    for name, table in zip(
        ("cos", "sin"), grid_rotary(cross.side, cross.head_width, cross.pt_hw_seq_len), strict=True
    ):
        recorded = stored[f"model.cross_vision.vit.model.rope.freqs_{name}"]
        torch.testing.assert_close(table, recorded, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu", "model.cross_vision": "disk", "model.vision.transformer": "disk"},
        {"": "disk"},
        {"": "cpu", "model.layers.1": "disk", "model.vision.boi": "disk", "lm_head": "disk"},
        {"": "cpu", "model.embed_tokens": "disk", "model.vision": "disk", "model.norm": "disk"},
        {"": "cpu", "model.vision.pos_embed": "disk", "model.vision.transformer.layers.1": "disk"},
    ],
    ids=["encoders", "all", "layer", "ends", "one tower layer"],
)
def test_parts_on_disk_give_the_same_answer(tmp_path: Path, device_map: dict[str, Any]) -> None:
    toy().save_pretrained(tmp_path, max_shard_size="100KB")
    whole = load_model(tmp_path, "float32", "cpu")
    model = load_model(tmp_path, "float32", device_map=device_map)
    meta = {name for name, p in model.named_parameters() if p.is_meta}
    assert meta
    for prompt in (seen(whole, 2, image(1), 3), seen(whole, 4)):  # type: ignore[arg-type]
        torch.testing.assert_close(
            model(**prompt).logits, whole(**prompt).logits, rtol=0, atol=1e-5
        )
        assert torch.equal(model.generate(**prompt, **GREEDY), whole.generate(**prompt, **GREEDY))
    assert {name for name, p in model.named_parameters() if p.is_meta} == meta


def test_the_large_encoder_is_never_cut_and_layers_are_whole() -> None:
    from accelerate import infer_auto_device_map

    model = skeleton(recognise(TOY, "here"))
    total = sum(p.nbytes for p in model.parameters())
    for share in (0.3, 0.6, 0.9):
        room = {0: int(share * total), 1: total, "cpu": total}
        made = infer_auto_device_map(model, room, no_split_module_classes=spread._uncut(model))
        place = spread.placing(model, spread._expand(model, made, ""))
        assert {place(name) for name in model.state_dict()} == {0, 1}
        assert (
            len({place(n) for n in model.state_dict() if n.startswith("model.cross_vision")}) == 1
        )
        for name in model.state_dict():
            if name.startswith("model.layers."):
                first = ".".join(name.split(".")[:3]) + ".input_layernorm.weight"
                assert place(name) == place(first)
    with pytest.raises(ConfigError, match=r"cuts model.cross_vision \(CrossVisionModel\)"):
        spread.plan(model, {"": "cpu", "model.cross_vision.vit": "disk"}, torch.float32)
