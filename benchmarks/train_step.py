"""A fine-tune step of our model against one of a dense Llama of transformers of the same shape.

Both train the same LoRA (peft, rank 8, on query, key and value of every layer) on rows of the same
length in the loop that ``cogvlm train`` runs.  The Llama gets embeddings where ours has image
tokens; ours has a picture in every row, whose tower is one narrow layer, so that what is compared
is the decoder with its experts and the routing between them.

    python benchmarks/train_step.py            # minutes
    python benchmarks/train_step.py --quick    # seconds, a smoke test
    python benchmarks/train_step.py --compile  # ours compiled (compile: true) as a third side

Ends with one JSON line: medians, their ratio, and the ratio of the peaks of memory that the
allocator counts, weights left out (ours has the experts' besides).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cogvlm import adapter
from cogvlm.config import preset
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.train.compiled import compile_layers
from cogvlm.train.compute import recompute
from cogvlm.train.loop import Loop, Schedule
from common import commit, interleave, machine, peak_bytes, ratio, spread
from train_memory import Fixed

GOAL = 1.1
SIZES = {"width": 512, "inner": 1408, "layers": 6, "heads": 8, "kv": 4, "vocab": 16000}
TINY = {"width": 64, "inner": 112, "layers": 2, "heads": 4, "kv": 2, "vocab": 320}


def ours(sizes: dict[str, int], side: int) -> CogVLMForCausalLM:
    """Our model with a narrow tower."""
    patches = (side // 14) ** 2
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 64}
    vision |= {"image_size": side, "num_positions": patches + 1, "adapter_intermediate_size": 64}
    config = preset(
        "toy",
        hidden_size=sizes["width"],
        intermediate_size=sizes["inner"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_multi_query_heads=sizes["kv"],
        vocab_size=sizes["vocab"],
        max_position_embeddings=4096,
        vision_config=vision,
    )
    return CogVLMForCausalLM(config)


class Dense(nn.Module):
    """The Llama, its loss at labelled places only, as a careful fine-tune has it."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=sizes["width"],
                intermediate_size=sizes["inner"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                num_key_value_heads=sizes["kv"],
                vocab_size=sizes["vocab"],
                max_position_embeddings=4096,
            )
        )

    def forward(self, embeds: Tensor, labels: Tensor) -> Any:
        hidden = self.llama.model(inputs_embeds=embeds).last_hidden_state
        asked = labels[:, 1:] != -100
        logits = self.llama.lm_head(hidden[:, :-1][asked]).float()
        loss = F.cross_entropy(logits, labels[:, 1:][asked])
        return type("Out", (), {"loss": loss})


def lora_on(model: nn.Module, names: str) -> None:
    """peft's LoRA, the only thing that trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=names)
        peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapter.is_lora(name))


def sides(sizes: dict[str, int], rows: int, text: int, side: int) -> dict[str, Fixed]:
    """Both, with a batch of one shape."""
    torch.manual_seed(0)
    model = ours(sizes, side)
    tokens = (side // 28) ** 2 + 2
    length = 1 + tokens + text
    types = torch.zeros(rows, length, dtype=torch.long)
    types[:, 1 : 1 + tokens] = 1
    labels = torch.full_like(types, -100)
    labels[:, -text // 2 :] = 5
    given = {"input_ids": torch.full_like(types, 5), "token_type_ids": types, "labels": labels}
    pixels = torch.randn(rows, 3, side, side)
    lora_on(model, r".*self_attn\.(vision|language)_expert_query_key_value")
    dense = Dense(sizes)
    lora_on(dense, r".*self_attn\.(q|k|v)_proj")
    embeds = torch.randn(rows, length, sizes["width"]) * 0.02
    return {
        "ours": Fixed(model, {**given, "pixel_values": pixels}, 1),
        "llama": Fixed(dense, {"embeds": embeds, "labels": labels}, 1),  # type: ignore[arg-type]
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a smoke test")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="see README.md")
    parser.add_argument("--repeats", type=int, help="timed steps of each side")
    parser.add_argument("--checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--compile", action="store_true", help="ours compiled as a third side")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    import time

    clock = {"wall": time.perf_counter, "cpu": time.process_time}[given.clock]
    shape = (2, 16, 56) if given.quick else (2, 256, 448)
    sizes = TINY if given.quick else SIZES
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        loops: dict[str, Loop] = {}
        objectives = sides(sizes, *shape)
        if given.compile:
            objectives["compiled"] = sides(sizes, *shape)["ours"]
            if not compile_layers(objectives["compiled"].trained):
                return 1
        for name, objective in objectives.items():
            if given.checkpointing:
                recompute(objective.trained)
            schedule = Schedule(steps=1000, warmup=0, lr=1e-3)
            loops[name] = Loop(objective, schedule, Path(folder) / name)

        def stepper(loop: Loop) -> Callable[[int], object]:
            batch = next(loop.objective.batches(0))
            return lambda _: loop.one_step(batch)

        steps = {name: stepper(loop) for name, loop in loops.items()}
        repeats = given.repeats or (3 if given.quick else 15)
        times = interleave(steps, repeats, 2, clock)
        peaks = {name: peak_bytes(lambda s=step: s(0)) for name, step in steps.items()}
    found = ratio(times["ours"], times["llama"])
    memory = peaks["ours"] / peaks["llama"]
    ratios: dict[str, Any] = {"step": found, "memory": {"ratio": round(memory, 3)}}
    if given.compile:
        ratios["compiled_step"] = ratio(times["compiled"], times["ours"])
        ratios["compiled_memory"] = {"ratio": round(peaks["compiled"] / peaks["ours"], 3)}
    line = {
        "name": "train_step",
        "commit": commit(),
        "quick": given.quick,
        "machine": before,
        "clock": given.clock,
        "dtype": "float32",
        "sizes": {**sizes, "rows": shape[0], "text": shape[1], "side": shape[2]},
        "checkpointing": given.checkpointing,
        "milliseconds": {name: spread(seconds) for name, seconds in times.items()},
        "peak_bytes": peaks,
        "ratios": ratios,
        "ratio_is": "ours over the Llama's; compiled over not compiled",
        "goals": {
            "step": {"at_most": GOAL, "met": found["ratio"] <= GOAL},
            "memory": {"at_most": GOAL, "met": memory <= GOAL},
        },
    }
    line["ok"] = all(goal["met"] for goal in line["goals"].values())
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
