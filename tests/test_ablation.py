"""The ablation changes what it says, measures pieces and not batches, and runs nothing twice."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from cogvlm.train import recipe as recipes

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("ablation")


def test_every_variant_changes_the_configuration_as_it_says(ablation: ModuleType) -> None:
    nano = recipes.load(ablation.RECIPE).model_config.to_dict()
    for variant, changes in ablation.VARIANTS.items():
        told = ablation.settings(variant, 3, 60, Path("start.safetensors"))
        recipe = recipes.load(ablation.RECIPE, told)
        config = recipe.model_config.to_dict()
        assert {k: v for k, v in config.items() if v != nano[k]} == changes
        assert (recipe.seed, recipe.schedule.steps, recipe.tower_lr) == (3, 60, 0)


def test_the_held_out_loss_is_of_pieces(ablation: ModuleType) -> None:
    class Objective:
        prompts = ("",)
        eval_pools = SimpleNamespace(pool=lambda index: [(1, 1.0), (3, 2.0)])

        def inputs(self, batch: tuple[int, float], prompt: str, answers: bool) -> dict[str, object]:
            assert answers
            labels = torch.full((1, 5), -100)
            labels[0, : batch[0]] = 7
            return {"labels": labels, "loss": batch[1]}

        def trained(self, labels: torch.Tensor, loss: float) -> SimpleNamespace:
            return SimpleNamespace(loss=torch.tensor(loss))

    assert ablation.held_out_loss(Objective()) == pytest.approx((1 * 1.0 + 3 * 2.0) / 4)


def test_what_has_been_run_is_read(
    ablation: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss = iter(np.arange(2.0, 6.0))
    for seed in (1, 2):
        for number in (0, 1):
            figures = {"learnt_millions": 4.4, "held_out_loss": float(next(loss)), "cer": 0.5}
            (tmp_path / f"{number}-{seed}.json").write_text(json.dumps(figures))
    (tmp_path / "start.safetensors").write_bytes(b"")
    # A new run would end with this; the commit is asked for by another module's.
    fresh = SimpleNamespace(run=lambda *a, **k: pytest.fail("run again"), PIPE=-1)
    monkeypatch.setattr(ablation, "subprocess", fresh)
    names = list(ablation.VARIANTS)[:2]
    arguments = [str(tmp_path), "--seeds", "1", "2", "--only", *names]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *arguments])
    ablation.main()
    *rows, last = capsys.readouterr().out.splitlines()
    assert rows[2:] == [
        f"| {names[0]} | 4.4 | 2.00, 4.00 | 3.00 | 0.50 |",
        f"| {names[1]} | 4.4 | 3.00, 5.00 | 4.00 | 0.50 |",
    ]
    assert json.loads(last)["results"][names[1]][0]["held_out_loss"] == 3.0


def test_a_run_that_fails_is_named(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SimpleNamespace(returncode=3, stdout="")
    monkeypatch.setattr(
        ablation, "subprocess", SimpleNamespace(run=lambda *a, **k: failed, PIPE=-1)
    )
    args = argparse.Namespace(out=tmp_path, steps=1)
    variant = next(iter(ablation.VARIANTS))
    with pytest.raises(SystemExit, match="seed 1 ended with 3"):
        ablation.in_a_process(variant, 1, args)
    assert not list(tmp_path.iterdir())
