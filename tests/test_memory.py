"""Memory from shapes: the published totals, the recorded checkpoints, and a measured toy."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from cogvlm import devices, quantize
from cogvlm.catalog import find
from cogvlm.config import preset
from cogvlm.devices import Device
from cogvlm.errors import InputError, ResourceError
from cogvlm.load import load_model, skeleton
from cogvlm.memory import (
    Size,
    cache_bytes,
    choose,
    held_bytes,
    image_tokens,
    need,
    needs,
    parameter_shapes,
    part_of,
    parts_of,
    prefill_bytes,
    size_of,
    weights,
)
from fakes import image, row, toy_model

PARITY = Path(__file__).parent / "parity"

# Thousand millions of parameters: published or computed from the papers' shapes, by part.
TOTALS = {
    "cogvlm2-llama3-chat-19B": (19.50, {"experts": 6.98, "tower": 4.30}),
    "cogvlm2-video-llama3-chat": (12.51, {"tower": 4.28}),
    "cogvlm-chat-hf": (17.64, {"experts": 6.476, "adapter": 0.143}),
    "cogagent-chat-hf": (18.29, {"experts": 6.476, "cross": 0.336}),
    "glm-4v-9b": (13.91, {"adapter": 0.214}),
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_the_published_ones(name: str) -> None:
    total, parts = TOTALS[name]
    found = parts_of(find(name).config())
    assert sum(s.parameters for s in found.values()) / 1e9 == pytest.approx(total, abs=0.005)
    for part, billions in parts.items():
        assert found[part].parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_parts_are_those_of_the_recorded_checkpoint() -> None:
    recorded = json.loads((PARITY / "cogvlm2" / "real_checkpoint_tensors.json").read_text())
    shapes = [
        (n, tuple(entry["shape"]))
        for n, entry in recorded.items()
        if not entry.get("buffer") and not entry.get("shared_with")
    ]
    assert parts_of(preset("cogvlm2")) == weights(shapes)


def test_the_released_files_are_as_large_as_we_say() -> None:
    parts = parts_of(preset("cogvlm2"))
    frequencies = 32 * 64  # inv_freq, in every layer
    stored = sum(size.bytes("bfloat16") for size in parts.values()) + 2 * frequencies
    assert stored == 39_006_214_656


@pytest.mark.parametrize("changes", [{}, {"expert_every": 2}, {"expert_rank": 3}])
def test_a_loaded_toy_is_as_large_as_its_shapes_say(changes: dict[str, Any]) -> None:
    model = toy_model(**changes)
    parts = parts_of(model.config)
    assert parts == weights(parameter_shapes(model))
    for dtype in (torch.float32, torch.bfloat16):
        held = sum(p.nbytes for p in model.to(dtype).parameters())
        name = str(dtype).removeprefix("torch.")
        assert sum(size.bytes(name) for size in parts.values()) == held


def test_quantised_sizes_count_scales_and_leave_the_rest() -> None:
    assert size_of("model.layers.0.mlp.language_mlp.up_proj.weight", (10, 200)) == Size(
        2000, 10, 20, 0
    )
    one = Size(2000, 10, 20, 7)
    assert one.bytes("int8") == 2000 + 4 * 10 + 2 * 7
    assert one.bytes("int4") == 1000 + 4 * 20 + 2 * 7
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.vision.conv.bias"):
        assert size_of(name, (3, 4)) == Size(others=12)
    with pytest.raises(InputError, match=r"'int2' is not one of float32, .* int4, int4-all"):
        one.bytes("int2")


def test_every_tensor_has_its_part() -> None:
    names = skeleton(preset("toy")).state_dict()
    assert {part_of(n) for n in names} == {
        "tower",
        "adapter",
        "experts",
        "language",
        "embedding",
        "head",
    }
    assert part_of("model.vision.patch_embedding.position_embedding.weight") == "tower"
    assert part_of("model.vision.linear_proj.gate_proj.weight") == "adapter"


@torch.no_grad()
def test_the_cache_is_as_large_as_we_say() -> None:
    model = toy_model()
    prompt = row(model, 2, image(1), 5)
    cache = DynamicCache(config=model.config)
    model(**prompt, past_key_values=cache, use_cache=True)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    tokens = prompt["input_ids"].shape[1]
    assert tokens == 7 + image_tokens(model.config)
    assert held == cache_bytes(model.config, tokens, item=4)


def test_one_page_of_1344_pixels() -> None:
    config = preset("cogvlm2")
    assert image_tokens(config) == 2306
    assert cache_bytes(config, 2306 + 2048) == 2 * 32 * 8 * 128 * 4354 * 2
    found = need(config, parts_of(config), "bfloat16")
    # The authors measured 42 GB for bfloat16.
    assert found.total / 1e9 == pytest.approx(42, abs=1.5)


class Peak(TorchDispatchMode):
    """Bytes of the storages made inside and still alive, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in inputs and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


@torch.no_grad()
@pytest.mark.parametrize("text", [3, 300])
def test_the_estimate_of_a_prompt_is_near_what_is_measured(text: int) -> None:
    wide = {"image_size": 224, "num_positions": 257, "intermediate_size": 320}
    model = toy_model(max_position_embeddings=1024, intermediate_size=512, vision_config=wide)
    prompt = row(model, 2, image(1, 224, 224), text)
    with Peak() as peak:
        model(**prompt, logits_to_keep=1, use_cache=False)
    said = prefill_bytes(model.config, prompt["input_ids"].shape[1], item=4)
    assert 0.6 < said / peak.most < 1.7, (said, peak.most)


# --- what is taken where ---

NEEDS = {"float32": 80, "bfloat16": 40, "int8": 20, "int4": 16, "int4-all": 13}


@pytest.mark.parametrize(
    ("kind", "free", "taken"),
    [
        ("cpu", 80, "float32"),
        ("cpu", 79, "bfloat16"),
        ("cuda", 80, "bfloat16"),
        ("cuda", 39, "int8"),
        ("cuda", 19, "int4"),
        ("cuda", 15, "int4-all"),
        ("cuda", 12, None),
        ("mps", 39, "int8"),
        ("mps", 19, None),
    ],
)
def test_the_most_exact_that_fits_is_taken(kind: str, free: float, taken: str | None) -> None:
    device = Device(f"{kind} x", kind, 100.0, free_gb=free)
    found = choose({name: int(size * 1e9) for name, size in NEEDS.items()}, [device])
    assert (found and found[1]) == taken


def test_a_worse_precision_on_a_card_goes_before_a_better_one_on_the_cpu() -> None:
    sizes = {name: int(size * 1e9) for name, size in NEEDS.items()}
    cpu = Device("cpu", "cpu", 100.0)
    small, large = Device("cuda:0", "cuda", 12.0), Device("cuda:1", "cuda", 17.0)
    assert choose(sizes, [small, large, cpu]) == (large, "int4")
    assert choose(sizes, [small, cpu]) == (cpu, "float32")
    assert choose(sizes, [cpu], only="int8") == (cpu, "int8")
    assert choose(sizes, [Device("cpu", "cpu", None)]) is None


def save(folder: Path, **sizes: Any) -> dict[str, int]:
    """A toy in the released layout, and what it needs."""
    model = toy_model(**sizes)
    model.save_pretrained(folder)
    return needs(model.config)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 400}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4", "int4-all"])
@pytest.mark.parametrize("asked", [None, "auto"])
def test_loading_takes_what_fits_the_free_memory(
    precision: str, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = save(tmp_path, **WIDE)
    assert sorted(wanted.values(), reverse=True) == list(wanted.values())
    monkeypatch.setattr(devices, "main_memory", lambda: (10**12, wanted[precision]))
    model = load_model(tmp_path, asked, "cpu")
    exact = torch.float32 if precision == "float32" else torch.bfloat16
    assert model.lm_head.weight.dtype == exact
    layers = {
        name: type(model.get_submodule(name)).__name__
        for name in (
            "model.vision.linear_proj.gate_proj",
            "model.layers.0.self_attn.vision_expert_dense",
        )
    }
    kinds = {"int8": ["Int8Linear"] * 2, "int4": ["Int8Linear", "Int4Linear"]}
    kinds["int4-all"] = ["Int4Linear"] * 2
    assert list(layers.values()) == kinds.get(precision, ["Linear"] * 2)


def test_loading_what_fits_nowhere_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = save(tmp_path)
    monkeypatch.setattr(devices, "main_memory", lambda: (10**12, wanted["int4-all"] - 1))
    with pytest.raises(ResourceError, match=r"GB in int4-all .*free: cpu 0\.\d GB; .*name a prec"):
        load_model(tmp_path, device="cpu")
    load_model(tmp_path, "float32", "cpu")  # whoever names one gets it


def test_a_container_has_less_than_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used, stat = (tmp_path / name for name in ("max", "current", "stat"))
    monkeypatch.setattr(devices, "_CONTAINER", ((limit, used, stat),))
    machine = devices.main_memory()
    assert 0 < machine[1] <= machine[0]
    limit.write_text("30000000\n")
    used.write_text("20000000\n")
    stat.write_text("anon 12\ninactive_file 5000000\n")
    assert devices.main_memory() == (30_000_000, 15_000_000)
    limit.write_text("max\n")
    assert devices.main_memory()[0] == machine[0]


@pytest.mark.parametrize("precision", ["int8", "int4", "int4-all"])
def test_a_quantised_model_is_as_large_as_its_shapes_say(precision: str) -> None:
    vision = {"hidden_size": 128, "intermediate_size": 256}
    model = toy_model(**WIDE, vision_config=vision).bfloat16()
    parts = parts_of(model.config)
    quantize.quantise(model, precision)
    held = 0
    for parameter in model.parameters():
        kept: Any = parameter
        names = getattr(kept, "tensor_data_names", None)
        held += sum(getattr(kept, n).nbytes for n in names) if names else kept.nbytes
    assert held == sum(held_bytes(part, size, precision) for part, size in parts.items())
