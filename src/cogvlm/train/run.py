"""A recipe file to a finished run."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ConfigError
from ..load import pick
from . import log
from . import recipe as recipes
from .compute import Compute
from .loop import Loop, Objective
from .stages import STAGES
from .tune import TuneObjective, compute, tune


def objective(recipe: recipes.Recipe | recipes.TuneRecipe) -> Objective:
    """The objective of a recipe's stage.

    Raises:
        ConfigError: no such stage.
        ResourceError: no such device.
    """
    if isinstance(recipe, recipes.TuneRecipe):
        return tune(recipe)
    if recipe.stage not in STAGES:
        raise ConfigError(f"stage {recipe.stage!r} is not one of {', '.join(STAGES)}, tune")
    return STAGES[recipe.stage](recipe, pick(recipe.device))


def prepare(recipe: recipes.Recipe | recipes.TuneRecipe, out: Path) -> Loop:
    """The loop of a recipe, at its first step."""
    torch.manual_seed(recipe.seed)
    made = objective(recipe)
    numbers: Compute | None = None
    trackers: list[log.Tracker] = []
    if isinstance(recipe, recipes.TuneRecipe):
        assert isinstance(made, TuneObjective)
        numbers = compute(recipe, made)
        trackers = log.trackers(recipe.track, out, recipe.name)
    return Loop(made, recipe.schedule, out, recipe.seed, numbers, trackers)


def run(path: Path, overrides: list[str], out: Path | None, resume: bool) -> Path:
    """Train what ``path`` says into ``out`` (default ``runs/NAME``); returns ``out``.

    A checkpoint found in ``out`` is taken up unless ``resume`` is false.
    """
    recipe = recipes.load(path, overrides)
    loop = prepare(recipe, out or Path("runs") / recipe.name)
    if resume and loop.resume():
        print(f"resuming {loop.out} at step {loop.step} of {recipe.schedule.steps}", flush=True)
    loop.run()
    return loop.out
