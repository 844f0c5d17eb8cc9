"""Bend a picture as paper and cameras do, and its boxes with it.

One mapping for pixels and boxes: a grid of points of the new picture, each with the point of the
old one that is seen there.  Pillow fills the cells between; a box is mapped by looking its corners
up backwards.  Knows nothing about print.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from .. import surface
from .step import Box, Random, Truth

Floats = npt.NDArray[np.float64]

_CELL = 16  # pixels between points of the grid
_SIDE = 5  # points on each side of a box that are mapped


@dataclass(frozen=True)
class Warp:
    """Where points of a picture come from and go to.

    Args:
        size: of the new picture.
        back: new points to old ones, ``float64[3, 3]``.
        waves: bending added to the old points: ``(ax, ay, kx, ky, phase)`` a wave, in pixels and
            per pixel.
    """

    size: tuple[int, int]
    back: Floats
    waves: tuple[tuple[float, float, float, float, float], ...] = ()

    def source(self, points: Floats) -> Floats:
        """Old points seen at new ones, ``float64[..., 2]``."""
        moved = _apply(self.back, points)
        return moved + self._bend(points)

    def target(self, points: Floats) -> Floats:
        """New points at which old ones are seen; a few rounds, since waves are shallow."""
        ahead = np.linalg.inv(self.back)
        found = _apply(ahead, points)
        for _ in range(6 if self.waves else 0):
            found = _apply(ahead, points - self._bend(found))
        return found

    def box(self, box: Box) -> Box:
        """The box around the bent outline of a box, cut at the picture's edge."""
        x0, y0, x1, y1 = box
        along = np.linspace(0, 1, _SIDE)
        xs, ys = x0 + along * (x1 - x0), y0 + along * (y1 - y0)
        outline = [np.stack([xs, np.full(_SIDE, y)], 1) for y in (y0, y1)]
        outline += [np.stack([np.full(_SIDE, x), ys], 1) for x in (x0, x1)]
        points = self.target(np.concatenate(outline))
        low = np.clip(points.min(0), 0, self.size)
        high = np.clip(points.max(0), 0, self.size)
        return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))

    def image(self, image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
        """The new picture; ``fill`` is seen where the old one has ended."""
        width, height = self.size
        xs = np.unique([*range(0, width, _CELL), width])
        ys = np.unique([*range(0, height, _CELL), height])
        grid = self.source(np.stack(np.meshgrid(xs, ys), -1).astype(np.float64))
        # A margin all round: what lies outside shall be of the paper's colour, not black.
        low = np.floor(np.minimum(grid.min((0, 1)), 0)).astype(int) - 2
        high = np.ceil(np.maximum(grid.max((0, 1)), image.size)).astype(int) + 2
        wide = Image.new("RGB", (int(high[0] - low[0]), int(high[1] - low[1])), fill)
        wide.paste(image, (int(-low[0]), int(-low[1])))
        grid = grid - low
        mesh = []
        for j in range(len(ys) - 1):
            for i in range(len(xs) - 1):
                corners = (grid[j, i], grid[j + 1, i], grid[j + 1, i + 1], grid[j, i + 1])
                target = (int(xs[i]), int(ys[j]), int(xs[i + 1]), int(ys[j + 1]))
                mesh.append((target, tuple(float(v) for corner in corners for v in corner)))
        return wide.transform(
            self.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC, fillcolor=fill
        )

    def _bend(self, points: Floats) -> Floats:
        bent = np.zeros_like(points)
        for ax, ay, kx, ky, phase in self.waves:
            wave = np.sin(points[..., 0] * kx + points[..., 1] * ky + phase)
            bent[..., 0] += ax * wave
            bent[..., 1] += ay * wave
        return bent


def _apply(matrix: npt.NDArray[Any], points: npt.NDArray[Any]) -> Floats:
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    return np.asarray(moved[..., :2] / moved[..., 2:])


def random_warp(size: tuple[int, int], rng: Random, strength: float = 1.0) -> Warp | None:
    """A little rotation, perspective and waves, none of them always; the whole page stays in.

    Args:
        size: width and height of the page.
        rng: all chance comes from here.
        strength: 0 for none, 1 for up to 6 degrees.
    """
    width, height = size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    moved = corners - corners.mean(0)
    angle = math.radians(rng.normal(0, 2.2)) if rng.random() < 0.7 else 0.0
    angle = float(np.clip(angle, -0.105, 0.105)) * strength
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = moved @ turn.T
    if rng.random() < 0.5:
        moved += rng.uniform(-0.035, 0.035, (4, 2)) * strength * min(size)
    waves = []
    if rng.random() < 0.4:
        for _ in range(int(rng.integers(1, 3))):
            long = rng.uniform(0.5, 1.5) * max(size)
            way = rng.uniform(0, 2 * math.pi)
            depth = rng.uniform(0.1, 1.0) * strength * 0.006 * min(size)
            k = 2 * math.pi / long
            lean = rng.uniform(0, 2 * math.pi)
            waves.append((
                depth * math.cos(lean), depth * math.sin(lean),
                k * math.cos(way), k * math.sin(way), float(rng.uniform(0, 6.28)),
            ))  # fmt: skip
    if np.allclose(moved, corners - corners.mean(0)) and not waves:
        return None
    low, high = moved.min(0), moved.max(0)
    scale = np.array(size) / (high - low)  # whatever stuck out comes back in
    moved = (moved - low) * scale.min() + (np.array(size) - (high - low) * scale.min()) / 2
    return Warp(size, _homography(moved, corners), tuple(waves))


def _homography(source: Floats, target: Floats) -> Floats:
    """The matrix that maps four points to four others."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    flat = np.linalg.solve(np.array(rows), np.array(values))
    return np.append(flat, 1.0).reshape(3, 3)


def degrade(
    image: Image.Image,
    truth: Truth,
    rng: Random,
    strength: float = 1.0,
    *,
    text_height: float = 14.0,
    bend: bool = True,
) -> tuple[Image.Image, Truth]:
    """A page as it was scanned or photographed; the boxes stay on their ink.

    Args:
        image: the clean page, RGB.
        truth: what is on it.
        rng: all chance comes from here.
        strength: 0 leaves the page as it is, 1 is everything.
        text_height: of the smallest print, in pixels: blur and noise stay below what it bears.
        bend: also rotate, tilt and bend it.
    """
    if strength <= 0:
        return image, truth
    warp = random_warp(image.size, rng, strength) if bend and rng.random() < 0.6 else None
    if warp is not None:
        image, truth = warp.image(image, _edge_colour(image)), truth.moved(warp.box)
    if rng.random() < 0.3 * strength:
        image = _shade(image, rng, strength)
    if rng.random() < 0.35 * strength:
        radius = strength * rng.uniform(0.005, 0.035) * text_height
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if rng.random() < 0.2 * strength and text_height > 13:
        image = surface.coarser(image, float(rng.uniform(11.0 / text_height, 1.0)), rng)
    if rng.random() < 0.3 * strength:
        image = surface.noisy(image, strength * rng.uniform(2, 10), rng)
    if rng.random() < 0.4 * strength:
        image = surface.jpeg(image, int(rng.integers(45 if text_height > 18 else 65, 96)))
    return image.convert("RGB"), truth


def _edge_colour(image: Image.Image) -> tuple[int, int, int]:
    """The middle colour along the border."""
    pixels = np.asarray(image.convert("RGB"))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (int(v) for v in np.median(edge, 0))
    return red, green, blue


def _shade(image: Image.Image, rng: Random, strength: float) -> Image.Image:
    """Uneven light."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    light = surface.clouds(pixels.shape[:2], rng)
    return surface.picture(pixels * (1 - np.float32(0.3 * strength) * light))
