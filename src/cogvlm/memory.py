"""How much memory a model needs, from shapes alone: nothing is loaded.

Weights are exact.  Keys and values are exact.  What a prompt needs on its way through is an
estimate: the widest moment of the tower and of the decoder, by shape, with an attention kernel
that never holds a matrix of scores.

Number formats: int8 has one float32 scale a row, int4 a bfloat16 scale and zero for every 128
weights; with int4 the tower and the adapter are int8, with int4-all they are int4 too, as
:mod:`cogvlm.quantize` makes them.  All apply to the matrices of linear layers; the embedding, the
head, convolutions, norms, biases and tables stay in bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from .catalog import Checkpoint
from .config import FamilyConfig
from .devices import Device
from .errors import InputError
from .models.build import skeleton
from .models.parts import TOKENS

PRECISIONS = ("float32", "bfloat16", "int8", "int4", "int4-all")
MIXES = {
    "cpu": PRECISIONS,
    "cuda": PRECISIONS[1:],
    "mps": ("bfloat16", "int8"),  # torchao has no kernel of int4 there
}
"""What ``--precision auto`` tries on a kind of device, the most exact first."""

_SIGHT = ("tower", "adapter")  # int8 where the decoder is int4
GROUP = 128  # weights that share a scale and a zero in int4
PROMPT = 2048  # tokens of text and answer counted beside one image
PARTS = ("tower", "adapter", "experts", "cross", "language", "embedding", "head")
_BYTES = {"float32": 4, "bfloat16": 2}
# Weights, caches and activations are not all: the driver's own share and what lies between blocks.
_SPARE = 1.05

_PART_OF = (  # the first that is found in a tensor's name
    (r"^lm_head\.|\.output_layer\.", "head"),
    (r"embed_tokens|word_embeddings", "embedding"),
    (r"\.vision\.(linear_proj|conv|qformer|boi|eoi)", "adapter"),
    (r"\.(cross_)?vision\.", "tower"),
    (r"cross_attn|post_cross_attention", "cross"),
    (r"vision_expert_|\.vision_mlp\.", "experts"),
)


def part_of(name: str) -> str:
    """Which of :data:`PARTS` a tensor belongs to."""
    return next((part for pattern, part in _PART_OF if re.search(pattern, name)), "language")


@dataclass(frozen=True)
class Size:
    """Parameters of a part, so far as formats treat them differently."""

    matrices: int = 0  # weights of linear layers
    rows: int = 0  # of them: rows, a scale each in int8
    groups: int = 0  # of them: groups of 128 in a row, a scale and a zero each in int4
    others: int = 0  # what is never quantised

    def __add__(self, other: Size) -> Size:
        return Size(
            self.matrices + other.matrices,
            self.rows + other.rows,
            self.groups + other.groups,
            self.others + other.others,
        )

    def __mul__(self, times: int) -> Size:
        return Size(
            self.matrices * times, self.rows * times, self.groups * times, self.others * times
        )

    def __sub__(self, other: Size) -> Size:
        return self + other * -1

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return self.matrices + self.others

    def bytes(self, precision: str) -> int:
        """In memory, in one of :data:`PRECISIONS`.

        Raises:
            InputError: another precision.
        """
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        if precision == "int8":
            return self.matrices + 4 * self.rows + 2 * self.others
        if precision in ("int4", "int4-all"):
            return (self.matrices + 1) // 2 + 4 * self.groups + 2 * self.others
        return _BYTES[precision] * self.parameters


def held_bytes(part: str, size: Size, precision: str) -> int:
    """What a part takes in a model loaded in ``precision``."""
    return size.bytes("int8" if precision == "int4" and part in _SIGHT else precision)


def size_of(name: str, shape: tuple[int, ...]) -> Size:
    """Of one tensor."""
    part = part_of(name)
    linear = name.endswith(".weight") and len(shape) == 2 and "embed" not in name
    if linear and part != "head":
        rows, columns = shape
        return Size(prod(shape), rows, rows * -(-columns // GROUP), 0)
    return Size(others=prod(shape))


def weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Size]:
    """Parameters by part, parts without any left out."""
    found: dict[str, Size] = {}
    for name, shape in shapes:
        found[part_of(name)] = found.get(part_of(name), Size()) + size_of(name, shape)
    return {part: found[part] for part in PARTS if part in found}


def parts_of(config: FamilyConfig) -> dict[str, Size]:
    """Parameters by part of a whole model.

    All layers of a kind are alike, so skeletons of one and two layers tell what a thousand need.
    """
    made: Any = config
    if getattr(made, "expert_every", 1) != 1:
        return weights(parameter_shapes(skeleton(config)))
    one, decoder, tower = (
        weights(parameter_shapes(skeleton(shallow(config, *layers))))
        for layers in ((1, 1), (2, 1), (1, 2))
    )
    found = {}
    for part, base in one.items():
        more = (decoder[part] - base) * (made.num_hidden_layers - 1)
        found[part] = base + more + (tower[part] - base) * (made.vision.num_hidden_layers - 1)
    return found


def shallow(config: FamilyConfig, layers: int, tower_layers: int) -> FamilyConfig:
    """The same model with other numbers of layers."""
    changed: Any = deepcopy(config)
    changed.num_hidden_layers = layers
    changed.vision.num_hidden_layers = tower_layers
    return changed  # type: ignore[no-any-return]


def parameter_shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters, shared ones once."""
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def image_tokens(config: FamilyConfig) -> int:
    """Tokens of one square image of the model's own size, markers included."""
    vision: Any = config.vision
    side = vision.image_size // vision.patch_size
    rows, columns = vision.token_grid(side, side)
    return int(rows * columns) + 2


def cache_bytes(config: FamilyConfig, tokens: int, item: int = 2) -> int:
    """Keys and values of so many tokens, ``item`` bytes a number.

    CogAgent also keeps those of its large picture.
    """
    made: Any = config
    numbers = 2 * made.num_hidden_layers * made.num_key_value_heads * made.head_dim * tokens
    if cross := getattr(made, "cross_vision", None):
        numbers += 2 * made.num_hidden_layers * made.cross_compute_hidden_size * cross.side**2
    return int(numbers * item)


def prefill_bytes(config: FamilyConfig, tokens: int, item: int = 2) -> int:
    """Estimate of the widest moment while one image and ``tokens`` in all are read.

    Tower and decoder, which do not meet: input and residual, and queries, keys, values and what
    attention makes of them, or the MLP before and after its activation (in the decoder gate, its
    activation, up and their product), of as many tokens as go through it together.

    Args:
        config: of the model.
        tokens: image and text together.
        item: bytes a number.
    """
    made: Any = config
    vision = made.vision
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    tower = patches * 2 * vision.hidden_size + max(
        patches * 4 * vision.hidden_size, min(patches, TOKENS) * 2 * vision.intermediate_size
    )
    tower += vision.in_channels * vision.image_size**2
    decoder = tokens * 2 * made.hidden_size + max(
        tokens * 4 * made.hidden_size, min(tokens, TOKENS) * 4 * made.intermediate_size
    )
    wide = max(tower, decoder)
    if cross := getattr(made, "cross_vision", None):
        wide = max(wide, (cross.side**2 + 1) * (2 * cross.width + 4 * cross.inner))
    return int(wide * item + 4 * made.vocab_size)


@dataclass(frozen=True)
class Need:
    """What a model needs to answer about one image, in bytes."""

    weights: int
    cache: int
    prefill: int

    @property
    def total(self) -> int:
        """All of it, and a twentieth for what is not counted."""
        return int((self.weights + self.cache + self.prefill) * _SPARE)


def need(config: FamilyConfig, parts: dict[str, Size], precision: str) -> Need:
    """Memory for one image and :data:`PROMPT` tokens beside it, in ``precision``."""
    item = 4 if precision == "float32" else 2
    tokens = image_tokens(config) + PROMPT
    held = sum(held_bytes(part, size, precision) for part, size in parts.items())
    return Need(held, cache_bytes(config, tokens, item), prefill_bytes(config, tokens, item))


def needs(config: FamilyConfig) -> dict[str, int]:
    """Bytes in all that each of :data:`PRECISIONS` needs, see :func:`need`."""
    parts = parts_of(config)
    return {precision: need(config, parts, precision).total for precision in PRECISIONS}


def choose(
    needs: Mapping[str, int], devices: Iterable[Device], only: str | None = None
) -> tuple[Device, str] | None:
    """The first device with room, and the most exact precision that fits its free memory.

    Args:
        needs: bytes by precision, see :func:`needs`.
        devices: in order of preference: any precision on the first goes before the second.
        only: the one precision that comes into question, on any device.
    """
    for device in devices:
        for precision in (only,) if only else MIXES[device.kind]:
            if needs[precision] <= device.room:
                return device, precision
    return None


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """All figures of a checkpoint, ready for JSON: parameters and bytes by part, needs, terms."""
    config = checkpoint.config()
    parts = parts_of(config)
    needs = {precision: need(config, parts, precision) for precision in PRECISIONS}
    return {
        **_terms(checkpoint),
        "parameters": {part: size.parameters for part, size in parts.items()},
        "bytes": {
            p: {part: held_bytes(part, size, p) for part, size in parts.items()} for p in PRECISIONS
        },
        "needs": {
            precision: {"cache": n.cache, "prefill": n.prefill, "total": n.total}
            for precision, n in needs.items()
        },
    }


def _terms(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "architecture": checkpoint.architecture,
        "purpose": checkpoint.purpose,
        "loadable": checkpoint.loadable,
        "licence": checkpoint.licence.name,
        "research": checkpoint.licence.research,
        "commercial": checkpoint.licence.commercial,
        "also": checkpoint.licence.also,
    }


def table(checkpoints: Iterable[Checkpoint], devices: Iterable[Device]) -> list[dict[str, Any]]:
    """:func:`describe` of each, and where it fits.

    ``device`` and ``precision`` say what :func:`choose` takes, which is what loading does; where
    nothing fits, both are none and ``reason`` says so.  What is stored in fp4 stays so, and is
    counted as int4, which takes a little more.
    """
    devices = list(devices)
    known: dict[str, dict[str, Any]] = {}
    rows = []
    for checkpoint in checkpoints:
        key = f"{checkpoint.architecture} {dict(checkpoint.changes)}"
        if key not in known:
            known[key] = describe(checkpoint)
        figures = known[key]
        rows.append({**figures, **_terms(checkpoint), **_where(checkpoint, figures, devices)})
    return rows


def _where(
    checkpoint: Checkpoint, figures: dict[str, Any], devices: list[Device]
) -> dict[str, Any]:
    totals = {precision: need["total"] for precision, need in figures["needs"].items()}
    small = checkpoint.stored == "fp4"
    found = choose(totals, devices, "int4" if small else None)
    if found is None:
        return {"device": None, "precision": None, "reason": "no"}
    device, precision = found
    held = checkpoint.stored if small else precision
    return {"device": device.name, "precision": held, "reason": ""}
