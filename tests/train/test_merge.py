"""``cogvlm merge`` and ``--adapter``: what fits is written, what does not is said by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cogvlm import adapter
from cogvlm.cli import app
from cogvlm.errors import CheckpointError, InputError
from cogvlm.load import load, load_model
from cogvlm.models.checkpoint import is_vision
from cogvlm.train.merge import merge
from fakes import toy_model
from train import toys

QKV = "model.layers.0.self_attn.language_expert_query_key_value"
SEEN = "model.vision.linear_proj.gate_proj"


def write_adapter(folder: Path, module: str = SEEN, rank: int = 2, **settings: Any) -> Path:
    """A LoRA on one layer, as peft would have written it."""
    folder.mkdir()
    shape = toy_model().get_submodule(module).weight.shape
    made = torch.Generator().manual_seed(1)
    name = f"{adapter.PREFIX}{module}.lora_"
    pair = {
        f"{name}A.weight": torch.randn(rank, shape[1], generator=made),
        f"{name}B.weight": torch.randn(shape[0], rank, generator=made),
    }
    save_file(pair, folder / adapter.LORA_WEIGHTS)
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": [module]}
    (folder / adapter.LORA_CONFIG).write_text(json.dumps({**values, **settings}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return toys.write_model(tmp_path / "model")


@pytest.mark.parametrize(("settings", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5)])
def test_what_is_written_is_the_sum(
    model: Path, tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    folder = write_adapter(tmp_path / "lora", QKV, **settings)
    bias = "model.vision.conv.bias"
    save_file({bias: torch.full((48,), 0.5)}, folder / adapter.PART_WEIGHTS)
    out = merge(model, folder, tmp_path / "out")
    before, after = (load_file(p / "model.safetensors") for p in (model, out))
    pair = load_file(folder / adapter.LORA_WEIGHTS)
    name = f"{adapter.PREFIX}{QKV}.lora_"
    change = scale * pair[f"{name}B.weight"] @ pair[f"{name}A.weight"]
    torch.testing.assert_close(after[f"{QKV}.weight"], before[f"{QKV}.weight"] + change)
    assert after[bias].unique().tolist() == [0.5]
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"{QKV}.weight", bias} and before.keys() == after.keys()
    beside = load(model, "float32", "cpu", adapter=folder).model
    layer: Any = beside.get_submodule(QKV)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ after[f"{QKV}.weight"].T, rtol=1e-4, atol=1e-4)


def test_one_file_of_several_at_a_time_in_bfloat16(tmp_path: Path) -> None:
    model = toys.write_model(tmp_path / "model")
    tensors = {n: t.bfloat16() for n, t in load_file(model / "model.safetensors").items()}
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for i, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in chosen}, model / file)
        where |= dict.fromkeys(chosen, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (model / "modeling.py").write_text("never copied")
    out = merge(model, write_adapter(tmp_path / "lora"), tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {p.name for p in model.iterdir()} - {"modeling.py"}
    found = load_file(out / where[f"{SEEN}.weight"])[f"{SEEN}.weight"]
    assert found.dtype is torch.bfloat16 and not torch.equal(found, tensors[f"{SEEN}.weight"])
    load_model(out, "float32", "cpu")


def nano_like(tmp_path: Path) -> Path:
    """A folder that holds the vision part alone."""
    model = toys.write_model(tmp_path / "small")
    kept = {n: t for n, t in load_file(model / "model.safetensors").items() if is_vision(n)}
    save_file(kept, model / "model.safetensors")
    return model


def test_a_language_model_that_is_elsewhere_cannot_be_merged_into(tmp_path: Path) -> None:
    model = nano_like(tmp_path)
    assert merge(model, write_adapter(tmp_path / "a", SEEN), tmp_path / "out").is_dir()
    wanted = r"changes the language model \(model.layers.0.*small takes from elsewhere: use it"
    with pytest.raises(InputError, match=wanted):
        merge(model, write_adapter(tmp_path / "b", QKV), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def change(folder: Path, **values: Any) -> None:
    path = folder / adapter.LORA_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: change(f, use_dora=True), InputError, "use_dora is True; only plain LoRA"),
        (lambda f: change(f, peft_type="IA3"), InputError, "an adapter other than LoRA"),
        (lambda f: change(f, r="two"), CheckpointError, "r or lora_alpha is no number"),
        (lambda f: (f / adapter.LORA_CONFIG).write_text("{"), CheckpointError, "no JSON"),
        (lambda f: (f / adapter.LORA_CONFIG).unlink(), CheckpointError, "holds no adapter"),
        (lambda f: (f / adapter.LORA_WEIGHTS).unlink(), CheckpointError, "no such file"),
        (lambda f: (f / adapter.LORA_WEIGHTS).write_bytes(b"x"), CheckpointError, "damaged"),
        (
            lambda f: save_file({"odd": torch.ones(1)}, f / adapter.LORA_WEIGHTS),
            CheckpointError,
            "'odd' belongs to no LoRA",
        ),
        (
            lambda f: save_file({"x.lora_A.weight": torch.ones(2, 2)}, f / adapter.LORA_WEIGHTS),
            CheckpointError,
            r"1 missing tensors: x \(A or B\)",
        ),
        (
            lambda f: save_file({"far": torch.ones(1)}, f / adapter.PART_WEIGHTS),
            CheckpointError,
            "unexpected tensors: far",
        ),
        (
            lambda f: save_file({"model.norm.weight": torch.ones(1)}, f / adapter.PART_WEIGHTS),
            CheckpointError,
            "model.norm.weight",
        ),
    ],
)
def test_a_damaged_or_foreign_adapter_is_told(
    model: Path, tmp_path: Path, damage: Any, error: type[Exception], message: str
) -> None:
    folder = write_adapter(tmp_path / "lora")
    damage(folder)
    with pytest.raises(error, match=message):
        merge(model, folder, tmp_path / "out")
    with pytest.raises(error, match=message):
        adapter.attach(toy_model(), folder)
    assert not (tmp_path / "out").exists()


def test_another_models_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora")
    other = toy_model(hidden_size=128, num_attention_heads=8)
    with pytest.raises(CheckpointError, match=r"lora_A.* in the adapter, .* in the model; take"):
        adapter.attach(other, folder)
    with pytest.raises(InputError, match="device_map or tp_plan: merge it first"):
        load(model, device_map="auto", adapter=folder)


def test_the_command_writes_a_folder_and_overwrites_none(model: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora")
    arguments = ["merge", str(model), str(folder), str(tmp_path / "out")]
    first, second = (CliRunner().invoke(app, arguments) for _ in range(2))
    assert first.exit_code == 0 and first.stdout.strip() == str(tmp_path / "out")
    assert second.exit_code == 2 and "exists, and nothing is overwritten" in second.stderr
    third = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "no" / "out")])
    assert third.exit_code == 2 and "is no folder; make it first" in third.stderr
    asked = CliRunner().invoke(
        app, ["ask", "Well?", "--adapter", str(folder), "--base-url", "http://localhost:1/v1"]
    )
    assert asked.exit_code == 2 and "--adapter is for local models" in asked.stderr
