"""Letters in photographs: shapes darker or lighter than their ground that stand beside each other.

Print on paper has edges and its ground has none (``ink.py``).  In a photograph all has edges, and
what tells the letters of a sign is that a letter keeps its shape whatever the threshold of
brightness (extremal regions that are stable, Matas et al., BMVC 2002), and that others of about its
height stand to its left and right.  ``H, W`` pixels of the picture, ``N`` shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .ink import Ink, Ints, Runs, joined

_SIDE = 1024  # pixels; larger pictures are made smaller to look for letters
_GRAIN = 3  # levels by which neighbours differ where a ground is even
_STEP = 12  # levels of brightness between thresholds
_STABLE = 3  # thresholds in a row at which a shape is the same
_LEAST = 8  # pixels that a letter is high
_MOST = 2000  # shapes that are compared with each other


def is_photograph(image: Image.Image) -> bool:
    """Whether a picture has no page's ground: 0.6 of about one brightness, or 0.75 even."""
    grey = image.convert("L")
    counts = np.array(grey.histogram(), np.float64)
    if np.convolve(counts, np.ones(25)).max() >= 0.6 * counts.sum():
        return False
    levels = np.asarray(grey, np.int16)
    steps = np.maximum(np.abs(np.diff(levels, axis=0))[:, 1:], np.abs(np.diff(levels))[1:])
    return not steps.size or bool((steps <= _GRAIN).mean() < 0.75)


def beside(letters: Ink, height: float) -> Ink:
    """Letters of a height and what is next to them: 0.4 of it above and below, all of it beside."""
    wide = _grown(letters, round(height))
    return np.asarray(_grown(wide.T, round(0.4 * height)).T)


def _grown(mask: Ink, reach: int) -> Ink:
    """What is at most so many columns beside something."""
    sums = np.cumsum(np.pad(mask, ((0, 0), (reach + 1, reach))), axis=1, dtype=np.int32)
    return np.asarray(sums[:, 2 * reach + 1 :] > sums[:, : mask.shape[1]])


def letters_of(image: Image.Image) -> tuple[Ink, float]:
    """Where letters are that stand in rows, and their usual height; 0 where there are none."""
    grey = image.convert("L")
    scale = min(1.0, _SIDE / max(grey.size))
    if scale < 1:
        size = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
        grey = grey.resize(size, Image.Resampling.BOX)
    levels = np.asarray(grey, np.int16)
    ink = np.zeros(levels.shape, np.bool_)
    heights: list[int] = []
    for dark in (True, False):
        signed = levels if dark else 255 - levels
        shapes = _apart(_stable(signed))
        for k in np.flatnonzero(_in_rows(shapes.box)):
            x0, y0, x1, y1 = shapes.box[k]
            ink[y0:y1, x0:x1] |= signed[y0:y1, x0:x1] < shapes.level[k]
            heights.append(int(y1 - y0))
    if scale < 1:
        whole = Image.fromarray(ink).resize(image.size, Image.Resampling.NEAREST)
        ink = np.asarray(whole, np.bool_)
    return ink, float(np.median(heights)) / scale if heights else 0.0


@dataclass(frozen=True)
class _Shapes:
    """Shapes that are darker than ``level``: ``int64[N, 4]`` boxes, ``int64[N]`` the others."""

    box: Ints
    level: Ints
    age: Ints  # thresholds at which the shape was the same

    def __getitem__(self, chosen: NDArray[np.generic]) -> _Shapes:
        return _Shapes(self.box[chosen], self.level[chosen], self.age[chosen])


def _stable(grey: NDArray[np.int16]) -> _Shapes:
    """Shapes like letters that are the same at some thresholds in a row."""
    found = [_Shapes(np.zeros((0, 4), np.int64), *np.zeros((2, 0), np.int64))]
    before: tuple[Ints, Ints, Ints] | None = None  # boxes, ages, and a place in each shape
    for level in range(24, 240, _STEP):
        mask = grey < level
        runs = Runs.of(mask)
        if not len(runs.row):
            continue
        shapes = runs.shapes()
        box = np.stack([shapes.x0, shapes.y0, shapes.x1, shapes.y1], 1)
        age = np.ones(len(box), np.int64)
        if before is not None:  # a shape of the last threshold is within one of this
            label = np.zeros(grey.size, np.int64)
            label[np.flatnonzero(mask)] = np.repeat(runs.shape, runs.end - runs.start)
            around = label[before[2]]
            room = np.maximum(2, (box[:, 3] - box[:, 1])[around] // 8)
            same = np.abs(box[around] - before[0]).max(axis=1) <= room
            np.maximum.at(age, around[same], before[1][same] + 1)
        first = np.zeros(len(box), np.int64)
        first[runs.shape[::-1]] = (runs.row * grey.shape[1] + runs.start)[::-1]
        before = box, age, first
        good = _like_letters(box, shapes.ink, grey.shape) & (age >= _STABLE)
        found.append(_Shapes(box[good], np.full(good.sum(), level), age[good]))
    return _Shapes(
        np.concatenate([f.box for f in found]),
        np.concatenate([f.level for f in found]),
        np.concatenate([f.age for f in found]),
    )


def _like_letters(box: Ints, ink: Ints, shape: tuple[int, ...]) -> Ink:
    """Whole, neither tiny nor as high as the picture, of a letter's proportions: ``bool[N]``."""
    x0, y0, x1, y1 = box.T
    high, wide = y1 - y0, x1 - x0
    good = (high >= _LEAST) & (high < 0.6 * shape[0])
    good &= (wide < 1.7 * high) & (wide > 0.08 * high)
    good &= (ink > 0.12 * high * wide) & (ink < 0.97 * high * wide)
    inner = (x0 > 0) & (y0 > 0) & (x1 < shape[1]) & (y1 < shape[0])
    return np.asarray(good & inner)


def _apart(shapes: _Shapes) -> _Shapes:
    """Of shapes that overlap, the one that stayed the longest."""
    shapes = shapes[np.argsort(-shapes.age, kind="stable")[:_MOST]]
    area = (shapes.box[:, 2] - shapes.box[:, 0]) * (shapes.box[:, 3] - shapes.box[:, 1])
    left = np.ones(len(area), np.bool_)
    kept = []
    for k in range(len(area)):
        if left[k]:
            kept.append(k)
            low = np.maximum(shapes.box[:, :2], shapes.box[k, :2])
            high = np.minimum(shapes.box[:, 2:], shapes.box[k, 2:])
            both = np.clip(high - low, 0, None).prod(axis=1)
            left &= both <= 0.6 * np.minimum(area, area[k])
    return shapes[np.array(kept, np.int64)]


def _in_rows(box: Ints) -> Ink:
    """Which boxes have others beside them, three or more in a row: ``bool[N]``."""
    x0, y0, x1, y1 = box.T
    high = y1 - y0
    tall, low = np.maximum.outer(high, high), np.minimum.outer(high, high)
    beside = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0) >= 0.6 * low
    gap = np.maximum.outer(x0, x0) - np.minimum.outer(x1, x1)
    near = beside & (tall <= 2 * low) & (gap <= tall) & (gap >= -0.3 * low)
    row = joined(len(box), *np.nonzero(np.triu(near, 1)))
    found = np.zeros(len(box), np.bool_)
    for number in np.flatnonzero(np.bincount(row, minlength=1) >= 3):
        mine = np.flatnonzero(row == number)
        usual = float(np.median(high[mine]))
        wide = x1[mine].max() - x0[mine].min()
        middle = (y0 + y1)[mine] / 2
        across = (x0 + x1)[mine] / 2
        line = np.polyval(np.polyfit(across, middle, 1), across)
        found[mine] = wide >= 1.5 * usual and np.abs(middle - line).mean() <= 0.25 * usual
    return found
