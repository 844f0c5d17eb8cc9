"""What would make a plan fit: settings of the recipe, or more devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .. import devices, memory
from ..errors import ConfigError
from . import recipe as recipes
from .plan import Plan, plan
from .recipe import TuneRecipe

MOST = 1024  # devices


def changes(recipe: TuneRecipe, precision: str, device: devices.Device) -> Iterator[list[str]]:
    """Settings that make a run smaller, those that change its outcome least first."""
    if not recipe.checkpointing:
        yield ["checkpointing=true"]
    size, times = recipe.batch_size, recipe.accumulate
    while size > 1 and not recipe.packing:
        least = next(d for d in range(2, size + 1) if size % d == 0)
        size, times = size // least, times * least
        yield [f"batch_size={size}", f"accumulate={times}"]
    whole = any(part.lr > 0 for part in recipe.parts.values())
    if recipe.schedule.optimizer == "adamw" and recipe.parallel == "ddp":
        yield ["schedule.optimizer=adamw8bit"]
    mixes = memory.MIXES[device.kind]
    smaller = mixes[mixes.index(precision) + 1 :] if precision in mixes else ()
    for name in smaller:
        if name == "bfloat16" or not (whole or recipe.compile or recipe.parallel != "ddp"):
            yield [f"precision={name}"]
    if recipe.schedule.ema:
        yield ["schedule.ema=0"]


def changed(recipe: TuneRecipe, settings: list[str]) -> TuneRecipe:
    """The recipe with some of the settings of :func:`changes`."""
    values: dict[str, Any] = {}
    recipes.override(values, settings)
    schedule = replace(recipe.schedule, **values.pop("schedule", {}))
    return replace(recipe, schedule=schedule, **values)


def fitting(first: Plan) -> tuple[list[str], Plan]:
    """The fewest settings that make a plan fit, or all there are where none does, and the result.

    They are added one after another until it fits; those that are not needed then are taken back.
    """
    taken: list[list[str]] = []
    found = first
    for settings in changes(first.recipe, first.precision, first.device):
        taken = [one for one in taken if one[0].split("=")[0] != settings[0].split("=")[0]]
        taken.append(settings)
        found = _with(first, taken)
        if found.fits:
            break
    if found.fits:
        for settings in list(taken[:-1]):
            fewer = [one for one in taken if one is not settings]
            if (smaller := _with(first, fewer)).fits:
                taken, found = fewer, smaller
    return [setting for settings in taken for setting in settings], found


def _with(first: Plan, taken: list[list[str]]) -> Plan:
    settings = [setting for one in taken for setting in one]
    return plan(changed(first.recipe, settings), first.device, first.processes, first.rows)


def divided(first: Plan) -> Plan | None:
    """The plan with ``fsdp`` over the fewest devices of this size, 2, 4, 8, ..., that fits.

    Checkpointing, one row at a time on each.  None where no number of them does.
    """
    recipe = replace(
        first.recipe,
        parallel="fsdp",
        checkpointing=True,
        batch_size=1,
        schedule=replace(first.recipe.schedule, optimizer="adamw"),
    )
    try:
        if not plan(recipe, first.device, MOST, first.rows).fits:
            return None
    except ConfigError:  # quantised weights
        return None
    for power in range(1, MOST.bit_length()):
        if (found := plan(recipe, first.device, 2**power, first.rows)).fits:
            break
    return found
