"""What a run of stage "tune" will need, before anything is loaded.

Weights, gradients, optimiser and mean are exact.  What a step takes beside them is counted
(:mod:`.count`) for a piece as large as it can be: rows as long as the longest of the data
(:mod:`.lengths`), else of ``max_tokens``, or of one picture, 512 tokens in and 512 out.  Measured
against runs by ``benchmarks/train_memory.py``, what two processes divide (:mod:`.shards`) too.
"""

from __future__ import annotations

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
from .count import MOMENTS, Moment, Shape, Way, fresh, quantised, step
from .lengths import Row, Rows
from .loop import is_hidden_matrix
from .recipe import TuneRecipe
from .shards import own, shards
from .sight import is_head
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
    processes: int = 1  # each with such a device
    rows: Rows | None = None  # what is known of the data

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


def parse_memory(text: str) -> tuple[devices.Device, int]:
    """A card of so much memory, and how many: ``24GB``, ``80e9``, ``8x24GiB``.

    Raises:
        InputError: no such amount.

    >>> card, count = parse_memory("8x24GB")
    >>> card.room, count
    (24000000000.0, 8)
    """
    units = {"gib": 2.0**30, "gb": 1e9, "g": 1e9, "": 1.0}
    times, _, amount = text.strip().lower().rpartition("x")
    unit = next(u for u in units if amount.endswith(u))
    try:
        size, count = float(amount.removesuffix(unit)) * units[unit], int(times or "1")
    except ValueError:
        size = count = 0
    if not 1e6 <= size < 1e15 or count < 1:
        raise InputError(
            f"--device-memory {text!r}: give an amount such as 24GB, or 8x24GB for eight devices"
        )
    return devices.Device("cuda:0", "cuda", size / 1e9), count


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


def plan(
    recipe: TuneRecipe, device: devices.Device, processes: int = 1, rows: Rows | None = None
) -> Plan:
    """Count what a recipe needs on a device.

    Args:
        recipe: what is trained.
        device: of one process.
        processes: that train together.
        rows: of the data, where these are known.

    Raises:
        ConfigError: values that cannot train, or a row that holds no text beside its picture.
        InputError: a model that nothing is known about.
    """
    config, stored = configuration(recipe.model)
    precision = stored or _precision(recipe, config, device)
    plain = precision == "float32"
    compute = recipe.compute if recipe.compute != "auto" else "fp32" if plain else "bf16"
    cuda, several = device.kind == "cuda", processes > 1
    cut = several and recipe.parallel in ("zero2", "fsdp")
    tensor = several and recipe.parallel == "tensor"
    if (cut or tensor) and precision not in _DTYPES:
        raise ConfigError(
            f"parallel {recipe.parallel}: {precision} cannot be cut over processes; take ddp, or "
            "precision bfloat16"
        )
    # Shares are put together in the numbers of the computation, what trains among them.
    gathered = torch.bfloat16 if cut and compute == "bf16" else None
    share = processes if tensor else 1
    made = partial(
        _made, recipe=recipe, precision=precision, cuda=cuda, gathered=gathered, share=share
    )
    shape = _shape(recipe, config, rows)
    # Where rows are divided, gradients are there from the beginning: as buckets, or counted as if.
    way = Way(compute, (several and not tensor) or _pieces(recipe) > 1, cuda)
    found = _counted(config, made, shape, way)
    whole = _made(config, recipe, precision, cuda, share=share)
    stays, trained = _standing(whole, config, recipe, precision)
    moments = {name: int(found[name].peak) for name in MOMENTS}
    sizes = [p.numel() for p in whole.parameters() if p.requires_grad]
    # Accelerators update all parameters together, the CPU one after the other.
    moments["update"] = 4 * trained + (4 * trained if cuda else 8 * max(sizes, default=0))
    item = 4 if compute == "fp32" else 2
    answers = memory.prefill_bytes(config, shape.rows * shape.tokens, item)
    cache = memory.cache_bytes(config, shape.rows * shape.tokens, item)
    moments["measuring"] = answers + cache + (4 * trained if recipe.schedule.ema else 0)
    before = (2 if gathered else 4) * trained if way.accumulates else 0
    kept = _kept(found, before)
    known = (recipe, precision, compute, device, shape, stays, 4 * trained, kept, moments)
    one = Plan(*known, processes, rows)
    return _divided(one, made(config), whole, before) if cut else one


def at(found: Plan, shape: Shape) -> Plan:
    """The same plan for pieces of another shape."""
    row = Row(shape.tokens, shape.answers, shape.images, shape.image_tokens, *shape.side)
    alike = Rows(row, row, 1, 1)
    return plan(found.recipe, found.device, found.processes, alike)


def _divided(one: Plan, model: CogVLMForCausalLM, whole: CogVLMForCausalLM, before: int) -> Plan:
    """The plan of one of several processes that divide what one would hold alone.

    Args:
        one: of a process that holds all, its gradients there from the beginning.
        model: in the numbers of the computation.
        whole: as it is loaded, what trains in float32.
        before: gradients that are counted in every moment of ``one``.
    """
    pieces = shards(model, one.recipe.parallel, _one_size(model.config))
    stays = {key: -(-size // one.processes) for key, size in one.stays.items()}
    gradients = -(-one.gradients // one.processes)
    moments = {}
    for name, size in one.moments.items():
        if name == "update":
            moments[name] = -(-size // one.processes)
        elif name == "measuring":
            mean = one.gradients if one.recipe.schedule.ema else 0
            moments[name] = size - mean + mean // one.processes + pieces.whole
        else:
            backward = pieces.gradient if "backward" in name else 0
            moments[name] = size - before + gradients + pieces.whole + backward
    dtype = _DTYPES[one.precision]
    loaded = sum(p.numel() for p in whole.parameters()) * dtype.itemsize
    moments["loading"] = max(0, loaded - sum(stays.values()))
    return replace(one, stays=stays, gradients=gradients, moments=moments)


def _one_size(config: Any) -> bool:
    return getattr(config.vision, "grid", "square") == "square"


_COUNTED: dict[str, dict[str, Moment]] = {}  # counting takes seconds, and most plans are alike


def _counted(config: FamilyConfig, made: Any, shape: Shape, way: Way) -> dict[str, Moment]:
    """The same as :func:`cogvlm.train.count.step`, once."""
    recipe: TuneRecipe = made.keywords["recipe"]
    decides = (recipe.parts, recipe.lora, recipe.checkpointing, recipe.image_loss > 0)
    rest = {key: value for key, value in made.keywords.items() if key != "recipe"}
    key = repr((config.to_dict(), decides, rest, shape, way))
    if key not in _COUNTED:
        _COUNTED[key] = step(config, made, shape, way)
    return _COUNTED[key]


def _kept(found: dict[str, Moment], before: int) -> dict[str, int]:
    """What lies there at the end of the forward pass, beside ``before``: earlier gradients."""
    tower, decoder = found["tower"].end, found["decoder"].end
    parts = {
        "tower": tower - before,
        "decoder": decoder - tower,
        "loss": found["loss"].peak - decoder,
    }
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
    config: FamilyConfig,
    recipe: TuneRecipe,
    precision: str,
    cuda: bool,
    gathered: torch.dtype | None = None,
    share: int = 1,
) -> CogVLMForCausalLM:
    """A model without memory as the stage makes it ready.

    All of it in ``gathered``, if given; of so many processes that cut its layers, one's share.
    """
    model = fresh(config, _DTYPES.get(precision, torch.bfloat16))
    if precision not in _DTYPES:
        quantised(model, precision, cuda)
    make_ready(model, replace(recipe, compile=False))  # compiled layers keep no more
    if share > 1:
        own(model, share)
    return model if gathered is None else model.to(gathered)  # type: ignore[arg-type]


def _shape(recipe: TuneRecipe, config: FamilyConfig, rows: Rows | None = None) -> Shape:
    """The largest piece of a step."""
    if rows is None:
        return _guessed(recipe, config)
    row = rows.usual if recipe.packing else rows.longest
    if not recipe.packing:
        # Of rows that nobody has looked at, max_tokens is what is known.
        length = row.tokens if rows.all else recipe.max_tokens or row.tokens
        return _of(row, recipe.batch_size, length)
    assert recipe.max_tokens is not None
    count = max(1, recipe.max_tokens // row.tokens)
    many = replace(row, images=count * row.images, answers=count * row.answers)
    return replace(_of(many, 1, recipe.max_tokens), packed=max(2, count))


def usual(recipe: TuneRecipe, rows: Rows) -> Shape | None:
    """A piece of usual rows, where it is another than the largest."""
    return None if recipe.packing else _of(rows.usual, recipe.batch_size, rows.usual.tokens)


def _of(row: Row, count: int, length: int) -> Shape:
    text = max(2, length - row.images * row.image_tokens)
    answers = max(1, min(row.answers, text - 1))
    return Shape(count, row.images, row.image_tokens, text, answers, (row.height, row.width))


def _guessed(recipe: TuneRecipe, config: FamilyConfig) -> Shape:
    """Of rows that nothing is known about."""
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
        elif is_head(name):
            add("image head", "float32", 4 * size)
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
