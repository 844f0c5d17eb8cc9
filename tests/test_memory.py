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

from cogvlm.catalog import find
from cogvlm.config import preset
from cogvlm.errors import InputError
from cogvlm.load import skeleton
from cogvlm.memory import (
    Size,
    cache_bytes,
    image_tokens,
    need,
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
    with pytest.raises(InputError, match="'int2' is not one of float32, bfloat16, int8, int4"):
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
