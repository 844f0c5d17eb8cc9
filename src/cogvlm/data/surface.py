"""Inks, papers and damage: what a picture of print is made of besides its letters.

Knows nothing about text or geometry.

Notation: ``H W`` picture height and width in pixels.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]
Random = np.random.Generator


def picture(pixels: Floats) -> Image.Image:
    """float32[H, W, 1 or 3] in 0..255 as an L or RGB picture; the array is spent."""
    pixels += 0.5
    whole = np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
    return Image.fromarray(whole if whole.shape[2] == 3 else whole[..., 0])


def luminances(rng: Random, strength: float) -> tuple[float, float]:
    """``(dark, light)`` at least 100 of 255 apart; mostly near black and near white."""
    if rng.random() > 0.8 * strength:
        return 0.0, 255.0
    if rng.random() < 0.6:
        return rng.uniform(0, 60), rng.uniform(200, 255)
    dark = rng.uniform(0, 130)
    return dark, rng.uniform(dark + 110, 255)


def tint(luminance: float, rng: Random) -> npt.NDArray[np.float64]:
    """A colour of about this luminance."""
    chroma = rng.uniform(-1, 1, 3)
    chroma -= chroma @ (0.299, 0.587, 0.114)
    room = np.where(chroma > 0, 255 - luminance, luminance) / np.maximum(np.abs(chroma), 1e-3)
    return luminance + chroma * min(float(room.min()), 120.0)


def clouds(shape: tuple[int, ...], rng: Random, channels: int = 1) -> Floats:
    """Slow noise in 0..1, float32[H, W, channels]."""
    rows, columns = int(rng.integers(2, 5)), int(rng.integers(2, 12))
    grid = rng.integers(0, 256, (rows, columns, channels), dtype=np.uint8)
    picture = Image.fromarray(grid if channels == 3 else grid[..., 0])
    fine = picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    slow: Floats = np.asarray(fine, np.float32) / np.float32(255)
    return slow.reshape(shape[0], shape[1], channels)


def paper(
    shape: tuple[int, ...], luminance: float, reach: float, rng: Random, strength: float
) -> Floats:
    """Background, float32[H, W, 1 or 3]: ``luminance``, here and there up to ``reach`` added."""
    ink = tint(luminance, rng) if rng.random() < 0.35 * strength else np.full(1, luminance)
    # Plain tints of strong colour are rare in print: most papers are nearly grey.
    ink = luminance + (ink - luminance) * rng.uniform(0.1, 1.0)
    kind = rng.random() / max(strength, 1e-6)
    ground = np.empty((*shape, 3 if kind < 0.15 else ink.size), np.float32)
    ground[:] = ink
    amount = np.float32(np.clip(reach, -110.0, 110.0) * rng.uniform(0.3, 1.0))
    if kind < 0.15:
        ground += amount * clouds(shape, rng, 3)
    elif kind < 0.30:
        grain = rng.standard_normal(shape, np.float32)[..., None]
        ground += np.float32(0.4) * amount * clouds(shape, rng)
        ground += grain * np.float32(rng.uniform(2, 9))
    elif kind < 0.42:
        slope = rng.uniform(-1, 1, 2) / (shape[0], shape[1])
        ramp = np.arange(shape[0])[:, None] * slope[0] + np.arange(shape[1]) * slope[1]
        ramp -= ramp.min()
        ground += amount * (ramp / max(float(ramp.max()), 1e-6)).astype(np.float32)[..., None]
    elif kind < 0.52:
        rule(ground, amount, rng)
    return ground


def rule(ground: Floats, change: np.float32, rng: Random) -> None:
    """Draw rules across or down the paper, as forms, tables and notebooks have."""
    axis = int(rng.random() < 0.35)  # 0: rules run across
    size = ground.shape[axis]
    distance = int(rng.integers(max(8, size // 3), max(9, size) + 12))
    thick = int(rng.integers(1, 3))
    for start in range(int(rng.integers(0, distance)), size, distance):
        rule = (slice(start, start + thick), slice(None))
        ground[rule if axis == 0 else rule[::-1]] += change


def coarser(image: Image.Image, factor: float, rng: Random) -> Image.Image:
    """Down and up again: the picture keeps its size, the text loses its detail."""
    width, height = (max(1, round(side * factor)) for side in image.size)
    down = (Image.Resampling.BOX, Image.Resampling.BILINEAR)[int(rng.integers(2))]
    up = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[int(rng.integers(2))]
    return image.resize((width, height), down).resize(image.size, up)


def noisy(image: Image.Image, sigma: float, rng: Random) -> Image.Image:
    """With Gaussian noise of ``sigma`` of 255, grey or coloured."""
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    channels = 3 if rng.random() < 0.5 else 1
    noise = rng.standard_normal((*pixels.shape[:2], channels), np.float32) * np.float32(sigma)
    return picture(pixels + noise)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """As it comes back from a JPEG file of this quality, 1 to 95."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)
