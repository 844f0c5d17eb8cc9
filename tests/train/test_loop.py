"""The loop: a killed and resumed run equals the unbroken one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cogvlm.errors import CheckpointError, ConfigError
from cogvlm.train.loop import Loop, Schedule

PLAN = Schedule(steps=12, lr=0.05, warmup=2, save_every=4, eval_every=6, log_every=3)


class Line:
    """Fits a line; batch ``i`` is a function of ``i``; optionally Ctrl-C at a step."""

    def __init__(self, stop_at: int | None = None, poison_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.trained = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.stop_at, self.poison_at = stop_at, poison_at
        self.exported = False

    def batches(self, start: int) -> Iterator[tuple[int, Tensor]]:
        while True:
            if start == self.stop_at:
                raise KeyboardInterrupt
            yield start, torch.randn(8, 3, generator=torch.Generator().manual_seed(start))
            start += 1

    def loss(self, batch: tuple[int, Tensor]) -> tuple[Tensor, dict[str, float]]:
        index, x = batch
        loss = (self.trained(x)[:, 0] - x.sum(1)).square().mean()
        return (loss * float("nan") if index == self.poison_at else loss), {"rows": 8.0}

    def lr_scale(self, name: str) -> float:
        return 0.5 if name.startswith("0.") else 1.0

    def evaluate(self) -> dict[str, float]:
        return {"norm": float(self.trained[0].weight.norm())}

    def export(self, folder: Path) -> None:
        self.exported = True


def weights(objective: Line) -> Tensor:
    return torch.cat([p.detach().flatten() for p in objective.trained.parameters()])


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_resumed_equals_unbroken(tmp_path: Path, stop_at: int) -> None:
    whole = Line()
    Loop(whole, PLAN, tmp_path / "whole").run()
    broken = Line(stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt):
        Loop(broken, PLAN, tmp_path / "broken").run()
    rest = Line()
    loop = Loop(rest, PLAN, tmp_path / "broken")
    assert loop.resume() and loop.step == stop_at
    loop.run()
    assert rest.exported and not broken.exported
    torch.testing.assert_close(weights(rest), weights(whole), rtol=0, atol=0)


def test_training_lowers_the_loss_and_logs_it(tmp_path: Path) -> None:
    Loop(Line(), PLAN, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [line["step"] for line in lines if "eval_norm" in line] == [6, 12]


def test_learning_rates_follow_the_parts(tmp_path: Path) -> None:
    loop = Loop(Line(), PLAN, tmp_path)
    loop.one_step(next(Line().batches(0)))
    rates = {g["scale"]: g["lr"] for o in loop.optimizers for g in o.param_groups}
    assert rates == {0.5: 0.0125, 1.0: 0.025}  # first of two warm-up steps


def test_a_gradient_that_is_not_finite_stops_with_the_checkpoint_intact(tmp_path: Path) -> None:
    loop = Loop(Line(poison_at=6), PLAN, tmp_path)
    with pytest.raises(CheckpointError, match=r"step 6: the gradient is not finite; resume from"):
        loop.run()
    fresh = Loop(Line(), PLAN, tmp_path)
    assert fresh.resume() and fresh.step == 4
    assert all(p.isfinite().all() for p in fresh.objective.trained.parameters())


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    Loop(Line(), PLAN, tmp_path).save()
    other = Line()
    other.trained = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(CheckpointError, match="made by another model or recipe"):
        Loop(other, PLAN, tmp_path).resume()


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps is 0"):
        Schedule(steps=0)
    with pytest.raises(ConfigError, match="'sawtooth' is not"):
        Schedule(steps=1, decay="sawtooth")


def test_the_mean_is_what_is_measured_and_the_weights_go_on(tmp_path: Path) -> None:
    from dataclasses import replace

    loop = Loop(Line(), replace(PLAN, ema=0.5), tmp_path)
    name = next(iter(loop.trainable()))
    mean = loop.trainable()[name].clone()
    for step, batch in zip(range(4), Line().batches(0), strict=False):
        loop.one_step(batch)
        share = min(0.5, (1 + step) / (10 + step))
        mean = share * mean + (1 - share) * loop.trainable()[name]
    own = loop.trainable()[name].clone()
    with loop.averaged():
        torch.testing.assert_close(loop.trainable()[name], mean)
        assert not torch.equal(loop.trainable()[name], own)
    assert torch.equal(loop.trainable()[name], own)
    loop.save()
    with pytest.raises(CheckpointError, match="made by another model or recipe"):
        Loop(Line(), PLAN, tmp_path).resume()
    again = Loop(Line(), replace(PLAN, ema=0.5), tmp_path)
    assert again.resume()
    with again.averaged():
        torch.testing.assert_close(again.trainable()[name], mean)


def test_lines_of_steps_that_are_made_again_are_forgotten(tmp_path: Path) -> None:
    from cogvlm.train.log import Log

    log = Log(tmp_path)
    for step in (1, 2, 3):
        log({"step": step, "loss": 1.0 / step})
    log.path.write_text(log.path.read_text() + '{"step": 4, "lo')  # torn by a kill
    log.rewind(2)
    assert [line["step"] for line in log.lines()] == [1, 2]
    log.rewind(0)
    assert log.lines() == []


def test_figures_reach_the_trackers(tmp_path: Path) -> None:
    class Notes:
        def __init__(self) -> None:
            self.kept: list[tuple[int, dict[str, float]]] = []
            self.closed = False

        def add(self, step: int, figures: dict[str, float]) -> None:
            self.kept.append((step, figures))

        def close(self) -> None:
            self.closed = True

    notes = Notes()
    Loop(Line(), PLAN, tmp_path, trackers=[notes]).run()
    assert notes.closed and {"loss", "eval_norm"} <= {k for _, f in notes.kept for k in f}
