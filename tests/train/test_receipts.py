"""The recipe that the documents recommend, on nano itself: its loss on held-out pictures falls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cogvlm.train.run import run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_few_steps_on_receipts_lower_the_loss_on_held_out_ones(
    tmp_path: Path, language_model: Path
) -> None:
    receipts = tmp_path / "receipts"
    script = ROOT / "examples" / "make_receipts.py"
    command = [sys.executable, str(script), str(receipts), "--count", "40"]
    subprocess.run(command, check=True, capture_output=True)
    recipe = ROOT / "recipes" / "lora-nano-receipts.yaml"
    few = ["schedule.steps=8", "schedule.eval_every=8", "schedule.warmup=1", "batch_size=4"]
    few += [f"data=[{receipts}]", "eval_answers=0"]
    # Forty pictures hold eight back; what they are read as, after so few steps, says little.
    out = run(
        recipe, [f"data=[{receipts}]", *few, "eval_answers=0"], tmp_path / "run", resume=False
    )
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[0] > 0.7  # it knows totals, but not yet where these shops print them
    assert losses[-1] < 0.6 * losses[0]
