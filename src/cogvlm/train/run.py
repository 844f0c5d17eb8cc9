"""A recipe file to a finished run."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ConfigError
from ..load import pick
from . import recipe as recipes
from .loop import Loop, Objective
from .stages import STAGES


def objective(recipe: recipes.Recipe) -> Objective:
    """The objective of a recipe's stage.

    Raises:
        ConfigError: no such stage.
        ResourceError: no such device.
    """
    if recipe.stage not in STAGES:
        raise ConfigError(f"stage {recipe.stage!r} is not one of {', '.join(STAGES)}")
    return STAGES[recipe.stage](recipe, pick(recipe.device))


def run(path: Path, overrides: list[str], out: Path | None, resume: bool) -> Path:
    """Train what ``path`` says into ``out`` (default ``runs/NAME``); returns ``out``.

    A checkpoint found in ``out`` is taken up unless ``resume`` is false.
    """
    recipe = recipes.load(path, overrides)
    torch.manual_seed(recipe.seed)
    loop = Loop(objective(recipe), recipe.schedule, out or Path("runs") / recipe.name)
    if resume and loop.resume():
        print(f"resuming {loop.out} at step {loop.step} of {recipe.schedule.steps}", flush=True)
    loop.run()
    return loop.out
