"""A run that is killed in the middle and one that is not leave the same losses and weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvlm.errors import ConfigError
from cogvlm.train import recipe as recipes
from cogvlm.train.loop import Loop
from cogvlm.train.run import prepare, run
from train import toys

ROOT = Path(__file__).parents[2]
PLAN = {
    "lora": {"targets": ["experts.qkv", "tower"], "rank": 4, "dropout": 0.3},
    "parts": {"adapter": {}},
    "accumulate": 2,
    "batch_size": 2,
    "eval_count": 2,
    "eval_answers": 0,
}
SCHEDULE = {"steps": 10, "ema": 0.8, "log_every": 3, "save_every": 4, "eval_every": 5}


def write(place: Path, name: str, **changes: object) -> Path:
    labels = place / "data" / "labels.jsonl"
    return toys.write_recipe(place / name, place / "model", labels, **{**PLAN, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    toys.write_model(folder / "model")
    toys.write_data(folder / "data")
    return folder


def test_killed_and_resumed_is_the_unbroken_run_to_the_last_digit(place: Path) -> None:
    recipe = write(place, "r.yaml", schedule=SCHEDULE)
    whole = run(recipe, [], place / "whole", True)
    broken = place / "broken"
    command = [sys.executable, "-m", "cogvlm.cli", "train", str(recipe), "--out", str(broken)]
    child = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = broken / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and '"step": 6' in log.read_text()):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (broken / "adapter_model.safetensors").exists()
    loop = prepare(recipes.load(recipe), broken)
    assert loop.resume() and 4 <= loop.step < 10
    loop.run()
    for key in ("loss", "eval_loss", "grad_norm"):
        assert toys.losses(broken, key) == toys.losses(whole, key)
        assert len(toys.losses(broken, key)) >= 2
    for name in ("adapter_model.safetensors", "parts.safetensors"):
        wanted, found = load_file(whole / name), load_file(broken / name)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[n], found[n]) for n in wanted)


def prepared(place: Path, out: Path, **changes: object) -> Loop:
    return prepare(recipes.load(write(place, f"{out.name}.yaml", **changes)), out)


def test_changed_data_are_refused_and_a_changed_batch_goes_on(place: Path, tmp_path: Path) -> None:
    first = prepared(place, tmp_path / "a")
    for batch, _ in zip(first.objective.batches(0), range(3), strict=False):
        first.one_step(batch)
    first.save()
    other = prepared(place, tmp_path / "a", seed=9)
    with pytest.raises(ConfigError, match="the data have changed since the checkpoint: seed"):
        other.resume()
    larger = prepared(place, tmp_path / "a", accumulate=3)
    assert larger.resume() and larger.step == 3
    assert larger.objective.position(3)["next"] == 12  # type: ignore[attr-defined]
    assert larger.objective.position(4)["next"] == 18  # type: ignore[attr-defined]


def test_checkpoints_are_kept_by_rule_and_the_best_is_exported(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"steps": 8, "keep": 2, "keep_best": True, "save_every": 2, "eval_every": 2}
    loop = prepared(place, tmp_path / "a", schedule=schedule)
    name = "model.vision.linear_proj.gate_proj.weight"
    seen = {}

    def evaluate() -> dict[str, float]:
        seen[loop.step] = loop.trainable()[name].clone()
        return {"loss": {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0}[loop.step]}

    monkeypatch.setattr(loop.objective, "evaluate", evaluate)
    loop.run()
    files = {p.name for p in loop.out.glob("*.pt")}
    assert files == {"checkpoint.pt", "checkpoint-00000006.pt", "best.pt"}
    assert torch.load(loop.out / "best.pt", weights_only=True)["step"] == 4
    exported = load_file(loop.out / "parts.safetensors")[name]
    assert torch.equal(exported, seen[4]) and not torch.equal(seen[4], seen[8])
    assert torch.equal(loop.trainable()[name], seen[8])
    again = prepared(place, tmp_path / "a", schedule=schedule)
    assert again.resume() and again.best == 1.0
    again.run()  # of a finished run: nothing is trained, measured or logged a second time
    assert list(toys.losses(loop.out, "eval_loss")) == [2, 4, 6, 8]
