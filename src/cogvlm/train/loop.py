"""The one training loop and its one step: any objective, exactly resumable.

Knows nothing about pictures, text or experts: an :class:`Objective` brings batches and a loss.
Batch ``i`` is a pure function of the recipe and ``i``, so a run that was killed and resumed sees
what the unbroken run would have seen.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from .muon import Muon


@dataclass(frozen=True)
class Schedule:
    """How a run is optimised; every number is per optimiser step.

    ``lr`` rises linearly over ``warmup`` steps, then follows ``decay`` down to
    ``lr * final`` at ``steps``.  With ``optimizer="muon"`` the matrices inside layers are Muon's,
    the rest is AdamW's, at the same learning rate.
    """

    steps: int
    optimizer: str = "adamw"  # adamw | muon
    lr: float = 1e-3
    warmup: int = 200
    decay: str = "cosine"  # cosine | linear | constant
    final: float = 0.02
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    save_every: int = 250
    eval_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"schedule: steps is {self.steps}; give 1 or more")
        if self.optimizer not in ("adamw", "muon"):
            raise ConfigError(f"schedule: optimizer {self.optimizer!r} is not adamw or muon")
        if self.decay not in ("cosine", "linear", "constant"):
            raise ConfigError(f"schedule: decay {self.decay!r} is not cosine, linear or constant")

    def factor(self, step: int) -> float:
        """Learning rate of ``step`` (from 0) as a fraction of ``lr``.

        >>> s = Schedule(steps=10, warmup=2, final=0.0)
        >>> [round(s.factor(i), 2) for i in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.04]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        curve = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return self.final + (1 - self.final) * curve


class Objective(Protocol):
    """What a stage of training brings to the loop."""

    @property
    def trained(self) -> nn.Module:
        """Holds every parameter that may train; frozen ones need no gradient."""
        ...

    def batches(self, start: int) -> Iterator[Any]:
        """Batches ``start``, ``start + 1``, ... without end."""
        ...

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The scalar to minimise, and figures for the log."""
        ...

    def lr_scale(self, name: str) -> float:
        """What the learning rate is multiplied with for the parameter ``name``."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures on material that never trains."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained tensors where the next stage, or the model, reads them."""
        ...


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether this is a matrix inside a layer, neither embedding nor head."""
    return parameter.ndim == 2 and ".layers." in name


def optimizers(objective: Objective, plan: Schedule) -> list[torch.optim.Optimizer]:
    """One for everything, or two for ``optimizer="muon"``.

    Parameters are grouped by their learning-rate scale; matrices decay, vectors do not.
    """
    groups: dict[tuple[bool, float, float], list[Tensor]] = {}
    for name, parameter in objective.trained.named_parameters():
        if parameter.requires_grad:
            muon = plan.optimizer == "muon" and is_hidden_matrix(name, parameter)
            decay = plan.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((muon, objective.lr_scale(name), decay), []).append(parameter)
    sides: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for (muon, scale, decay), params in groups.items():
        sides[muon].append({"params": params, "scale": scale, "weight_decay": decay})
    made: list[torch.optim.Optimizer] = []
    if sides[False]:
        betas = (plan.beta1, plan.beta2)
        made.append(torch.optim.AdamW(sides[False], lr=plan.lr, betas=betas))
    if sides[True]:
        made.append(Muon(sides[True], lr=plan.lr))
    return made


class Loop:
    """Runs an objective to the end of its schedule, writing ``out`` as it goes.

    ``out`` holds ``log.jsonl`` (a line per ``log_every`` steps), ``checkpoint.pt`` (written
    atomically) and, at the end, what the objective exports.
    """

    def __init__(self, objective: Objective, schedule: Schedule, out: Path) -> None:
        self.objective, self.schedule, self.out = objective, schedule, out
        self.step = 0
        self.optimizers = optimizers(objective, schedule)
        out.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        """Where the state of an unfinished run is kept."""
        return self.out / "checkpoint.pt"

    def trainable(self) -> dict[str, Tensor]:
        """Name and value of every parameter that trains."""
        named = self.objective.trained.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}

    def save(self) -> None:
        """Write the checkpoint; a kill at any moment leaves the old one or the new one."""
        state = {
            "step": self.step,
            "model": self.trainable(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def resume(self) -> bool:
        """Take up the checkpoint if there is one; says whether there was.

        Raises:
            CheckpointError: it belongs to another model.
        """
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        mine = self.trainable()
        kept = state.get("optimizers", ())
        if set(mine) != set(state["model"]) or len(kept) != len(self.optimizers):
            raise CheckpointError(
                f"{self.checkpoint}: made by another model or recipe; choose another --out, "
                "or begin anew with --fresh"
            )
        with torch.no_grad():
            for name, value in state["model"].items():
                mine[name].copy_(value)
        for optimizer, values in zip(self.optimizers, kept, strict=True):
            optimizer.load_state_dict(values)
        self.step = int(state["step"])
        return True

    def one_step(self, batch: Any) -> dict[str, float]:
        """Forward, backward, clip, update."""
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group in groups:
            group["lr"] = self.schedule.lr * group["scale"] * self.schedule.factor(self.step)
        params = [p for group in groups for p in group["params"]]
        loss, figures = self.objective.loss(batch)
        for p in params:
            p.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, self.schedule.clip)
        if not torch.isfinite(norm):
            raise CheckpointError(
                f"step {self.step}: the gradient is not finite; resume from {self.checkpoint} "
                "with a lower schedule.lr"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return {"loss": float(loss.detach()), "grad_norm": float(norm), **figures}

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to ``log.jsonl`` and print it."""
        line = json.dumps(
            {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
        )
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as f:
            f.write(line + "\n")
        print(line, flush=True)

    def evaluate(self) -> None:
        """Log the objective's figures on held-out material."""
        self.objective.trained.eval()
        with torch.no_grad():
            figures = self.objective.evaluate()
        self.objective.trained.train()
        if figures:
            self.log({"step": self.step, **{f"eval_{k}": v for k, v in figures.items()}})

    def run(self) -> None:
        """Train from the current step to the last, then evaluate and export."""
        plan = self.schedule
        self.objective.trained.train()
        mean: dict[str, float] = {}
        count, since = 0, time.monotonic()
        try:
            for batch in self.objective.batches(self.step):
                if self.step >= plan.steps:
                    break
                for key, value in self.one_step(batch).items():
                    mean[key] = mean.get(key, 0.0) + value
                count += 1
                if self.step % plan.log_every == 0:
                    seconds = time.monotonic() - since
                    left = (plan.steps - self.step) * seconds / count
                    figures = {k: v / count for k, v in mean.items()}
                    self.log(
                        {"step": self.step, **figures, "s_step": seconds / count, "left_s": left}
                    )
                    mean, count, since = {}, 0, time.monotonic()
                if self.step % plan.eval_every == 0 and self.step < plan.steps:
                    self.evaluate()
                    since = time.monotonic()
                if self.step % plan.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        self.save()
        self.evaluate()
        self.objective.export(self.out)
