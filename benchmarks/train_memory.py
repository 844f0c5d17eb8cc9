"""What ``cogvlm train --plan`` says a step takes, against what steps took.

Every case is a model of random weights that fits a small machine, in a child process: it trains for
two steps of the loop that ``cogvlm train`` runs.  Measured is what torch's allocator had given out
at most at one time, weights included; ``rss`` is what the process grew by, which has the scratch
space of kernels and what the allocator keeps, too.  Of cases that processes divide, two of them
train together, and the larger of both is told.

    python benchmarks/train_memory.py            # a minute or two
    python benchmarks/train_memory.py --quick    # toys
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvlm import adapter, devices, quantize
from cogvlm.config import preset
from cogvlm.models import parallel
from cogvlm.models.build import skeleton
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.tensors import save_tensors
from cogvlm.train.compute import Compute
from cogvlm.train.distributed import World, processes, share, share_of
from cogvlm.train.loop import Loop, Pieces, Schedule
from cogvlm.train.plan import Plan, configuration, plan
from cogvlm.train.recipe import Lora, Part, TuneRecipe
from cogvlm.train.sight import Sight
from cogvlm.train.tune import make_ready
from common import commit, machine, peak_bytes

LIMIT = 0.15
SMALL: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_multi_query_heads": 2,
    "vision_config": {
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_heads": 4,
        "intermediate_size": 768,
        "image_size": 224,
        "num_positions": 257,
    },
}
LORA = Lora(("experts.qkv",), rank=8)
EVERYTHING = {name: Part() for name in ("adapter", "experts", "tower", "language")}
BASE: dict[str, Any] = {"precision": "float32", "batch_size": 2, "accumulate": 2, "max_tokens": 384}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora": LORA},
    "lora_checkpointing": {"lora": LORA, "checkpointing": True},
    "lora_tower_bfloat16": {"lora": Lora(("experts", "tower")), "precision": "bfloat16"},
    "lora_int4": {"lora": LORA, "precision": "int4"},
    "experts_ema": {"parts": {"experts": Part(), "adapter": Part()}, "ema": 0.99},
    "experts_bfloat16": {"parts": {"experts": Part()}, "precision": "bfloat16"},
    "full_checkpointing": {"parts": EVERYTHING, "checkpointing": True},
    "long": {"lora": LORA, "batch_size": 1, "max_tokens": 1536},
    "packed": {"lora": LORA, "packing": True, "max_tokens": 2600},
    "image_loss": {"lora": LORA, "image_loss": 0.1},
    "lora_ddp": {"lora": LORA, "parallel": "ddp"},
    "lora_zero2": {"lora": LORA, "parallel": "zero2"},
    "lora_fsdp": {"lora": LORA, "parallel": "fsdp"},
    "full_zero2": {"parts": EVERYTHING, "parallel": "zero2"},
    "full_fsdp": {"parts": EVERYTHING, "parallel": "fsdp"},
    "lora_tensor": {"lora": LORA, "parallel": "tensor"},
    "lora_mlp_tensor": {"lora": Lora(("experts", "language")), "parallel": "tensor"},
    "full_tensor": {"parts": EVERYTHING, "parallel": "tensor"},
    "experts_tensor_bfloat16": {
        "parts": {"experts": Part()}, "precision": "bfloat16", "parallel": "tensor",
    },
    "full_fsdp_checkpointing": {"parts": EVERYTHING, "parallel": "fsdp", "checkpointing": True},
    "experts_fsdp_bfloat16": {
        "parts": {"experts": Part()}, "precision": "bfloat16", "parallel": "fsdp",
    },
}  # fmt: skip


@dataclass
class Fixed:
    """An objective with one batch, as large as the plan says."""

    trained: CogVLMForCausalLM
    given: dict[str, Any]
    pieces: int
    sight: Sight | None = None
    forward: Any = None  # of processes that train together

    def batches(self, start: int) -> Iterator[Any]:
        while True:
            yield Pieces([self.given] * self.pieces)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        loss = (self.forward or self.trained)(**batch).loss
        if self.sight is not None:
            pictures = list(batch["pixel_values"])
            loss = loss + self.sight.loss(batch["token_type_ids"], pictures)
        return loss, {}

    def lr_scale(self, name: str) -> float:
        return 1.0

    def evaluate(self) -> dict[str, Any]:
        return {}

    def export(self, folder: Path) -> None:
        pass


def recipe_of(model: str, **values: Any) -> TuneRecipe:
    """A recipe of a case."""
    schedule = Schedule(steps=2, ema=values.pop("ema", 0.0))
    return TuneRecipe("tune", schedule, ("none",), model=model, **{**BASE, **values})


def planned(recipe: TuneRecipe, count: int = 1) -> Plan:
    """For CPUs of any size."""
    return plan(recipe, devices.Device("cpu", "cpu", 1000.0), count)


def inputs(said: Plan) -> dict[str, Any]:
    """One piece of the plan's shape."""
    shape = said.shape
    vision: Any = configuration(said.recipe.model)[0]
    between = shape.text // (shape.images + 1)
    block = [0] * between + [1] * shape.image_tokens
    row = (block * shape.images + [0] * shape.text)[: shape.tokens]
    types = torch.tensor([row] * shape.rows)
    labels = torch.full_like(types, -100)
    labels[:, -shape.answers :] = 5
    given: dict[str, Any] = {"input_ids": torch.full_like(types, 5), "token_type_ids": types}
    given |= {"labels": labels}
    given["pixel_values"] = torch.randn(shape.rows * shape.images, 3, *shape.side)
    if shape.packed > 1:
        length = -(-types.shape[1] // shape.packed)
        given["sequence_positions"] = (torch.arange(types.shape[1]) % length)[None]
    assert vision is not None
    return given


def measure(recipe: TuneRecipe) -> dict[str, float]:
    """Bytes that were planned and bytes that were taken; of processes, by each."""
    with processes("cpu") as world:
        return _measure(recipe, world)


def _measure(recipe: TuneRecipe, world: World) -> dict[str, float]:
    said = planned(recipe, world.size)
    config = configuration(recipe.model)[0]
    torch.manual_seed(0)
    empty: Any = skeleton(config).to_empty(device="cpu")
    model: CogVLMForCausalLM = empty
    model.tie_weights()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.normal_(std=0.02)
    move: Any = model.to
    if said.precision != "float32":
        move(torch.bfloat16)
    if said.precision not in ("float32", "bfloat16"):
        quantize.quantise(model, said.precision)
    if recipe.parallel == "tensor":
        model = cut(model)
    make_ready(model, recipe)
    numbers = Compute(torch.device("cpu"), said.compute)
    sight = Sight(model) if recipe.image_loss else None
    shared = share(model, recipe.parallel, world, numbers.kind)
    pieces = 2 if recipe.packing else recipe.accumulate
    objective = Fixed(model, inputs(said), pieces, sight, shared.forward)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(objective, recipe.schedule, Path(folder), compute=numbers, shared=shared)
        batch = next(objective.batches(0))
        standing = sum(size for (what, _), size in said.stays.items() if what not in MADE)
        if shared.cut:  # what there is, not what there should be
            held = map(share_of, [*model.parameters(), *model.buffers()])
            standing = sum(tensor.untyped_storage().nbytes() for tensor in held)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mean = 4 * sum(p.numel() for p in loop.params) if loop.average else 0

        def steps() -> None:
            for _ in range(2):
                loop.one_step(batch)

        steps()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = sum(
            v.numel() * v.element_size()
            for o in loop.optimizers
            for state in o.state.values()
            for v in state.values()
            if isinstance(v, Tensor)
        )
        for p in loop.params:
            p.grad = None
        taken = standing + mean + made + peak_bytes(lambda: loop.one_step(batch))
    assert any(adapter.is_lora(n) for n, _ in model.named_parameters()) == bool(recipe.lora)
    return {"planned": said.peak, "measured": taken, "rss": standing + 1024.0 * (after - before)}


def cut(model: CogVLMForCausalLM) -> CogVLMForCausalLM:
    """This process's share of a model, as loading gives it."""
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(model.state_dict(), Path(folder) / "model.safetensors")
        found: CogVLMForCausalLM = parallel.load(
            type(model), Path(folder), model.config, model.dtype
        )
    return found


MADE = ("optimiser", "mean")  # by the loop, not by the model


def one_of(case: str, quick: bool, rank: int, size: int, port: int) -> dict[str, float]:
    """A case, as one of so many processes."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": size}
    os.environ.update({key: str(value) for key, value in where.items()})
    return compare(case, quick)


def together(case: str, quick: bool) -> dict[str, float]:
    """A case in processes of its own; of several, the one that took most."""
    count = 2 if "parallel" in CASES.get(case, {}) else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with context.Pool(count, torch.set_num_threads, (1,)) as pool:
        calls = [(case, quick, rank, count, port) for rank in range(count)]
        found = pool.starmap(one_of, calls, chunksize=1)
    return max(found, key=lambda row: row["measured"])


def compare(name: str, quick: bool) -> dict[str, float]:
    """One case."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "nano":
            recipe = recipe_of("nano", lora=Lora(("adapter", "tower")), max_tokens=160)
        else:
            changes: dict[str, Any] = {} if quick else SMALL
            config = preset("toy", **changes)
            (Path(folder) / "config.json").write_text(json.dumps(config.to_dict()))
            recipe = recipe_of(folder, **CASES[name])
            if quick:
                recipe = replace(recipe, max_tokens=300 if recipe.packing else 64)
        found = measure(recipe)
    error = found["planned"] / found["measured"] - 1
    return {**found, "error": round(error, 4)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toys, a smoke test")
    parser.add_argument("--case", action="append", choices=[*CASES, "nano"])
    given = parser.parse_args()
    names = given.case or ([*CASES] if given.quick else [*CASES, "nano"])
    found: dict[str, dict[str, float]] = {}
    for name in names:
        row = found[name] = together(name, given.quick)
        print(
            f"{name:22} planned {row['planned'] / 1e6:8.1f} MB, measured "
            f"{row['measured'] / 1e6:8.1f} MB, {100 * row['error']:+.1f} %",
            flush=True,
        )
    worst = max(abs(row["error"]) for row in found.values())
    line = {"name": "train_memory", "commit": commit(), "quick": given.quick, "machine": machine()}
    line |= {"bytes": found, "worst_error": worst}
    line |= {"goals": {"worst_error": {"at_most": LIMIT, "met": worst <= LIMIT}}}
    print(json.dumps({**line, "ok": worst <= LIMIT}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
