"""GLM-4V: recorded numbers, batches, cache, prompts, and a folder in the released layout."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvlm.config import Glm4vConfig, recognise
from cogvlm.engine import GenerationSettings, complete, stream
from cogvlm.errors import CheckpointError, ConfigError, InputError
from cogvlm.load import load, load_model, skeleton
from cogvlm.models.glm4v import Glm4vForCausalLM, block_positions, expand_image_tokens
from cogvlm.processor import Processor, SquarePixels, assistant, get_template, system, user
from cogvlm.processor.tiktoken import GLM4_SPECIALS
from fakes import image, left_pad
from parity.check import main
from processor.standin import Bytes

PARITY = Path(__file__).parents[1] / "parity" / "glm_4v"
RECORDED = json.loads((PARITY / "tokens.json").read_text())
PICTURE = PILImage.new("RGB", (50, 40), (200, 10, 10))
BLOCK = 6  # tokens of a toy image, markers included
# Ids as in the released model, but after 256 ranks.
IDS = {name: 256 + i for i, name in enumerate(GLM4_SPECIALS)}
TOY: dict[str, Any] = {
    "padded_vocab_size": 280,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_layers": 3,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "kv_channels": 16,
    "seq_length": 256,
    "boi_token_id": IDS["<|begin_of_image|>"],
    "eoi_token_id": IDS["<|end_of_image|>"],
    "pad_token_id": IDS["<|endoftext|>"],
    "eos_token_id": [IDS["<|endoftext|>"], IDS["<|user|>"], IDS["<|observation|>"]],
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "intermediate_size": 56,
        "image_size": 56,
        "num_positions": 17,
    },
}


def toy_model(**changes: Any) -> Glm4vForCausalLM:
    """A random float32 model whose logits are not nearly equal."""
    torch.manual_seed(0)
    model = Glm4vForCausalLM(Glm4vConfig(**{**TOY, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                fan = parameter.shape[-1] if parameter.ndim > 1 else 1
                parameter.normal_(std=0.1 if parameter.ndim < 2 else 1.2 * fan**-0.5)
    return model


def row(*parts: int | Tensor) -> dict[str, Any]:
    """A prompt of one row: text of so many tokens, or images, in order."""
    ids: list[int] = []
    types: list[int] = []
    images = [part for part in parts if isinstance(part, Tensor)]
    for part in parts:
        count = BLOCK if isinstance(part, Tensor) else part
        kind = int(isinstance(part, Tensor))
        ids += [256 if kind else (17 * len(ids) + 29 * i) % 250 for i in range(count)]
        types += [kind] * count
    return {
        "input_ids": torch.tensor([ids]),
        "token_type_ids": torch.tensor([types]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": images or None,
    }


ROWS = [row(1, image(1), 3), row(9), row(2, image(2), image(3), 6)]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def test_recorded_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PARITY) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert len(tensors) == 43
    for name in ("image.logits", "batch_image.hidden_states.3", "image_late.final_hidden"):
        assert tensors[name]["abs"] < 5e-4
    for name in ("batch_image.blocked", "batch_image.greedy", "image_late.expanded_position_ids"):
        assert tensors[name]["abs"] == 0.0


@pytest.mark.parametrize(
    ("tensor", "without_image"),
    [
        ("transformer.vision.eoi", True),
        ("transformer.encoder.layers.1.self_attention.query_key_value.bias", False),
    ],
)
def test_a_changed_weight_is_noticed(
    tensor: str, without_image: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(PARITY, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights[tensor] = weights[tensor] + 0.3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert main(tmp_path) == 1
    rows = json.loads(capsys.readouterr().out)["tensors"]
    assert not rows["image.logits"]["ok"]
    assert rows["text.logits"]["ok"] == without_image


def test_names_and_shapes_are_those_of_the_released_checkpoint() -> None:
    # Of the reference class built under the full-size configuration: 1054 tensors.
    state = skeleton(Glm4vConfig()).state_dict()
    lines = sorted(f"{name} {'x'.join(map(str, t.shape))}" for name, t in state.items())
    assert len(lines) == 1054
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "ea430d3799644c090874da9806397731fbd66095b30f5959281b8cdfcb58f6a1"


@torch.no_grad()
def test_cached_decoding_equals_uncached() -> None:
    model, prompt = toy_model(), row(3, image(1), 4)
    out = model.generate(**prompt, **GREEDY, output_logits=True, return_dict_in_generate=True)
    new = out.sequences.shape[1] - prompt["input_ids"].shape[1]
    assert new == 8
    types = torch.nn.functional.pad(prompt["token_type_ids"], (0, new))
    whole = model(out.sequences, token_type_ids=types, pixel_values=prompt["pixel_values"]).logits
    torch.testing.assert_close(torch.cat(out.logits), whole[0, -new - 1 : -1], rtol=0, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_left_padded_batch_equals_single_runs(kernel: str) -> None:
    model = toy_model()
    model.set_attn_implementation(kernel)
    out = model(**left_pad(ROWS), output_hidden_states=True)
    assert torch.isfinite(out.logits).all()
    assert all(torch.isfinite(states).all() for states in out.hidden_states)
    for i, single in enumerate(ROWS):
        expected = model(**single).logits[0]
        torch.testing.assert_close(out.logits[i, -len(expected) :], expected, rtol=0, atol=3e-4)


@torch.no_grad()
def test_kernels_agree_on_rows_of_padding_too() -> None:
    model, batch = toy_model(), left_pad(ROWS)
    sdpa = model(**batch).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**batch).logits, sdpa, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS, [row(9), row(4)]], ids=["mixed", "text"])
def test_batched_generation_equals_single(rows: list[dict[str, Any]]) -> None:
    # The released code fails on padded batches without an image.
    model = toy_model()
    batch = model.generate(**left_pad(rows), **GREEDY)[:, -8:]
    for i, single in enumerate(rows):
        assert torch.equal(batch[i], model.generate(**single, **GREEDY)[0, -8:])


@torch.no_grad()
def test_the_last_logits_alone_are_the_last_of_all() -> None:
    model, batch = toy_model(), left_pad(ROWS)
    alone = model(**batch, logits_to_keep=1).logits
    assert alone.shape == (3, 1, 280)
    torch.testing.assert_close(alone, model(**batch).logits[:, -1:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_image_of_several_matters_and_in_its_place() -> None:
    model, a, b = toy_model(), image(1), image(2)
    pairs = ((a, b), (b, a), (a, a), (b, b))
    logits = [model(**row(1, *pair, 4)).logits[0, -1] for pair in pairs]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-2


def test_logits_are_computed_only_where_labelled() -> None:
    model = toy_model()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel() // 48))
    inputs = row(1, image(1), 8)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:] = inputs["input_ids"][0, -3:]
    loss = model(**inputs, labels=labels).loss
    logits = model(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits[0, -4:-1], labels[0, -3:])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert seen == [3, inputs["input_ids"].shape[1]]
    loss.backward()
    gradient = model.transformer.vision.conv.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_rotary_tables_are_made_in_float32_whatever_the_model() -> None:
    far = torch.tensor([[0, 4097]])
    exact = torch.stack(toy_model(rope_ratio=4).model.rotary(far, torch.float32))
    model = toy_model(rope_ratio=4).to(torch.bfloat16)  # type: ignore[arg-type]
    ours = torch.stack(model.model.rotary(far, torch.bfloat16))
    assert torch.equal(ours, exact.bfloat16())
    step = 4097 * (40000.0**-0.25)
    expected = torch.tensor([step]).cos()
    torch.testing.assert_close(exact[0, 0, 1, 1:2], expected, rtol=0, atol=1e-3)


def test_positions_of_images_back_to_back_and_of_padding() -> None:
    types = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]])
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
    assert block_positions(types, mask, 4).tolist() == [
        [0, 1, 2, 2, 3, 4, 5, 5, 6, 7],
        [0, 0, 0, 0, 1, 2, 2, 3, 4, 5],
    ]
    assert block_positions(types[:1], None, 8).tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 3, 4]]
    with pytest.raises(InputError, match="8 image tokens, an image of this model takes 5"):
        block_positions(types, mask, 5)


def test_released_prompts_are_expanded() -> None:
    ids = torch.tensor([[9, 9, 7, 5, 6, 8, 4], [1, 7, 5, 6, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    new, types, real = expand_image_tokens(ids, mask, boi=7, tokens=3)
    assert new.tolist() == [[9, 9, 7, 5, 5, 5, 6, 8, 4], [1, 7, 5, 5, 5, 6, 2, 3, 4]]
    assert types.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0]]
    assert real.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]
    with pytest.raises(InputError, match="have 0 to 1 images"):
        expand_image_tokens(torch.tensor([[7, 5, 6], [1, 2, 3]]), torch.ones(2, 3), 7, 3)
    with pytest.raises(InputError, match="two more tokens do not follow"):
        expand_image_tokens(torch.tensor([[1, 7, 5]]), torch.ones(1, 3), 7, 3)


def test_images_and_placeholders_must_fit() -> None:
    model, inputs = toy_model(), row(1, image(1), 3)
    with pytest.raises(InputError, match="6 image tokens in input_ids, but no pixel_values"):
        model(**{**inputs, "pixel_values": None})
    with pytest.raises(InputError, match="2 images give 12"):
        model(**{**inputs, "pixel_values": [image(1), image(2)]})


def test_released_layout_is_written_back_to_the_byte(tmp_path: Path) -> None:
    model = load_model(PARITY, device="cpu")
    assert isinstance(model, Glm4vForCausalLM)
    model.save_pretrained(tmp_path)
    before = load_file(PARITY / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again = load_model(tmp_path, device="cpu").config
    for field in ("kv_channels", "layernorm_epsilon", "rope_ratio", "eos_token_id"):
        assert getattr(again, field) == getattr(model.config, field)
    assert again.vision.scaling_factor == 8


def test_configurations() -> None:
    values = json.loads((PARITY / "config.json").read_text())
    config = recognise(values, "config.json")
    assert isinstance(config, Glm4vConfig)
    assert (config.num_layers, config.kv_channels, config.image_tokens) == (3, 16, 4)
    assert config.image_tokens + 2 == BLOCK
    assert recognise({**values, "num_hidden_layers": 3}, "config.json").num_layers == 3
    full = Glm4vConfig()
    assert (full.image_tokens, full.eos_token_id) == (1600, [151329, 151336, 151338])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_hidden_layers": 4}, "num_hidden_layers differs from num_layers, which is 3"),
        ({"kv_channel": 16}, "did you mean 'kv_channels'"),
        ({"kv_channels": 18}, "18 is not a multiple of 4"),
        ({"multi_query_group_num": 3}, "4 is not a multiple of multi_query_group_num 3"),
        ({"rmsnorm": False}, "rmsnorm is False, a variant that GLM-4V does not use"),
        ({"pre_seq_len": 8}, "pre_seq_len is 8"),
        ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1"),
    ]
    vision: list[tuple[dict[str, Any], str]] = [
        ({"scaling": 8}, "did you mean 'scaling_factor'"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"adapter": "linear_glu"}, "adapter='linear_glu' is not one of conv_glu"),
        ({"image_size": 42, "num_positions": 10}, "42 is not a multiple of 28"),
    ]
    wrong += [({"vision_config": {**values["vision_config"], **c}}, say) for c, say in vision]
    for change, say in wrong:
        with pytest.raises(ConfigError, match=say):
            recognise({**values, **change}, "config.json")
    text_only = {k: v for k, v in values.items() if k != "vision_config"}
    with pytest.raises(CheckpointError, match="no vision_config"):
        recognise(text_only, "config.json")


class Glm4Bytes(Bytes):
    """The stand-in tokenizer of the recorded conversations."""

    bos_id, eos_id, pad_id = None, 151329, 151329

    def token_id(self, name: str) -> int | None:
        found: int | None = RECORDED["special_tokens"].get(name)
        return found


def test_prompts_equal_the_recorded_conversations() -> None:
    processor = Processor(Glm4Bytes(), get_template("glm4"), SquarePixels(56), 151329)
    build = {"user": user, "assistant": assistant, "system": system}
    compared = 0
    for name, recorded in RECORDED["conversations"].items():
        if name == "assistant_metadata":  # calls of tools; messages here have no such part
            continue
        messages = [
            build[m["role"]](
                *([PICTURE] if "image" in m else []), *filter(None, [m.get("content")])
            )
            for m in recorded["messages"]
        ]
        encoded = processor.encode(messages)
        ids = torch.tensor([recorded["input_ids"]])
        expanded, types, _ = expand_image_tokens(ids, torch.ones_like(ids), 151339, 4)
        assert encoded.token_type_ids.tolist() == types[0].tolist(), name
        expected = torch.where(types == 1, 151329, expanded)  # the markers' embeddings are unused
        assert encoded.input_ids.tolist() == expected[0].tolist(), name
        compared += 1
    assert compared == 6


def test_training_learns_every_answer_and_its_end() -> None:
    processor = Processor(Glm4Bytes(), get_template("glm4"), SquarePixels(56), 151329)
    messages = [user(PICTURE, "x"), assistant("one"), user("y"), assistant("two")]
    encoded = processor.encode(messages, train=True)
    assert encoded.labels is not None
    learnt = [i for i in encoded.labels.tolist() if i != -100]
    one, two = (Bytes().encode(f"\n{word}") for word in ("one", "two"))
    assert learnt == [*one, 151336, *two, 151336]
    prompt = processor.encode(messages[:-1]).input_ids.tolist()
    assert encoded.input_ids.tolist()[: len(prompt)] == prompt


def released_folder(folder: Path, model: Glm4vForCausalLM) -> Path:
    """A folder as released: weights, config.json, tokenizer.model, tokenizer_config.json."""
    model.save_pretrained(folder)
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    added = {str(i): {"content": name, "special": True} for name, i in IDS.items()}
    names = {"added_tokens_decoder": added, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def test_a_folder_in_the_released_layout_answers(tmp_path: Path) -> None:
    model = toy_model()
    loaded = load(released_folder(tmp_path, model), device="cpu")
    assert isinstance(loaded.model, Glm4vForCausalLM)
    settings = GenerationSettings(max_new_tokens=6, repetition_stop=False)
    answer = complete(loaded, [user(PICTURE, "Hi?")], settings)
    opening = [IDS[name] for name in ("[gMASK]", "<sop>", "<|user|>")]
    words = [*b"Hi?", IDS["<|assistant|>"]]
    ids = torch.tensor([[*opening, ord("\n"), *[IDS["<|endoftext|>"]] * BLOCK, *words]])
    types = torch.tensor([[0] * 4 + [1] * BLOCK + [0] * 4])
    pixels = torch.from_numpy(SquarePixels(56)(PICTURE))
    with torch.no_grad():
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=types,
            pixel_values=[pixels],
            max_new_tokens=6,
            do_sample=False,
        )[0, ids.shape[1] :].tolist()
    ends = set(TOY["eos_token_id"])
    assert list(answer.ids) == [i for i in expected if i not in ends]
    assert len(answer.ids) > 0
    pieces = stream(loaded, [user(PICTURE, "Hi?")], settings)
    assert "".join(pieces) == answer.text
    # A prompt beyond the context is refused; the patches of an image have one position.
    with pytest.raises(InputError, match="the model has 256 for prompt and answer"):
        complete(loaded, [user(PICTURE, "x" * 256)], settings)
