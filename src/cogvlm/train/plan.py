"""What a run of stage "tune" will need, before anything is loaded; and what would make it fit.

Weights, gradients, optimiser and mean are exact.  What a step takes beside them is counted
(:mod:`.count`) for a piece as large as the recipe allows: rows of ``max_tokens``, or of one
picture, 512 tokens in and 512 out.  Measured against runs by ``benchmarks/train_memory.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import adapter, catalog, devices, load, memory, quantize
from ..config import CogVLMConfig, FamilyConfig
from ..errors import ConfigError, InputError
from ..hub import resolve
from ..models.cogvlm import CogVLMForCausalLM
from . import recipe as recipes
from .count import MOMENTS, Moment, Shape, Way, fresh, quantised, step
from .loop import is_hidden_matrix
from .recipe import TuneRecipe
from .tune import make_ready

TEXT = 1024  # tokens of a row beside its pictures, where the recipe does not say; half are learnt
FRAMES = 24  # of a film
_SPARE = 1.05  # what allocator and driver lose; the same as for answers
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STATE = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}  # bytes a number; a scale for 256 of each


@dataclass(frozen=True)
class Plan:
    """Bytes of one device.

    ``stays`` is there all the time, by what it is and in which numbers; ``moments`` come on top,
    one after the other.
    """

    recipe: TuneRecipe
    precision: str
    compute: str
    device: devices.Device
    shape: Shape
    stays: dict[tuple[str, str], int]
    gradients: int
    kept: dict[str, int]  # what lies between forward and backward
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        """At the widest moment, of what is counted."""
        return sum(self.stays.values()) + max(self.moments.values())

    @property
    def need(self) -> int:
        """The same, and a twentieth for what is not."""
        return int(self.peak * _SPARE)

    @property
    def fits(self) -> bool:
        """Whether the device has room."""
        return self.need <= self.device.room


def parse_memory(text: str) -> devices.Device:
    """A card of so much memory: ``24GB``, ``80e9``, ``24GiB``.

    Raises:
        InputError: no such amount.

    >>> parse_memory("24GB").room
    24000000000.0
    """
    units = {"gib": 2.0**30, "gb": 1e9, "g": 1e9, "": 1.0}
    lower = text.strip().lower()
    unit = next(u for u in units if lower.endswith(u))
    try:
        size = float(lower.removesuffix(unit)) * units[unit]
    except ValueError:
        size = 0.0
    if not 1e6 <= size < 1e15:
        raise InputError(f"--device-memory {text!r}: give an amount such as 24GB")
    return devices.Device("cuda:0", "cuda", size / 1e9)


def configuration(name: str) -> tuple[FamilyConfig, str | None]:
    """The configuration of a model by its name alone, and what it is quantised to, if it is.

    Raises:
        InputError: neither in the catalog nor a folder on this disk.
    """
    try:
        entry = catalog.find(name)
        return entry.config(), "int4" if entry.stored == "fp4" else None
    except InputError:
        if name != "nano" and not Path(name).expanduser().is_dir():
            raise InputError(
                f"model {name!r} is neither a folder here nor in the catalog (cogvlm models); "
                "--plan fetches nothing"
            ) from None
    return load.configuration(resolve(name))


def plan(recipe: TuneRecipe, device: devices.Device) -> Plan:
    """Count what a recipe needs on a device.

    Raises:
        ConfigError: values that cannot train, or a row that holds no text beside its picture.
        InputError: a model that nothing is known about.
    """
    config, stored = configuration(recipe.model)
    precision = stored or _precision(recipe, config, device)
    plain = precision == "float32"
    compute = recipe.compute if recipe.compute != "auto" else "fp32" if plain else "bf16"
    cuda = device.kind == "cuda"
    made = partial(_made, recipe=recipe, precision=precision, cuda=cuda)
    shape = _shape(recipe, config)
    found = step(config, made, shape, Way(compute, _pieces(recipe) > 1, cuda))
    whole = made(config)
    stays, trained = _standing(whole, config, recipe, precision)
    moments = {name: int(found[name].peak) for name in MOMENTS}
    sizes = [p.numel() for p in whole.parameters() if p.requires_grad]
    # Accelerators update all parameters together, the CPU one after the other.
    moments["update"] = 4 * trained + (4 * trained if cuda else 8 * max(sizes, default=0))
    item = 4 if compute == "fp32" else 2
    answers = memory.prefill_bytes(config, shape.rows * shape.tokens, item)
    cache = memory.cache_bytes(config, shape.rows * shape.tokens, item)
    moments["measuring"] = answers + cache + (4 * trained if recipe.schedule.ema else 0)
    kept = _kept(found, shape)
    return Plan(recipe, precision, compute, device, shape, stays, 4 * trained, kept, moments)


def _kept(found: dict[str, Moment], shape: Shape) -> dict[str, int]:
    tower, decoder = found["tower"].end, found["decoder"].end
    parts = {"tower": tower, "decoder": decoder - tower, "loss": found["loss"].peak - decoder}
    return {name: int(value) for name, value in parts.items()}


def _pieces(recipe: TuneRecipe) -> int:
    """In how many pieces a step comes at least, so far as that is known."""
    return 2 if recipe.packing else recipe.accumulate


def _precision(recipe: TuneRecipe, config: FamilyConfig, device: devices.Device) -> str:
    """As loading chooses."""
    names = {"fp32": "float32", "bf16": "bfloat16"}
    asked = names.get(recipe.precision, recipe.precision)
    if asked != "auto":
        known = (*memory.PRECISIONS, "nf4")
        if asked not in known:
            raise ConfigError(f"precision {asked!r} is not one of {', '.join(known)}")
        return asked
    needs = memory.needs(config)
    found = memory.choose(needs, [device])
    return found[1] if found else min(memory.MIXES[device.kind], key=needs.__getitem__)


def _made(
    config: FamilyConfig, recipe: TuneRecipe, precision: str, cuda: bool
) -> CogVLMForCausalLM:
    """A model without memory as the stage makes it ready."""
    model = fresh(config, _DTYPES.get(precision, torch.bfloat16))
    if precision not in _DTYPES:
        quantised(model, precision, cuda)
    make_ready(model, recipe)
    return model


def _shape(recipe: TuneRecipe, config: FamilyConfig) -> Shape:
    made: Any = config
    vision = made.vision
    film = isinstance(config, CogVLMConfig) and config.visual_expert == "none"
    side = recipe.side or vision.image_size
    rows, columns = side // vision.patch_size, side // vision.patch_size
    if getattr(vision, "grid", "square") == "native":
        rows, columns = vision.table_grid
    tall, wide = vision.token_grid(rows, columns)
    image = tall * wide + 2
    images = FRAMES if film else 1
    marks = images if film else 0  # a time in the text after each frame
    one = images * image + marks + TEXT
    length = recipe.max_tokens or one
    text = length - images * image
    if text < 2 + marks:
        raise ConfigError(
            f"max_tokens {length} holds no text beside {images * image} image tokens; give "
            f"{one} for 512 tokens in and 512 out"
        )
    pixels = (rows * vision.patch_size, columns * vision.patch_size)
    if not recipe.packing:
        return Shape(recipe.batch_size, images, image, text, text // 2, pixels)
    count = max(1, length // one)
    text = length - count * images * image
    return Shape(1, count * images, image, text, text // 2, pixels, max(2, count))


def _standing(
    model: CogVLMForCausalLM, config: FamilyConfig, recipe: TuneRecipe, precision: str
) -> tuple[dict[tuple[str, str], int], int]:
    """What stays, and how many numbers train."""
    groups = {} if precision in _DTYPES else quantize.plan(fresh(config, torch.bfloat16), precision)
    found: dict[tuple[str, str], int] = {}

    def add(what: str, how: str, size: float) -> None:
        found[what, how] = found.get((what, how), 0) + int(size)

    trained = matrices = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if parameter.requires_grad:
            trained += size
            matrices += size if is_hidden_matrix(name, parameter) else 0
        if adapter.is_lora(name):
            add("LoRA", "float32", 4 * size)
        elif (plain := adapter.plain_name(name)) in groups:
            how, bits = quantize.stored_as(groups[plain], *parameter.shape)
            add(memory.part_of(plain), how, bits)
        else:
            how = str(parameter.dtype).removeprefix("torch.")
            add(memory.part_of(plain), how, parameter.element_size() * size)
    kind = recipe.schedule.optimizer
    states = _STATE.get(kind, 8.0) * trained - (4 * matrices if kind == "muon" else 0)
    add("optimiser", kind, states)
    if recipe.schedule.ema:
        add("mean", "float32", 4 * trained)
    return found, trained


# --- what would fit ---


def changes(recipe: TuneRecipe, precision: str, device: devices.Device) -> Iterator[list[str]]:
    """Settings that make a run smaller, those that change its outcome least first."""
    if not recipe.checkpointing:
        yield ["checkpointing=true"]
    size, times = recipe.batch_size, recipe.accumulate
    while size > 1 and not recipe.packing:
        least = next(d for d in range(2, size + 1) if size % d == 0)
        size, times = size // least, times * least
        yield [f"batch_size={size}", f"accumulate={times}"]
    if recipe.schedule.optimizer == "adamw" and recipe.parallel == "ddp":
        yield ["schedule.optimizer=adamw8bit"]
    whole = any(part.lr > 0 for part in recipe.parts.values())
    mixes = memory.MIXES[device.kind]
    smaller = mixes[mixes.index(precision) + 1 :] if precision in mixes else ()
    for name in smaller:
        if name == "bfloat16" or not whole:
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
    return plan(changed(first.recipe, settings), first.device)


# --- said ---


def report(path: Path, settings: list[str], device_memory: str | None = None) -> list[str]:
    """What ``cogvlm train --plan`` says of a recipe file, on a card of a size or on what is here.

    Raises:
        ConfigError: a recipe that is wrong, or of another stage.
        InputError: no such amount of memory; a model that nothing is known about.
        ResourceError: no such device.
    """
    recipe = recipes.load(path, settings)
    if not isinstance(recipe, TuneRecipe):
        raise ConfigError(f"{path}: stage {recipe.stage!r} has no --plan; stage tune has")
    return describe(plan(recipe, _device(recipe, device_memory)))


def _device(recipe: TuneRecipe, device_memory: str | None) -> devices.Device:
    if device_memory is not None:
        return parse_memory(device_memory)
    found = devices.find_devices()
    if recipe.device == "auto":
        return found[0]
    place = load.pick(recipe.device)
    return next(d for d in found if d.place in (str(place), f"{place.type}:{place.index or 0}"))


def describe(found: Plan) -> list[str]:
    """Lines for people: the plan, the same with checkpointing the other way, and what would fit."""
    recipe, shape = found.recipe, found.shape
    other = plan(replace(recipe, checkpointing=not recipe.checkpointing), found.device)
    with_, without = (found, other) if recipe.checkpointing else (other, found)
    pictures = (
        f"{shape.images} picture{'s' * (shape.images > 1)} of {shape.side[1]}x{shape.side[0]}"
    )
    lines = [
        f"{recipe.name}: {recipe.model} in {found.precision}, computed in {found.compute}",
        f"at once: {shape.rows} x {shape.tokens} tokens ({pictures} pixels, {shape.text} of text, "
        f"{shape.answers} learnt); a step is {recipe.batch_size * recipe.accumulate} records",
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
    stays = sum(found.stays.values()) + found.gradients
    beside = max(0, smaller.need - int(_SPARE * (sum(smaller.stays.values()) + smaller.gradients)))
    if (room_left := found.device.room - beside) > 0:
        count = -(-int(stays * _SPARE) // int(room_left))
        lines.append(
            f"about {max(2, count)} such devices hold it with --set parallel=fsdp --set "
            "checkpointing=true, one row on each"
        )
    return lines


def _row(label: str, *sizes: int) -> str:
    first, *rest = (_gb(size) for size in sizes)
    return f"  {label:<24}{first}" + "".join(f"{text:>14}" for text in rest)


def _gb(size: int) -> str:
    return f"{size / 1e9:>9.3f}" if size < 1e8 else f"{size / 1e9:>9.2f}"
