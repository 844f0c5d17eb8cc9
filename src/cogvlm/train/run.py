"""A recipe file to a finished run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..errors import ConfigError
from ..load import pick
from . import log
from . import recipe as recipes
from .compute import Compute
from .distributed import Shared, World, own_device, processes, share, started
from .instruct import InstructObjective
from .loop import Loop, Objective, Placed
from .stages import STAGES
from .tune import TuneObjective, compute, tune


def objective(recipe: recipes.Recipe | recipes.TuneRecipe, world: World | None = None) -> Objective:
    """The objective of a recipe's stage.

    Args:
        recipe: of any stage.
        world: the processes that divide the rows of a step, none for one.

    Raises:
        ConfigError: no such stage.
        ResourceError: no such device.
    """
    if isinstance(recipe, recipes.TuneRecipe):
        return tune(recipe, world)
    if recipe.stage not in STAGES:
        raise ConfigError(f"stage {recipe.stage!r} is not one of {', '.join(STAGES)}, tune")
    return STAGES[recipe.stage](recipe, pick(recipe.device))


def _enough(count: int, what: str, processes: int) -> None:
    """Refuse processes that would have nothing to do in a step."""
    if count < processes:
        raise ConfigError(
            f"a step of {count} {what} for {processes} processes; give each one at least"
        )


def _check(recipe: recipes.TuneRecipe, processes: int) -> None:
    """Refuse what several processes cannot do."""
    rows = recipe.batch_size * recipe.accumulate
    if recipe.parallel != "tensor":
        _enough(rows, "rows (batch_size times accumulate)", processes)
    if recipe.image_loss:
        raise ConfigError("image_loss is for one process; leave it out, or torchrun")
    if recipe.compile and recipe.parallel == "tensor":
        raise ConfigError("parallel tensor: its layers are not compiled; leave compile out")


def prepare(
    recipe: recipes.Recipe | recipes.TuneRecipe, out: Path, world: World | None = None
) -> Loop:
    """The loop of a recipe, at its first step; arguments as :func:`objective`."""
    world = world or World()
    if isinstance(recipe, recipes.TuneRecipe) and world.size > 1:
        _check(recipe, world.size)
    torch.manual_seed(recipe.seed)
    made = objective(recipe, world)
    numbers: Compute | None = None
    shared: Shared | None = None
    trackers: list[log.Tracker] = []
    if isinstance(recipe, recipes.TuneRecipe):
        assert isinstance(made, TuneObjective)
        numbers = compute(recipe, made)
        shared = share(made.trained, recipe.parallel, world, numbers.kind)
        made.forward, made.apart = shared.forward, shared.apart
        if world.first:
            trackers = log.trackers(recipe.track, out, recipe.name)
    elif isinstance(made, InstructObjective):
        _enough(made.pages.data.per_step + 1, "parts (pages.per_step, and lines)", world.size)
        shared = share(made.trained, "ddp", world, "fp32")
        made.forward, made.world = shared.forward, world
    return Loop(made, recipe.schedule, out, recipe.seed, numbers, trackers, shared)


def run(path: Path, overrides: list[str], out: Path | None, resume: bool) -> Path:
    """Train what ``path`` says into ``out`` (default ``runs/NAME``); returns ``out``.

    A checkpoint found in ``out`` is taken up unless ``resume`` is false.  Under ``torchrun`` this
    is one process of several.

    Raises:
        ConfigError: what a recipe asks for is impossible, also with so many processes.
        ResourceError: another process has ended.
    """
    recipe = recipes.load(path, overrides)
    if started() > 1 and recipe.stage not in ("instruct", "tune"):
        raise ConfigError(
            f"stage {recipe.stage!r} trains in one process; start it without torchrun"
        )
    recipe = replace(recipe, device=own_device(recipe.device))
    with processes(recipe.device) as world:
        loop = prepare(recipe, out or Path("runs") / recipe.name, world)
        if resume and loop.resume():
            print(f"resuming {loop.out} at step {loop.step} of {recipe.schedule.steps}", flush=True)
        _compare(loop)
        loop.run()
    return loop.out


def _compare(loop: Loop) -> None:
    """Refuse processes that do not stand at one place: on several machines, that happens."""
    place = loop.objective.position(loop.step) if isinstance(loop.objective, Placed) else {}
    told = loop.world.gather((loop.step, place))
    for rank, one in enumerate(told):
        if one != told[0]:
            raise ConfigError(
                f"process {rank} stands at step {one[0]} with data {one[1]}, process 0 at step "
                f"{told[0][0]} with {told[0][1]}: data and --out must be the same on all machines"
            )
