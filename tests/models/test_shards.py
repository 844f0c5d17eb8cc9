"""Released folders: what is read, what is refused and in which words, where it lies, in how much
memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvlm.config import preset
from cogvlm.errors import CheckpointError, ConfigError, DownloadError, InputError
from cogvlm.hub import resolve
from cogvlm.load import load_model, skeleton
from cogvlm.models import shards, spread
from cogvlm.models.cogvlm import CogVLMForCausalLM
from fakes import image, row, toy_model

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy as its authors would release it: bfloat16, inv_freq too, in several files."""
    folder = tmp_path_factory.mktemp("released")
    toy_model().to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def folder(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "model"))


def first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def merge(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors; the files and the index are deleted."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: t.clone() for path in files for name, t in load_file(path).items()}
    for path in [*files, folder / shards.INDEX]:
        path.unlink()
    return tensors


def single(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda tensors: None) -> None:
    tensors = merge(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_is_the_toy(model: CogVLMForCausalLM) -> None:
    expected = toy_model().to(torch.bfloat16).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name].float()), name


@pytest.mark.parametrize("layout", ["index", "single", "numbered", "one of any name"])
def test_every_layout_gives_the_same_weights(folder: Path, layout: str) -> None:
    if layout == "numbered":
        (folder / shards.INDEX).unlink()
    elif layout != "index":
        single(folder)
    if layout == "one of any name":
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
    model = load_model(folder, "bfloat16", "cpu")
    assert_is_the_toy(model)
    assert not model.training
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_frequencies_are_kept_as_they_are(folder: Path, dtype: str) -> None:
    odd = torch.linspace(0.1, 0.9, 8).to(torch.bfloat16)

    def change(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("inv_freq")]:
            tensors[name] = odd.clone()

    single(folder, change)
    model = load_model(folder, dtype, "cpu")
    for layer in model.model.layers:
        assert layer.self_attn.rotary_emb.inv_freq.dtype == torch.bfloat16
        assert torch.equal(layer.self_attn.rotary_emb.inv_freq, odd)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_frequencies_follow_the_released_code_when_stored_in_float32() -> None:
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert [shards.target_dtype(name, f32, wanted) for wanted in (bf16, f16, f32)] == [
        bf16,
        f32,
        f32,
    ]
    assert shards.target_dtype("lm_head.weight", bf16, f16) == f16
    assert shards.target_dtype("count", torch.int64, f16) == torch.int64


def test_weights_do_not_depend_on_the_files_afterwards(folder: Path) -> None:
    model = load_model(folder, "bfloat16", "cpu")
    for path in folder.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_is_the_toy(model)


def cut(name: str, keep: int) -> Change:
    def change(folder: Path) -> None:
        path = folder / name if name else first(folder)
        path.write_bytes(path.read_bytes()[:keep])

    return change


def write(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name if name else first(folder)).write_bytes(data)


def drop(tensors: dict[str, Any]) -> None:
    for i in range(3):
        del tensors[f"model.layers.{i}.mlp.vision_mlp.up_proj.weight"]
        del tensors[f"model.layers.{i}.mlp.vision_mlp.down_proj.weight"]


def add(tensors: dict[str, Any]) -> None:
    tensors["model.extra.weight"] = torch.zeros(2)


def reshape(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = torch.zeros(319, 64)


def quantise(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight.absmax"] = torch.zeros(3)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n"
OUTSIDE = b'{"weight_map": {"a": "../other.safetensors"}}'

DAMAGE: dict[str, tuple[Change, str]] = {
    "truncated": (cut("", 3000), r"00001-of.*truncated, 3000 bytes found, \d+ expected from its"),
    "cut in the header": (cut("", 100), r"00001-of.*truncated, 100 bytes found where its header"),
    "empty": (cut("", 0), r"00001-of-.*damaged one \(0 bytes\); fetch it again"),
    "too long": (
        lambda f: first(f).write_bytes(first(f).read_bytes() + b"x"),
        r"damaged, \d+ bytes found",
    ),
    "no safetensors": (write("", b"<html>" * 99), r"no safetensors file or a damaged one \(594 b"),
    "header of nonsense": (write("", b"\x05" + bytes(7) + b"[1,2]"), r"its header is damaged"),
    "pointer": (write("", POINTER), r"Git-LFS pointer .* of 4976698672 bytes; run 'git lfs pull'"),
    "one file gone": (lambda f: first(f).unlink(), r"1 of \d+ files .* missing: model-00001-of-"),
    "no weights": (lambda f: merge(f) and None, r"has no \*.safetensors; give a folder with"),
    "broken index": (cut(shards.INDEX, 99), r"index.json: damaged or no index of weights"),
    "index to elsewhere": (write(shards.INDEX, OUTSIDE), r"names '../other.safetensors', which"),
    "unnumbered": (
        lambda f: [(f / shards.INDEX).unlink(), save_file({}, f / "b.safetensors")],
        r"which of b.safetensors, model-00001-of-\S+ .* are the weights is not clear",
    ),
    "missing tensors": (
        lambda f: single(f, drop),
        r"6 missing tensors: model.layers.0.mlp.vision_mlp.down_proj.weight, .* and 2 more; check",
    ),
    "unexpected tensor": (lambda f: single(f, add), r"1 unexpected tensors: model.extra.weight"),
    "shape": (
        lambda f: single(f, reshape),
        r"1 tensors of another shape: lm_head.weight is \(319, 64\) in the file, \(320, 64\) by",
    ),
    "quantised": (lambda f: single(f, quantise), r"stored quantised .* with its quantization_c"),
    "twice": (
        lambda f: [shutil.copy(first(f), f / "b.safetensors"), index_both(f)],
        r"is in two files, \S+ and \S+; keep",
    ),
}


def index_both(folder: Path) -> None:
    names = [p.name for p in folder.glob("*.safetensors")]
    (folder / shards.INDEX).write_text(json.dumps({"weight_map": {n: n for n in names}}))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_line(folder: Path, kind: str) -> None:
    change, said = DAMAGE[kind]
    change(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_damage_is_found_before_any_weight_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    cut(max(folder.glob("*.safetensors")).name, 2000)(folder)
    monkeypatch.setattr(shards, "safe_open", refuse)
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(folder, device="cpu")


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_pickles_are_read_only_when_allowed_and_as_tensors_only(folder: Path) -> None:
    tensors = merge(folder)
    names = sorted(tensors)
    for i, part in enumerate((names[:50], names[50:])):
        path = folder / f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({n: tensors[n] for n in part}, path)
    with pytest.raises(CheckpointError, match=r"pickle can run code: .*--allow-pickle"):
        load_model(folder, device="cpu")
    assert_is_the_toy(load_model(folder, "bfloat16", "cpu", allow_pickle=True))

    torch.save({**tensors, "x": Harmful(folder / "written")}, path)
    with pytest.raises(CheckpointError, match=r"00002.bin: a damaged pickle, or one that holds"):
        load_model(folder, device="cpu", allow_pickle=True)
    assert not (folder / "written").exists()
    torch.save({"state": 1}, path)
    with pytest.raises(CheckpointError, match="not a plain table of tensors"):
        load_model(folder, device="cpu", allow_pickle=True)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=r"00002.bin: "):
        load_model(folder, device="cpu", allow_pickle=True)
    path.write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="Git-LFS pointer"):
        load_model(folder, device="cpu", allow_pickle=True)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"missing: pytorch_model-00002-of-00002.bin"):
        load_model(folder, device="cpu", allow_pickle=True)


def test_python_files_of_a_folder_are_never_run(folder: Path) -> None:
    code = f"open({str(folder / 'written')!r}, 'w')\n"
    for name in ("modeling_cogvlm.py", "configuration_cogvlm.py", "util.py", "__init__.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert_is_the_toy(load_model(folder, "bfloat16", "cpu"))
    assert not (folder / "written").exists()


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as the hub's own library keeps it: blobs and links to them; no network."""
    home = tmp_path / "hub" / "models--org--toy"
    snapshot, blobs = home / "snapshots" / ("0" * 40), home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{i:064}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"{i:064}")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home.parent))
    return home


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_a_hub_cache_is_used_by_name_and_offline(cache: Path) -> None:
    snapshot = next((cache / "snapshots").iterdir())
    assert resolve("org/toy") == snapshot
    assert_is_the_toy(load_model(resolve("org/toy"), "bfloat16", "cpu"))
    with pytest.raises(DownloadError, match="not in the local hub cache"):
        resolve("org/other")


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_an_interrupted_download_says_so(cache: Path) -> None:
    snapshot = next((cache / "snapshots").iterdir())
    victim = first(snapshot)
    blob = victim.resolve()
    victim.unlink()
    blob.rename(blob.with_name(f"{blob.name}.0a1b2c3d.incomplete"))
    with pytest.raises(CheckpointError, match=r"interrupted: 1 \*.incomplete in .*blobs; run it"):
        load_model(resolve("org/toy"), device="cpu")


SOME: dict[str, Any] = {"": "cpu", "model.layers.1": "disk", "model.vision.transformer": "disk"}


@torch.no_grad()
@pytest.mark.parametrize(
    "device_map",
    [
        SOME,
        {"": "disk"},
        {"": "cpu", "model.embed_tokens": "disk", "model.vision.conv": "disk", "lm_head": "disk"},
        {"model.vision": "disk", "model": "cpu", "lm_head": torch.device("cpu")},
    ],
    ids=["layers", "all", "ends", "tower"],
)
def test_parts_on_disk_give_the_same_answer(folder: Path, device_map: dict[str, Any]) -> None:
    whole = load_model(folder, "float32", "cpu")
    model = load_model(folder, "float32", device_map=device_map)
    meta = {name for name, p in model.named_parameters() if p.is_meta}
    place = spread.by_name(device_map)
    assert meta == {n for n, _ in whole.named_parameters() if place(n) == "disk"} != set()
    assert model.device == torch.device("cpu")
    prompt = row(whole, 2, image(1), 3)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    torch.testing.assert_close(model(**prompt).logits, whole(**prompt).logits, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(**prompt, **settings), whole.generate(**prompt, **settings))
    assert {name for name, p in model.named_parameters() if p.is_meta} == meta


def test_auto_is_one_device_where_there_is_one(folder: Path) -> None:
    model = load_model(folder, "bfloat16", device_map="auto")
    if not torch.cuda.is_available():
        assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not any(p.is_meta for p in model.parameters())


def test_what_a_device_map_may_not_be(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'model.layer.1'; did you mean 'model.layers.1'"):
        load_model(folder, device_map={"": "cpu", "model.layer.1": "disk"})
    with pytest.raises(InputError, match=r"nothing about 1 tensors, the first is lm_head.weight"):
        load_model(folder, device_map={"model": "cpu"})
    inner = {"": "cpu", "model.layers.1.mlp": "disk"}
    with pytest.raises(ConfigError, match=r"cuts model.layers.1 \(DecoderLayer\) at .*as a whole"):
        load_model(folder, device_map=inner)
    with pytest.raises(InputError, match=r"device_map 'all' is not one of auto"):
        load_model(folder, device_map="all")
    with pytest.raises(InputError, match="give one of the two"):
        load_model(folder, device="cpu", device_map="auto")


def test_layers_are_not_cut_and_what_they_share_goes_along() -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import send_to_device

    model = skeleton(preset("toy"))
    total = sum(p.nbytes for p in model.parameters())
    room = {0: int(0.7 * total), 1: total, "cpu": total}
    made = infer_auto_device_map(model, room, no_split_module_classes=spread._uncut(model))
    table = spread._expand(model, made, "")
    assert set(table.values()) == {0, 1}
    place = spread.placing(model, table)
    assert place("model.vision.boi") == place("model.vision.linear_proj.norm1.weight")
    for name in model.state_dict():
        parts = name.split(".")
        if "layers" in parts:
            layer = ".".join(parts[: parts.index("layers") + 2])
            assert place(name) == place(layer + ".input_layernorm.weight")

    from cogvlm.models.language import Step
    from cogvlm.models.positions import Route

    step = Step(Route.text(1, 2), torch.ones(1), torch.ones(1), None, None)
    moved = send_to_device(step, "meta")
    assert moved.cos.is_meta and moved.sin.is_meta and moved.route is step.route
    assert not step.cos.is_meta


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from cogvlm.load import load_model
import cogvlm.models.cogvlm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(Path(sys.argv[1]), sys.argv[2], "cpu")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * (1 if sys.platform == "darwin" else 1024))
print(sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no ru_maxrss")
def test_memory_is_the_model_and_one_file(tmp_path: Path) -> None:
    config = preset(
        "toy", hidden_size=512, intermediate_size=2048, num_hidden_layers=5, vocab_size=4000
    )
    model = skeleton(config).to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path, max_shard_size="10MB")
    files = [p.stat().st_size for p in tmp_path.glob("*.safetensors")]
    assert len(files) >= 8 and sum(files) > 70e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "float32"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr
    peak, weights = map(int, done.stdout.split())
    # Every file kept until the end would be 70 MB more than the model.
    assert peak < weights + 2 * max(files) + 15e6
