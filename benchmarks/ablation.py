"""What single choices of nano's architecture do to how fast a frozen language model learns to read.

    python benchmarks/ablation.py OUT --seeds 1 2

Every variant starts from the shipped tower and adapter with fresh experts and goes through the
recipe's stage "answer" for a few steps, on the same lines in the same order; seeds change the lines
and the fresh weights.  Then held-out lines (other fonts and texts, the same for all): the loss of a
word piece of their answers, and the character error rate of greedy answers.

The shipped adapter was last trained with flat positions and nano's experts, which is a start in
favour of those.  ``--jobs`` variants run at once, a core each; what is in OUT is not run again.
Ends with a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from cogvlm.hub import resolve
from cogvlm.journal import write_whole
from cogvlm.models.checkpoint import read_safetensors
from cogvlm.tensors import save_tensors
from cogvlm.train import recipe as recipes
from cogvlm.train.answer import AnswerObjective
from cogvlm.train.run import prepare
from common import commit, machine

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "nano-answer.yaml"
HELD_OUT_POOLS = 2  # of lines, for the loss; the first of them is read for the error rate

VARIANTS: dict[str, dict[str, object]] = {
    "nano: rank-16 experts in all layers, flat positions, causal": {},
    "no experts, the adapter alone learns": {"visual_expert": "none"},
    "no experts, rank-16 LoRA of text behind a picture": {"visual_expert": "none", "text_rank": 16},
    "experts, and that LoRA": {"text_rank": 16},
    "experts in the MLP only": {"visual_expert": "mlp"},
    "experts in every fourth layer": {"expert_every": 4},
    "experts of rank 4": {"expert_rank": 4},
    "one position for all tokens of a picture": {"image_positions": "shared"},
    "positions of RoPE-Tie": {"image_positions": "rope_tie"},
    "tokens of a picture see each other": {"image_attention": "full"},
}
"""Changes to nano's configuration (without corrections of text, as in the recipe)."""

Figures = dict[str, float]


def start(folder: Path) -> Path:
    """The shipped tower and adapter, without experts."""
    path = folder / "start.safetensors"
    if not path.exists():
        shipped = read_safetensors(resolve("nano") / "model.safetensors")
        vision = {k: v for k, v in shipped.items() if k.startswith("model.vision.")}
        save_tensors(vision, path)
    return path


def settings(variant: str, seed: int, steps: int, init: Path) -> list[str]:
    """Changes to the recipe."""
    changes = [f"config.{key}={value}" for key, value in VARIANTS[variant].items()]
    schedule = {"steps": steps, "warmup": max(1, steps // 6), "eval_every": steps + 1}
    changes += [f"schedule.{key}={value}" for key, value in schedule.items()]
    data = {"batch_size": 8, "pool_size": 64, "workers": 0}
    changes += [f"data.{key}={value}" for key, value in data.items()]
    return [*changes, "tower_lr=0", f"seed={seed}", f"init=[{init}]"]


def measure(variant: str, seed: int, steps: int, out: Path) -> Figures:
    """Train one variant and ask it about held-out lines."""
    recipe = recipes.load(RECIPE, settings(variant, seed, steps, out / "start.safetensors"))
    loop = prepare(recipe, out / f"{list(VARIANTS).index(variant)}-{seed}")
    objective = loop.objective
    assert isinstance(objective, AnswerObjective)
    learnt = sum(p.numel() for p in loop.trainable().values())
    losses = []
    for batch in objective.batches(0):
        if len(losses) == steps:
            break
        losses.append(loop.one_step(batch)["loss"])
    return {
        "learnt_millions": learnt / 1e6,
        "train_loss": fmean(losses[-10:]),
        "held_out_loss": held_out_loss(objective),
        "cer": objective.evaluate()["cer"],
    }


@torch.inference_mode()
def held_out_loss(objective: AnswerObjective) -> float:
    """Nats a word piece of the answers about held-out lines."""
    total, count = 0.0, 0
    for index in range(HELD_OUT_POOLS):
        for batch in objective.eval_pools.pool(index):
            inputs = objective.inputs(batch, objective.prompts[0], answers=True)
            pieces = int((inputs["labels"] != -100).sum())
            total += pieces * float(objective.trained(**inputs).loss)
            count += pieces
    return total / count


def in_a_process(variant: str, seed: int, args: argparse.Namespace) -> Figures:
    """The figures of a variant: of an earlier run, or of one in a process with one thread."""
    kept = args.out / f"{list(VARIANTS).index(variant)}-{seed}.json"
    if not kept.exists():
        command = [sys.executable, __file__, str(args.out), "--steps", str(args.steps)]
        command += ["--one", variant, "--seeds", str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{variant!r}, seed {seed} ended with {done.returncode}, see above")
        write_whole(kept, done.stdout.splitlines()[-1].encode())
        print(f"{variant}, seed {seed}: {kept.read_text()}", file=sys.stderr, flush=True)
    figures: Figures = json.loads(kept.read_text())
    return figures


def table(results: Mapping[str, Sequence[Figures]]) -> str:
    """A row for each variant: every seed's loss, and means."""
    lines = [
        "| variant | learns (M) | held-out loss, by seed | mean | CER, mean |",
        "|---|---|---|---|---|",
    ]
    for variant, runs in results.items():
        losses = [run["held_out_loss"] for run in runs]
        each = ", ".join(f"{loss:.2f}" for loss in losses)
        cer = fmean(run["cer"] for run in runs)
        learnt = runs[0]["learnt_millions"]
        lines.append(f"| {variant} | {learnt:.1f} | {each} | {fmean(losses):.2f} | {cer:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """All variants, or with ``--one`` a single one in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of results; those that it has are kept")
    parser.add_argument("--steps", type=int, default=60, help="of 8 lines")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=VARIANTS)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start(args.out)
    if args.one:
        print(json.dumps(measure(args.one, args.seeds[0], args.steps, args.out)))
        return
    variants = args.only or list(VARIANTS)
    with ThreadPoolExecutor(args.jobs) as pool:
        asked = {
            (variant, seed): pool.submit(in_a_process, variant, seed, args)
            for seed in args.seeds
            for variant in variants
        }
    results = {v: [asked[v, seed].result() for seed in args.seeds] for v in variants}
    print(table(results))
    facts: dict[str, Any] = {"commit": commit(), "machine": machine(), "steps": args.steps}
    print(json.dumps({"benchmark": "ablation", **facts, "results": results}))


if __name__ == "__main__":
    main()
