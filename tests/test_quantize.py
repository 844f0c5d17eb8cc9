"""Weights in eight and four bits: numbers, models, folders and refusals, at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from cogvlm import linear, quantize
from cogvlm.cli import app
from cogvlm.config import CogAgentConfig, Glm4vConfig, preset
from cogvlm.errors import CheckpointError, InputError, ResourceError
from cogvlm.load import load_model, quantise_folder, skeleton
from cogvlm.models.checkpoint import is_vision
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.quantize import KEY, pieces, plan
from fakes import image, row, toy_model

# Rows of 128 and 64 weights in the decoder: groups of 128 and of 32; 48 and 80 in the tower.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "initializer_range": 0.02,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy in the released layout, bfloat16, in two files with an index."""
    path = tmp_path_factory.mktemp("toys") / "plain"
    path.mkdir()
    model = toy_model(**SIZES)
    (path / "config.json").write_text(json.dumps(model.config.to_dict()))
    tensors = {n: t.bfloat16().clone() for n, t in model.state_dict().items()}
    names, where = sorted(tensors), {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({n: tensors[n] for n in chosen}, path / file)
        where |= dict.fromkeys(chosen, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (path / "tokenizer.json").write_text("{}")
    (path / "LICENSE").write_text("terms")
    (path / "modeling.py").write_text("never copied")
    return path


def logits(model: CogVLMForCausalLM) -> Tensor:
    given = row(model, 5, image(), 7)
    with torch.no_grad():
        out: Tensor = model(**given).logits
    return out


def error(model: CogVLMForCausalLM, exact: CogVLMForCausalLM) -> float:
    """Length of the difference over that of the logits."""
    wanted = logits(exact)
    return float((logits(model) - wanted).norm() / wanted.norm())


# --- numbers ---


def restored(parts: dict[str, Tensor]) -> Tensor:
    """What the layout says the codes mean, one weight after another."""
    if "int8" in parts:
        return parts["int8"].float() * parts["scale"]
    packed = parts["int4"]
    codes = torch.empty(len(packed), 2 * packed.shape[1])
    codes[:, 0::2], codes[:, 1::2] = (packed % 16).float(), (packed // 16).float()
    group = codes.shape[1] // parts["scale"].shape[1]
    scale, zero = (parts[n].float().repeat_interleave(group, 1) for n in ("scale", "zero"))
    return (codes - 8) * scale + zero


def test_int8_is_within_half_a_step_of_its_row() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    weight[2] *= 100
    weight[3] = 0
    parts = pieces(weight, 0)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == {
        "int8": (torch.int8, (6, 40)),
        "scale": (torch.float32, (6, 1)),
    }
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored(parts) - weight).abs() <= 0.501 * step + 1e-9).all()


@pytest.mark.parametrize("group", [32, 128])
def test_int4_is_within_half_a_step_of_its_group(group: int) -> None:
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    weight[1] += 3  # a group need not hold zero
    weight[2] = 0
    parts = pieces(weight, group)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == {
        "int4": (torch.uint8, (5, 128)),
        "scale": (torch.bfloat16, (5, 256 // group)),
        "zero": (torch.bfloat16, (5, 256 // group)),
    }
    cut = weight.unflatten(1, (-1, group))
    step = (cut.amax(-1) - cut.amin(-1)) / 15
    # Rounding scale and zero to bfloat16 moves the ends of a group by a little more.
    room = 0.6 * step + 2**-8 * cut.abs().amax(-1)
    difference = (restored(parts) - weight).abs().unflatten(1, (-1, group))
    assert (difference <= room[..., None] + 1e-7).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("columns", "group"), [(256, 128), (96, 32), (40, 0)])
def test_a_layer_computes_with_the_weights_of_its_codes(
    columns: int, group: int, bias: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 32, bias=bias))
    assert plan(model, "int4") == {"0.weight": group}
    weight = restored(pieces(model[0].weight.detach(), group))
    exact = nn.functional.linear(x := torch.randn(3, 5, columns), weight, model[0].bias)
    quantize.quantise(model, "int4")
    with torch.no_grad():
        found = model(x)
    assert found.dtype == torch.float32
    # The int4 kernel rounds activations and result to bfloat16.
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-2 if group else 1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_few_rows_without_the_module_are_the_same(
    precision: str, columns: int, bias: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 32, bias=bias)).requires_grad_(False)
    quantize.quantise(model, precision)
    bare: Any = model[0].bare()
    assert (bare is model[0]) == (columns % 32 != 0)  # no kernel of torch for it
    for rows in (1, 3, linear.FEW - 1):
        x = torch.randn(rows, columns)
        torch.testing.assert_close(bare(x), model(x), rtol=0, atol=0)


# --- what is quantised ---


def full_size() -> dict[str, nn.Module]:
    return {
        "cogvlm2": skeleton(_shallow(preset("cogvlm2"))),
        "cogagent": skeleton(_shallow(CogAgentConfig())),
        "glm-4v": skeleton(_shallow(Glm4vConfig())),
    }


def _shallow(config: Any) -> Any:
    config.num_hidden_layers = 1
    config.vision.num_hidden_layers = 1
    return config


@pytest.mark.parametrize("family", ["cogvlm2", "cogagent", "glm-4v"])
def test_full_size_matrices_are_chosen_by_their_side(family: str) -> None:
    model = full_size()[family]
    eight, four, tiny = (plan(model, p) for p in ("int8", "int4", "int4-all"))
    assert eight.keys() == four.keys() == tiny.keys() and set(eight.values()) == {0}
    assert all(tiny[n] == size for n, size in four.items() if size)
    tower = {n for n in four if ".vision." in n or "cross_vision." in n}
    assert {four[n] for n in tower} == {0}
    assert {four[n] for n in four.keys() - tower} == {128}
    assert any(".linear_proj." in n for n in tower)
    assert {tiny[n] for n in tower if ".linear_proj." in n} == {128}
    left = [n for n, p in model.named_parameters() if p.ndim == 2 and n not in four]
    kept = ("embed", "lm_head", "output_layer", "pos_embed")
    assert left and all(any(k in n for k in kept) for n in left), left


def test_low_rank_experts_keep_their_factors() -> None:
    model = toy_model(**SIZES, expert_rank=32)
    found = plan(model, "int4")
    assert not any("lora" in name for name in found)
    assert "model.layers.0.mlp.language_mlp.up_proj.weight" in found
    exact = toy_model(**SIZES, expert_rank=32)
    quantize.quantise(model, "int8")
    # Inputs of few tokens are rounded to bfloat16 too.
    assert 0 < error(model, exact) < 0.08


# --- models ---


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.05), ("int4", 0.5), ("int4-all", 0.6)])
def test_a_loaded_model_is_near_the_exact_one(folder: Path, precision: str, limit: float) -> None:
    exact = load_model(folder, "float32", "cpu")
    model = load_model(folder, precision, "cpu")
    found = error(model, exact)
    assert limit / 100 < found < limit
    # Who quantises wants memory: what stays is bfloat16 on the CPU too.
    assert model.lm_head.weight.dtype == torch.bfloat16
    embedding = exact.model.embed_tokens.weight.bfloat16()
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    in_place = load_model(folder, "bfloat16", "cpu")
    quantize.quantise(in_place, precision)
    assert torch.equal(logits(in_place), logits(model))


@pytest.mark.parametrize("precision", ["int8", "int4", "int4-all"])
def test_written_and_read_back_it_is_the_same_model(
    folder: Path, tmp_path: Path, precision: str
) -> None:
    out = tmp_path / "small"
    told = CliRunner().invoke(app, ["quantize", str(folder), str(out), "--precision", precision])
    assert (told.exit_code, told.stdout) == (0, f"{out}\n"), told.output
    assert sorted(p.name for p in out.iterdir()) == [
        "LICENSE",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((out / "config.json").read_text())[KEY]["precision"] == precision
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert (out / "model.safetensors").stat().st_size < 0.8 * size
    fresh = load_model(folder, precision, "cpu")
    for asked in (None, precision):
        again = load_model(out, asked, "cpu")
        assert torch.equal(logits(again), logits(fresh))
    given = row(again, 5, image(), 7)
    words = [model.generate(**given, max_new_tokens=5, do_sample=False) for model in (again, fresh)]
    assert words[0].shape[1] == given["input_ids"].shape[1] + 5
    assert torch.equal(words[0], words[1])


def test_a_model_of_two_parts_is_quantised_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy_model(**SIZES)
    config = {**whole.config.to_dict(), "language_model": "elsewhere"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {n: t.clone() for n, t in whole.state_dict().items() if not n.endswith("inv_freq")}
    save_file({n: t for n, t in state.items() if is_vision(n)}, tmp_path / "model.safetensors")
    words = {n: t for n, t in state.items() if not is_vision(n)}
    monkeypatch.setattr("cogvlm.load.language_tensors", lambda name: words)
    model = load_model(tmp_path, "int4", "cpu")
    quantize.quantise(whole, "int4")
    assert torch.equal(logits(model), logits(whole))


def test_several_files_are_written_and_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_FILE_SIZE", 100_000)
    out = quantise_folder(folder, tmp_path / "small", "int4")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and all(p.stat().st_size < 200_000 for p in files)
    assert torch.equal(
        logits(load_model(out, device="cpu")), logits(load_model(folder, "int4", "cpu"))
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.1), ("int4", 0.5)])
def test_on_a_card_it_is_near_the_exact_one(folder: Path, precision: str, limit: float) -> None:
    exact = load_model(folder, "float32", "cpu")
    model = load_model(folder, precision, "cuda")
    given = {
        k: [p.cuda() for p in v] if isinstance(v, list) else v.cuda()
        for k, v in row(exact, 5, image(), 7).items()
    }
    with torch.no_grad():
        found = model(**given).logits.cpu()
    wanted = logits(exact)
    assert float((found - wanted).norm() / wanted.norm()) < limit


# --- refusals ---


def test_without_torchao_one_line_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ResourceError, match=r"pip install 'cogvlm\[quant\]'") as caught:
        load_model(folder, "int4", "cpu")
    assert "\n" not in str(caught.value)
    load_model(folder, "bfloat16", "cpu")


def test_what_does_not_go_together_is_refused(folder: Path, tmp_path: Path) -> None:
    out = quantise_folder(folder, tmp_path / "small", "int8")
    with pytest.raises(InputError, match=r"is stored in int8, it cannot be loaded in int4"):
        load_model(out, "int4", "cpu")
    with pytest.raises(InputError, match="is stored in int8 already"):
        quantise_folder(out, tmp_path / "again", "int4")
    with pytest.raises(InputError, match="small exists, and nothing is overwritten"):
        quantise_folder(folder, out, "int4")
    with pytest.raises(InputError, match="none is no folder; make it first"):
        quantise_folder(folder, tmp_path / "none" / "small", "int4")
    with pytest.raises(InputError, match="precision 'bfloat16' cannot be stored quantised"):
        quantise_folder(folder, tmp_path / "again", "bfloat16")
    with pytest.raises(InputError, match=r"nano .* load it in int4 instead"):
        quantise_folder("nano", tmp_path / "again", "int4")
    with pytest.raises(InputError, match="precision int4 and a device_map"):
        load_model(folder, "int4", device_map={"": "cpu"})
    with pytest.raises(ResourceError, match=r"'int3' is not one of float32, .*int8, int4"):
        load_model(folder, "int3", "cpu")
    with pytest.raises(ResourceError, match="int4 runs on cpu and cuda, not on mps"):
        quantize.refuse("int4", torch.device("mps"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_a_failed_run_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize, "save_tensors", full)
    with pytest.raises(ResourceError, match=r"small cannot be written .*No space left"):
        quantise_folder(folder, tmp_path / "small", "int4")
    assert list(tmp_path.iterdir()) == []


def _change(out: Path, change: Any) -> None:
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")


LAYER = "model.layers.0.self_attn.language_expert_dense.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{LAYER}_zero"), f"1 missing tensors: {LAYER}_zero"),
        (lambda t: t.update({f"{LAYER}_zero": t[f"{LAYER}_zero"][:, :0]}), "in the file, "),
        (lambda t: t.update(odd_scale=torch.ones(1)), "1 unexpected tensors: odd_scale"),
        (lambda t: t.pop("lm_head.weight"), "1 missing tensors: lm_head.weight"),
    ],
)
def test_a_damaged_folder_is_told_by_name(
    folder: Path, tmp_path: Path, change: Any, says: str
) -> None:
    out = quantise_folder(folder, tmp_path / "small", "int4")
    _change(out, change)
    with pytest.raises(CheckpointError, match=says):
        load_model(out, device="cpu")


def test_a_note_of_another_version_is_refused(folder: Path, tmp_path: Path) -> None:
    out = quantise_folder(folder, tmp_path / "small", "int4")
    values = json.loads((out / "config.json").read_text())
    for note, says in (
        ({"layout": 2, "precision": "int4"}, "this version reads layout 1"),
        ({"layout": 1, "precision": "int2"}, "'int2', which is not one of int8, int4"),
    ):
        (out / "config.json").write_text(json.dumps({**values, KEY: note}))
        with pytest.raises(CheckpointError, match=says):
            load_model(out, device="cpu")
