"""The one training loop and its one step: any objective, exactly resumable.

Knows nothing about pictures, text or experts: an :class:`Objective` brings batches and a loss.
Batch ``i`` is a pure function of the recipe and ``i``, and so is the chance (of dropout) that step
``i`` meets: a run that was killed and resumed sees what the unbroken run would have seen.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, ResourceError
from .average import Average
from .compute import Compute
from .distributed import Shared, alone, cut_along, each, part, share_of, whole
from .log import Log, Tracker
from .muon import Muon


@dataclass(frozen=True)
class Schedule:
    """How a run is optimised; every number is per optimiser step.

    ``lr`` rises linearly over ``warmup`` steps, then follows ``decay`` down to
    ``lr * final`` at ``steps``.  With ``optimizer="muon"`` the matrices inside layers are Muon's,
    the rest is AdamW's, at the same learning rate.

    With ``ema`` the mean of the trained parameters is what is evaluated and exported.  With
    ``keep_best`` that is the state with the lowest held-out loss, else the last one.
    """

    steps: int
    optimizer: str = "adamw"  # adamw | adamw8bit | muon
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
    ema: float = 0.0  # decay a step of the exponential mean; 0: no mean
    keep: int = 1  # checkpoints; all but the last are named after their step
    keep_best: bool = False  # also best.pt, by eval_loss, and export that
    eval_first: bool = False  # before the first step too

    def __post_init__(self) -> None:
        counts = ("steps", "keep", "save_every", "eval_every", "log_every")
        for name in counts:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"schedule: {name} is {value!r}; give 1 or more")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"schedule: ema is {self.ema}; give 0 or more, below 1")
        if self.optimizer not in ("adamw", "adamw8bit", "muon"):
            raise ConfigError(
                f"schedule: optimizer {self.optimizer!r} is not adamw, adamw8bit or muon"
            )
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

    def evaluate(self) -> dict[str, Any]:
        """Figures on material that never trains, plain JSON."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained tensors where the next stage, or the model, reads them."""
        ...


@runtime_checkable
class Placed(Protocol):
    """An objective that says where in its data it stands, and that decays parts differently."""

    def weight_decay(self, name: str) -> float | None:
        """Of a parameter, none for the schedule's."""
        ...

    def position(self, step: int) -> dict[str, Any]:
        """Plain JSON, for the checkpoint made before ``step``."""
        ...

    def resume(self, step: int, position: dict[str, Any]) -> None:
        """Go on from there; raise where the data are others."""
        ...


@dataclass(frozen=True)
class Pieces:
    """A batch that comes in pieces: their losses, and their figures, add up to its own.

    One piece is in memory at a time.
    """

    pieces: Sequence[Any]


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether this is a matrix inside a layer, neither embedding nor head."""
    return parameter.ndim == 2 and ".layers." in name


def optimizers(
    objective: Objective, plan: Schedule, trained: Mapping[str, Tensor]
) -> list[torch.optim.Optimizer]:
    """One for everything that is ``trained``, or two for ``optimizer="muon"``.

    Parameters are grouped by their learning-rate scale; matrices decay, vectors do not.
    """
    groups: dict[tuple[bool, float, float], list[Tensor]] = {}
    for name, parameter in trained.items():
        muon = plan.optimizer == "muon" and is_hidden_matrix(name, parameter)
        own = objective.weight_decay(name) if isinstance(objective, Placed) else None
        decay = plan.weight_decay if own is None else own
        decay = decay if parameter.ndim > 1 else 0.0
        groups.setdefault((muon, objective.lr_scale(name), decay), []).append(parameter)
    sides: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for (muon, scale, decay), params in groups.items():
        sides[muon].append({"params": params, "scale": scale, "weight_decay": decay})
    made: list[torch.optim.Optimizer] = []
    if sides[False]:
        betas = (plan.beta1, plan.beta2)
        adamw = _adamw8bit() if plan.optimizer == "adamw8bit" else torch.optim.AdamW
        made.append(adamw(sides[False], lr=plan.lr, betas=betas))
    if sides[True]:
        made.append(Muon(sides[True], lr=plan.lr))
    return made


def _adamw8bit() -> Any:
    """AdamW whose state is eight bits a number, in blocks of 256; small tensors stay float32."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ResourceError(
            "optimizer adamw8bit needs bitsandbytes: pip install 'cogvlm[adam8]'"
        ) from error
    return AdamW8bit


class Loop:
    """Runs an objective to the end of its schedule, writing ``out`` as it goes.

    ``out`` holds ``log.jsonl`` (a line per ``log_every`` steps), ``checkpoint.pt`` (written
    atomically) and, at the end, ``loss.svg`` and what the objective exports.

    Args:
        objective: what is trained.
        schedule: how.
        out: a folder, made if need be.
        seed: of what chance a step meets.
        compute: in what numbers; none: float32, where the parameters are.
        trackers: that get every figure of the log too.
        shared: how processes share the model; none: there is one.
    """

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        out: Path,
        seed: int = 0,
        compute: Compute | None = None,
        trackers: Sequence[Tracker] = (),
        shared: Shared | None = None,
    ) -> None:
        self.objective, self.schedule, self.out, self.seed = objective, schedule, out, seed
        self.shared = shared or alone(objective.trained)
        self.world = self.shared.world
        self.step = 0
        found = objective.trained.named_parameters()
        self.named = {name: p for name, p in found if p.requires_grad}
        self.mine = {name: share_of(p) for name, p in self.named.items()}
        self.alike = {id(self.mine[k]) for k, p in self.named.items() if cut_along(p) is None}
        self.optimizers = optimizers(objective, schedule, self.mine)
        self.params = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        if not self.params:
            raise ConfigError("nothing trains: give a part or a LoRA a learning rate above 0")
        self.compute = compute or Compute(self.params[0].device)
        self.average = Average(self.trainable(), schedule.ema) if schedule.ema else None
        self.best: float | None = None
        self.sums: dict[str, float] = {}  # of the steps since the last line of the log
        self.count = 0
        out.mkdir(parents=True, exist_ok=True)
        self.log = Log(out, trackers)

    @property
    def checkpoint(self) -> Path:
        """Where the state of an unfinished run is kept."""
        return self.out / "checkpoint.pt"

    def trainable(self) -> dict[str, Tensor]:
        """Name and value of every parameter that trains; of one that is cut, its share here."""
        return {name: p.detach() for name, p in self.mine.items()}

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Values of :meth:`trainable` as if nothing were cut; none except in the first process."""
        first = self.world.first
        return {name: whole(value, self.named[name], first) for name, value in values.items()}

    def _likes(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The model's parameters behind those of an optimiser."""
        behind = {id(mine): self.named[name] for name, mine in self.mine.items()}
        return [behind[id(p)] for group in optimizer.param_groups for p in group["params"]]

    # --- checkpoints ---

    def save(self) -> None:
        """Write the checkpoint; a kill at any moment leaves the old one or the new one.

        It holds whole tensors, whatever the processes hold of them.
        """
        place, first = self.objective, self.world.first
        state = {
            "step": self.step,
            "model": self.whole(self.trainable()),
            "optimizers": [
                each(o.state_dict(), self._likes(o), lambda t, like: whole(t, like, first))
                for o in self.optimizers
            ],
            "average": self.whole(self.average.values) if self.average else {},
            "compute": self.compute.state(),
            "position": place.position(self.step) if isinstance(place, Placed) else {},
            "best": self.best,
            "log": (self.sums, self.count),
        }
        if not first:
            return
        if self.schedule.keep > 1 and self.checkpoint.exists():
            self._put_aside()
        _write(state, self.checkpoint)

    def _put_aside(self) -> None:
        """Give the checkpoint a name of its own; drop those beyond ``keep``."""
        step = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)["step"]
        own = self.out / f"checkpoint-{step:08d}.pt"
        if step != self.step and not own.exists():
            try:
                os.link(self.checkpoint, own)
            except OSError:  # a file system without links
                shutil.copyfile(self.checkpoint, own)
        for old in sorted(self.out.glob("checkpoint-*.pt"))[: 1 - self.schedule.keep]:
            old.unlink()

    def resume(self) -> bool:
        """Take up the checkpoint if there is one; says whether there was.

        Raises:
            CheckpointError: it belongs to another model.
            ConfigError: the data have changed.
        """
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        mine = self.trainable()
        kept = state.get("optimizers", ())
        means = state.get("average", {})
        if (
            set(mine) != set(state["model"])
            or len(kept) != len(self.optimizers)
            or set(means) != (set(mine) if self.average else set())
        ):
            raise CheckpointError(
                f"{self.checkpoint}: made by another model or recipe; choose another --out, "
                "or begin anew with --fresh"
            )
        self._take(self._parts(state["model"]))
        for optimizer, values in zip(self.optimizers, kept, strict=True):
            optimizer.load_state_dict(each(values, self._likes(optimizer), part))
        if self.average:
            self.average.take(self._parts(means))
        self.step = int(state["step"])
        self.compute.resume(state.get("compute", {}))
        if isinstance(self.objective, Placed):
            self.objective.resume(self.step, state["position"])
        self.best = state.get("best")
        self.sums, self.count = state.get("log", ({}, 0))
        return True

    def _parts(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of whole values, what this process holds."""
        return {name: part(value, self.named[name]) for name, value in values.items()}

    def _take(self, values: dict[str, Tensor]) -> None:
        mine = self.trainable()
        with torch.no_grad():
            for name, value in values.items():
                mine[name].copy_(value)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the parameters are their exponential means, where the schedule asks for it."""
        return self.average.used(self.trainable()) if self.average else nullcontext()

    # --- steps ---

    def one_step(self, batch: Any) -> dict[str, float]:
        """Forward and backward of every piece, clip, update."""
        for group in (group for o in self.optimizers for group in o.param_groups):
            group["lr"] = self.schedule.lr * group["scale"] * self.schedule.factor(self.step)
        for p in (*self.params, *self.named.values()):
            p.grad = None
        torch.manual_seed(self.seed * 1_000_003 + self.step + (self.shared.rows.rank << 40))
        figures: dict[str, float] = {"loss": 0.0}
        pieces = batch.pieces if isinstance(batch, Pieces) else (batch,)
        for left, piece in zip(range(len(pieces) - 1, -1, -1), pieces, strict=True):
            with self.shared.piece(last=not left):
                with self.compute.forward():
                    loss, more = self.objective.loss(piece)
                # Engines take the mean of the processes that divide the rows.
                self.compute.backward(loss * self.shared.rows.size)
            for key, value in {"loss": float(loss.detach()), **more}.items():
                figures[key] = figures.get(key, 0.0) + value
        for name, parameter in self.named.items():
            if parameter.grad is not None:
                self.mine[name].grad = share_of(parameter.grad, parameter)
        together = self._norm if self.shared.cut else None
        norm = self.compute.update(self.optimizers, self.params, self.schedule.clip, together)
        if norm is None and self.compute.kind != "fp16":
            raise CheckpointError(
                f"step {self.step}: the gradient is not finite; resume from {self.checkpoint} "
                "with a lower schedule.lr"
            )
        if self.average:
            self.average.add(self.trainable(), self.step)
        self.step += 1
        return {**self.shared.add(figures), "grad_norm": norm or 0.0}

    def _norm(self, learnt: Sequence[Tensor]) -> Tensor:
        """The norm of the gradients of all processes."""
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p in learnt:
            assert p.grad is not None
            sides[id(p) in self.alike].append(p.grad)
        return self.shared.norm(*sides)

    def evaluate(self) -> None:
        """Log the objective's figures on held-out material; keep the state if it is the best."""
        self.objective.trained.eval()
        measuring = self.shared.measuring()
        with torch.no_grad(), self.averaged(), measuring, self.compute.forward():
            figures = self.world.firsts(self.objective.evaluate())
            loss = figures.get("loss")
            if self.schedule.keep_best:
                if loss is None:
                    raise ConfigError("schedule: keep_best needs held-out data; give held_out")
                if self.best is None or loss < self.best:
                    self.best = loss
                    best = self.whole(self.trainable())
                    if self.world.first:
                        _write({"step": self.step, "model": best}, self.out / "best.pt")
        self.objective.trained.train()
        if figures:
            self._log({"step": self.step, **{f"eval_{k}": v for k, v in figures.items()}})

    def run(self) -> None:
        """Train from the current step to the last, then evaluate and export."""
        with self.world.stoppable():
            self._train()
        self.save()
        # It is measured already where a finished run is called again.
        if not self.world.firsts(self.log.measured(self.step)):
            self.evaluate()
        self.finish()

    def _train(self) -> None:
        plan = self.schedule
        if self.world.first:
            self.log.rewind(self.step)
        self.objective.trained.train()
        if plan.eval_first and self.step == 0:
            self.evaluate()
        since, steps = time.monotonic(), 0
        try:
            for batch in self.objective.batches(self.step):
                if self.step >= plan.steps:
                    break
                for key, value in self.one_step(batch).items():
                    self.sums[key] = self.sums.get(key, 0.0) + value
                self.count, steps = self.count + 1, steps + 1
                if self.step % plan.log_every == 0:
                    pace = (time.monotonic() - since) / steps
                    means = {k: v / self.count for k, v in self.sums.items()}
                    left = (plan.steps - self.step) * pace
                    self._log({"step": self.step, **means, "s_step": pace, "left_s": left})
                    self.sums, self.count = {}, 0
                    since, steps = time.monotonic(), 0
                if self.step % plan.eval_every == 0 and self.step < plan.steps:
                    self.evaluate()
                    since, steps = time.monotonic(), 0
                if self.step % plan.save_every == 0 and self.step < plan.steps:
                    self.save()
                if self.world.stop:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            self.save()
            raise

    def finish(self) -> None:
        """Export the best or the last state, averaged if asked, and draw the losses."""
        with self.averaged():
            if self.schedule.keep_best:
                self.world.firsts(None)  # the process that wrote it has done so
                best = torch.load(self.out / "best.pt", map_location="cpu", weights_only=True)
                last = {name: value.clone() for name, value in self.trainable().items()}
                self._take(self._parts(best["model"]))
                self.objective.export(self.out)
                self._take(last)
            else:
                self.objective.export(self.out)
        if self.world.first:
            self.log.close()

    def _log(self, line: dict[str, Any]) -> None:
        if self.world.first:
            self.log(line)


def _write(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
