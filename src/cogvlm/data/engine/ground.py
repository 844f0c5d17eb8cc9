"""Pages before a ground full of things, as a sign in a street or a receipt on a desk is seen."""

from __future__ import annotations

import contextlib

from PIL import Image, ImageFilter

from .. import surface
from . import words
from .objects import Thing, picture_of, things
from .step import Box, Random, Refused, Truth

KINDS = ("paragraph", "list", "sign", "table", "form", "receipt")
"""Pages that are found in photographs."""
_PRINT = frozenset(("symbols", "roadsigns"))  # folders of stamps that the truth would lack


def before_things(
    image: Image.Image, truth: Truth, rng: Random, held_out: bool = False
) -> tuple[Image.Image, Truth]:
    """A page in a larger picture, with drawings and photographs of things all around it.

    Args:
        image: the page, RGB.
        truth: what is on it.
        rng: all chance comes from here.
        held_out: of the things that training never sees.

    Raises:
        Refused: this machine has no things.
    """
    wide, high = (round(side * rng.uniform(1.15, 1.6)) for side in image.size)
    size = max(wide, -(-high // 6)), max(high, -(-wide // 6))
    ground = covered(size, rng, held_out)
    x, y = (int(rng.integers(0, a - b + 1)) for a, b in zip(size, image.size, strict=True))
    ground.paste(image, (x, y))

    def moved(box: Box) -> Box:
        return box[0] + x, box[1] + y, box[2] + x, box[3] + y

    return ground, truth.moved(moved)


def covered(size: tuple[int, int], rng: Random, held_out: bool = False) -> Image.Image:
    """Things that lie over one another, some out of focus; ``size`` is width and height.

    Raises:
        Refused: this machine has no things.
    """
    known = [thing for thing in things(held_out) if not _PRINT.intersection(_parts(thing))]
    if not known:
        raise Refused("no objects on this side")
    light = rng.uniform(90, 255) - 90 * surface.clouds((size[1], size[0]), rng, 3)
    image = surface.picture(light)
    cell = max(size) / rng.uniform(2.5, 6)
    across, down = (int(side // cell) + 1 for side in size)
    for place in words.several(rng, range(across * down), across * down):
        thing, corner = words.pick(rng, known), (place % across * cell, place // across * cell)
        with contextlib.suppress(Refused):  # an empty drawing leaves its place as it is
            _paste(image, picture_of(thing), corner, cell, rng)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5)))


def _parts(thing: Thing) -> tuple[str, ...]:
    return thing.path.parts if thing.path is not None else ()


def _paste(
    image: Image.Image, drawing: Image.Image, corner: tuple[float, float], cell: float, rng: Random
) -> None:
    """Larger than its cell, a little turned, about there."""
    scale = rng.uniform(1.0, 1.8) * cell / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.BICUBIC)
    drawing = drawing.rotate(rng.uniform(-40, 40), Image.Resampling.BICUBIC, expand=True)
    x, y = (int(at + rng.uniform(-0.5, 0.2) * cell) for at in corner)
    image.paste(drawing, (x, y), drawing)
