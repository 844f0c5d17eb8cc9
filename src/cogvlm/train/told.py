"""``cogvlm train --plan`` in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import devices, load
from ..errors import ConfigError
from . import recipe as recipes
from .fit import divided, fitting
from .lengths import look
from .plan import Plan, at, parse_memory, plan, usual
from .recipe import TuneRecipe


def report(path: Path, settings: list[str], device_memory: str | None = None) -> list[str]:
    """What ``cogvlm train --plan`` says of a recipe file, on cards of a size or on what is here.

    Raises:
        ConfigError: a recipe that is wrong, or of another stage.
        InputError: no such amount of memory; a model that nothing is known about.
        ResourceError: no such device.
    """
    recipe = recipes.load(path, settings)
    if not isinstance(recipe, TuneRecipe):
        raise ConfigError(f"{path}: stage {recipe.stage!r} has no --plan; stage tune has")
    device, count = _devices(recipe, device_memory)
    rows = look(recipe)
    known = None if isinstance(rows, str) else rows
    found = plan(recipe, device, count, known)
    why = [f"rows are not looked at: {rows}", ""] if isinstance(rows, str) else []
    return [*why, *describe(found)]


def _devices(recipe: TuneRecipe, device_memory: str | None) -> tuple[devices.Device, int]:
    """One, and how many like it train together."""
    if device_memory is not None:
        return parse_memory(device_memory)
    found = devices.find_devices()
    if recipe.device == "auto":
        kind = found[0].kind
        return found[0], sum(device.kind == kind for device in found)
    place = load.pick(recipe.device)
    names = (str(place), f"{place.type}:{place.index or 0}")
    return next(d for d in found if d.place in names), 1


def describe(found: Plan) -> list[str]:
    """Lines for people: the plan, the same with checkpointing the other way, and what would fit."""
    recipe, shape = found.recipe, found.shape
    other = plan(
        replace(recipe, checkpointing=not recipe.checkpointing),
        found.device,
        found.processes,
        found.rows,
    )
    with_, without = (found, other) if recipe.checkpointing else (other, found)
    pictures = (
        f"{shape.images} picture{'s' * (shape.images != 1)} of {shape.side[1]}x{shape.side[0]}"
    )
    lines = [
        f"{recipe.name}: {recipe.model} in {found.precision}, computed in {found.compute}",
        f"at once: {shape.rows} x {shape.tokens} tokens ({pictures} pixels, {shape.text} of text, "
        f"{shape.answers} learnt); a step is {recipe.batch_size * recipe.accumulate} records",
        *_rows(found),
        *_processes(found),
        "",
        "stays                            GB",
        *(f"  {what:<12}{how:<12}{_gb(size)}" for (what, how), size in found.stays.items()),
        "",
        "a step                           GB   checkpointing  without",
    ]
    labels = {
        "tower": "kept by tower and adapter",
        "decoder": "kept by decoder",
        "loss": "logits and loss",
    }
    for name, label in labels.items():
        lines.append(_row(label, found.kept[name], with_.kept[name], without.kept[name]))
    lines.append(_row("gradients", found.gradients, found.gradients, found.gradients))
    for name in found.moments:
        if any(one.moments[name] for one in (found, other)):
            sizes = (one.moments[name] for one in (found, with_, without))
            lines.append(_row(f"at most, {name}", *sizes))
    lines += ["", _row("peak", found.peak, with_.peak, without.peak)]
    lines.append(_row("with 5 % to spare", found.need, with_.need, without.need))
    return [*lines, "", *_verdict(found)]


def _rows(found: Plan) -> list[str]:
    rows = found.rows
    if rows is None:
        return []
    which = "all" if rows.all else f"the first {rows.looked_at} of"
    line = (
        f"rows: {which} {rows.records} looked at, the longest {rows.longest.tokens} tokens, "
        f"usually {rows.usual.tokens}"
    )
    if (shape := usual(found.recipe, rows)) is not None and shape != found.shape:
        line += f" (peak then {_gb(at(found, shape).peak).strip()} GB)"
    return [line]


def _processes(found: Plan) -> list[str]:
    if found.processes == 1:
        return []
    kind = found.recipe.parallel
    return [f"of {found.processes} processes ({kind}), what each holds:"]


def _verdict(found: Plan) -> list[str]:
    room = f"{found.device.name}, {found.device.room / 1e9:.1f} GB free"
    if found.fits:
        return [f"fits: {room}"]
    settings, smaller = fitting(found)
    options = " ".join(f"--set {setting}" for setting in settings)
    if smaller.fits:
        return [f"does not fit: {room}", f"fits in {smaller.need / 1e9:.1f} GB with {options}"]
    lines = [f"does not fit: {room}"]
    if settings:
        lines.append(f"still {smaller.need / 1e9:.1f} GB with {options}")
    if (many := divided(found)) is not None:
        lines.append(
            f"{many.processes} such devices hold it, {many.need / 1e9:.1f} GB on each, with --set "
            "parallel=fsdp --set checkpointing=true --set batch_size=1"
        )
    else:
        lines.append(
            "no number of such devices holds it: each loads the model before it is divided"
        )
    return lines


def _row(label: str, *sizes: int) -> str:
    first, *rest = (_gb(size) for size in sizes)
    return f"  {label:<24}{first}" + "".join(f"{text:>14}" for text in rest)


def _gb(size: int) -> str:
    return f"{size / 1e9:>9.3f}" if size < 1e8 else f"{size / 1e9:>9.2f}"
