"""Where a picture has ink: print in any colours, without the rules, frames and curves about it.

Knows nothing about lines of print.  ``H, W`` pixels of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Ink = NDArray[np.bool_]  # bool[H, W]: an edge is here
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels
Ints = NDArray[np.int64]

_LARGEST = 200  # shapes that are looked into


def ink_of(image: Image.Image, least: float = 0.3) -> Ink:
    """Where the picture's brightness jumps: print, in any colours on any smooth ground.

    Args:
        least: the jump, as a share of what the strongest hundredth is.
    """
    grey = np.asarray(image.convert("L"), dtype=np.int16)
    edge = np.zeros(grey.shape, np.int16)
    edge[:, 1:] = np.abs(np.diff(grey, axis=1))
    edge[1:] = np.maximum(edge[1:], np.abs(np.diff(grey, axis=0)))
    strong = float(np.percentile(edge, 99)) if edge.size else 0.0
    return np.asarray(edge > max(80.0 * least, least * strong))


def without_rules(ink: Ink) -> Ink:
    """Ink without long straight lines: rules, frames, the edges of paper."""
    height, width = ink.shape
    letter = letter_height(ink)
    flat = _runs(ink, max(40, round(min(0.15 * width, 4 * letter))))
    steep = _runs(ink.T, max(40, round(min(0.3 * height, 4 * letter)))).T
    return np.asarray(ink & ~flat & ~steep)


def _runs(ink: Ink, length: int) -> Ink:
    """What belongs to a run of at least ``length`` along a row."""
    height, width = ink.shape
    if length > width:
        return np.zeros_like(ink)
    sums = np.zeros((height, width + 1), np.int32)
    np.cumsum(ink, axis=1, out=sums[:, 1:])
    full = sums[:, length:] - sums[:, :-length] == length  # a run begins here
    begun = np.zeros((height, width + 1), np.int32)
    np.cumsum(full, axis=1, out=begun[:, 1 : full.shape[1] + 1])
    begun[:, full.shape[1] + 1 :] = begun[:, full.shape[1]][:, None]
    before = np.zeros_like(begun)
    before[:, length:] = begun[:, :-length]
    return np.asarray((begun - before)[:, 1:] > 0)


def without_figures(ink: Ink) -> Ink:
    """Ink without what is drawn: thin wide shapes with others inside, strokes higher than print.

    Curves, pies, frames joined by arrows and the sides of boxes are so; letters are not.
    """
    runs = Runs.of(ink)
    if not len(runs.row):
        return ink
    shapes = runs.shapes()
    height, width = shapes.y1 - shapes.y0, shapes.x1 - shapes.x0
    usual = shapes.usual
    sparse = shapes.ink < 0.25 * height * width
    drawn = sparse & (height > 2 * usual) & (shapes.inside() >= 3)
    drawn |= (height > 1.6 * usual) & (width < 0.12 * height)
    left: Ink = ink.copy()
    for k in np.flatnonzero(drawn[runs.shape]):
        left[runs.row[k], runs.start[k] : runs.end[k]] = False
    return left


def frames_of(image: Image.Image) -> list[Box]:
    """Boxes drawn about something: shapes with ink along most of all four sides.

    The edges of a coloured area are such a shape too.  Where a frame has rules from top to bottom,
    as buttons that touch have between them, its parts are frames as well.
    """
    ink = ink_of(image, least=0.12)  # frames are fainter than print
    runs = Runs.of(ink)
    if not len(runs.row):
        return []
    shapes = runs.shapes()
    height, width = shapes.y1 - shapes.y0, shapes.x1 - shapes.x0
    large = (height > 1.5 * shapes.usual) & (width > 1.5 * shapes.usual)
    large &= shapes.ink < 0.4 * height * width
    boxes = np.stack([shapes.x0, shapes.y0, shapes.x1, shapes.y1], 1)[large]
    largest = np.argsort(-(height * width)[large])[:_LARGEST]
    found: list[Box] = [tuple(box) for box in boxes[largest].tolist()]
    frames = [box for box in found if _is_frame(ink, box)]
    return [part for box in frames for part in (box, *_parts(ink, box, shapes.usual))]


def _parts(ink: Ink, box: Box, least: float) -> list[Box]:
    """A frame cut at the rules that cross it from top to bottom; none where there is none."""
    x0, y0, x1, y1 = box
    gaps = (~ink[y0:y1, x0:x1]).sum(axis=0)
    crossed = gaps <= max(1, (y1 - y0) // 50)  # which a text cursor does not
    near = round(least)  # of the sides, which are no rules within
    rules = np.flatnonzero(crossed[near : x1 - x0 - near]) + x0 + near
    if not len(rules):
        return []
    ends = [x0, *rules.tolist(), x1 - 1]
    return [(a, y0, b + 1, y1) for a, b in pairwise(ends) if b - a > 2 * least]


def _is_frame(ink: Ink, box: Box, least: float = 0.7) -> bool:
    x0, y0, x1, y1 = box
    part = ink[y0:y1, x0:x1]
    rim = max(2, min(6, min(part.shape) // 6))  # corners may be round
    sides = part[:rim], part[-rim:], part[:, :rim].T, part[:, -rim:].T
    return all(float(side.any(axis=0).mean()) >= least for side in sides)


def letter_height(ink: Ink) -> float:
    """The usual height of connected ink, about that of a small letter; at least 5 pixels."""
    return Runs.of(ink).shapes().usual if ink.any() else 5.0


@dataclass(frozen=True)
class _Shapes:
    """Connected ink: bounding boxes, and how much of it there is; ``int64[N]`` each."""

    x0: Ints
    y0: Ints
    x1: Ints
    y1: Ints
    ink: Ints

    @property
    def usual(self) -> float:
        """The median height of those that are 5 pixels high or more."""
        height = self.y1 - self.y0
        return float(np.median(height[height >= 5])) if (height >= 5).any() else 5.0

    def inside(self) -> Ints:
        """How many lower shapes are in the box of each, at most half as high."""
        counts = np.zeros_like(self.ink)
        middle_x, middle_y = (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2
        height = self.y1 - self.y0
        large = np.argsort(-height * (self.x1 - self.x0))[:_LARGEST]
        for i in large:
            within = (middle_x > self.x0[i]) & (middle_x < self.x1[i])
            within &= (middle_y > self.y0[i]) & (middle_y < self.y1[i])
            counts[i] = int((within & (2 * height <= height[i]) & (height >= 3)).sum())
        return counts


@dataclass(frozen=True)
class Runs:
    """Runs of ink along rows, ``int64[N]`` each, and the shape that each belongs to."""

    row: Ints
    start: Ints
    end: Ints
    shape: Ints

    @classmethod
    def of(cls, ink: Ink) -> Runs:
        """Of a picture; touching runs of neighbouring rows, also by a corner, are one shape."""
        wide = ink.shape[1] + 2
        padded = np.zeros((ink.shape[0], wide), np.int8)
        padded[:, 1:-1] = ink
        steps = np.diff(padded, axis=1).ravel()  # a row has one place more than columns
        begins, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        row = begins // (wide - 1)
        below = wide - 1
        first = np.searchsorted(ends, begins + below, side="left")
        last = np.searchsorted(begins, ends + below, side="right")
        count = np.maximum(last - first, 0)
        upper = np.repeat(np.arange(len(row)), count)
        lower = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        shape = joined(len(row), upper, lower)
        return cls(row, begins % below, ends % below, shape)

    def shapes(self) -> _Shapes:
        """What the runs make."""
        count = int(self.shape.max()) + 1
        x0, y0 = (np.full(count, 1 << 40) for _ in range(2))
        x1, y1, ink = (np.zeros(count, np.int64) for _ in range(3))
        np.minimum.at(x0, self.shape, self.start)
        np.minimum.at(y0, self.shape, self.row)
        np.maximum.at(x1, self.shape, self.end)
        np.maximum.at(y1, self.shape, self.row + 1)
        np.add.at(ink, self.shape, self.end - self.start)
        return _Shapes(x0, y0, x1, y1, ink)


def joined(count: int, one: Ints, other: Ints) -> Ints:
    """Groups of ``count`` things of which pairs belong together, numbered from 0.

    >>> joined(5, np.array([0, 3]), np.array([2, 4]))
    array([0, 1, 0, 2, 2])
    """
    label = np.arange(count)
    while len(one):
        a, b = label[one], label[other]
        apart = a != b
        if not apart.any():
            break
        one, other, a, b = one[apart], other[apart], a[apart], b[apart]
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(label, label[label]):
            label = label[label]
    return np.asarray(np.unique(label, return_inverse=True)[1], np.int64)
