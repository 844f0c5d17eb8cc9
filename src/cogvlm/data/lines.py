"""Print one line of text on a small picture, as a scanner or a camera would see it.

Knows nothing about models or tokens. Geometry first, on a mask of the ink alone; every character's
centre goes through the same mapping, so it stays exact. Colours, paper and damage come after.

Notation: ``H W`` picture height and width in pixels, ``N`` characters. Points are ``(x, y)``, the
corner of the first pixel is (0, 0), y grows downward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from cogvlm.data import surface
from cogvlm.data.fonts import SIZES, FontSampler
from cogvlm.data.text import PRINTABLE, LineText
from cogvlm.errors import ConfigError, InputError

Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]  # [3, 3], maps column vectors (x, y, 1)
Random = np.random.Generator


@dataclass(frozen=True)
class LineStyle:
    """How lines look. All chances and amounts of damage scale with ``strength``.

    Raises:
        ConfigError: a value outside its range.
    """

    strength: float = 1.0  # 0 = black on white, upright and clean; 1 = everything below
    fill: tuple[float, float] = (0.45, 0.95)  # height of the text as a share of the picture's
    margin: tuple[float, float] = (0.1, 1.0)  # left and right of the text, in em
    rotation: float = 2.0  # degrees, at most
    shear: float = 0.15  # x per y, at most
    underline: float = 0.06  # chance
    least_height: float = 11.0  # of the text, ascender to descender, after a coarse scan; pixels
    least_contrast: float = 70.0  # between ink and paper, of 255

    def __post_init__(self) -> None:
        """Refuse impossible values by name."""
        if not 0.0 <= self.strength <= 1.0:
            raise ConfigError(f"strength is {self.strength}: a number from 0 to 1 is needed")
        if not 0.0 < self.fill[0] <= self.fill[1] <= 1.0:
            raise ConfigError(
                f"fill is {self.fill}: (low, high) with 0 < low <= high <= 1 is needed"
            )
        if not 0.0 <= self.margin[0] <= self.margin[1]:
            raise ConfigError(
                f"margin is {self.margin}: (low, high) with 0 <= low <= high is needed"
            )


@dataclass(frozen=True)
class Line:
    """A printed line."""

    image: Image.Image  # RGB, uint8[H, W, 3]
    text: str
    centers: Floats  # [N]: x of the middle of each character's advance, halfway up a capital
    extents: Floats  # [N, 2]: x of its left and right end
    feet: Floats  # [N]: y just above the baseline, an eighth of an em


class LineStream:
    """Endless printed lines; line ``i`` prints line ``i`` of ``text``.

    It is a pure function of ``seed``, ``i``, the fonts, the text and the style, so a run goes on
    exactly at any index, on any number of workers.
    """

    def __init__(
        self,
        sampler: FontSampler,
        text: LineText,
        seed: int = 0,
        strength: float = 1.0,
        style: LineStyle | None = None,
    ) -> None:
        self.sampler, self.text, self.seed = sampler, text, seed
        self.style = replace(style or LineStyle(), strength=strength)

    def __iter__(self) -> Iterator[Line]:
        """Lines 0, 1, 2, ... without end."""
        return self.start(0)

    def start(self, index: int, step: int = 1) -> Iterator[Line]:
        """Lines ``index``, ``index + step``, ... without end."""
        while True:
            yield self.line_at(index)
            index += step

    def line_at(self, index: int) -> Line:
        """Line ``index``, the same whenever and wherever it is asked for."""
        rng = np.random.default_rng((self.seed, index))
        font = self.sampler.sample(rng, SIZES)
        return render_line(self.text.at(index), font, rng, self.style)


def render_line(
    text: str, font: ImageFont.FreeTypeFont, rng: Random, style: LineStyle | None = None
) -> Line:
    """``text`` in ``font`` on a picture of its own size.

    Args:
        text: printable ASCII, at least one character that is not blank.
        font: opened at the size to print at, 16 to 64 pixels an em.
        rng: all chance comes from here.
        style: what may happen to the line.

    Raises:
        InputError: ``text`` is empty or has other characters.
    """
    if not text.strip() or any(char not in PRINTABLE for char in text):
        raise InputError(f"cannot print {text[:40]!r}: printable ASCII with some ink is needed")
    style = style or LineStyle()
    print_ = _print(text, font, rng, style)
    matrix, size = _place(print_, font, rng, style)
    ink = _warp(print_.mask, matrix, size, print_.origin)
    image = _colour(np.asarray(ink, np.float32) / np.float32(255), rng, style)
    image = _damage(image, print_.height, rng, style).convert("RGB")
    middle = np.full(len(text), -0.35 * font.size)
    left, right = print_.edges.T
    x = [_apply(matrix, points, middle)[0] for points in ((left + right) / 2, left, right)]
    center, *ends = (values.astype(np.float32) for values in x)
    feet = _apply(matrix, (left + right) / 2, np.full(len(text), -0.125 * font.size))[1]
    return Line(image, text, center, np.stack(ends, 1), feet.astype(np.float32))


def advances(text: str, font: ImageFont.FreeTypeFont) -> Matrix:
    """Where each character begins and ends when drawn from 0, kerning included: float64[N, 2]."""
    width = {char: font.getlength(char) for char in set(text)}
    # Lengths of pairs, not of prefixes: those would cost the square of the length.
    kerning = [font.getlength(a + b) - width[a] - width[b] for a, b in pairwise(text)]
    own = np.array([width[char] for char in text])
    right = np.cumsum(own) + np.cumsum([0.0, *kerning])
    return np.stack([right - own, right], 1)


@dataclass(frozen=True)
class _Print:
    """Upright ink; coordinates with the pen's start on the baseline as (0, 0)."""

    mask: Image.Image  # L, 255 where there is ink
    origin: tuple[int, int]  # of the coordinates, in pixels of the mask
    edges: Matrix  # [N, 2]: left and right end of each advance
    box: tuple[float, float, float, float]  # that must be on the picture: left, top, right, bottom
    height: float  # ascender to descender


def _print(text: str, font: ImageFont.FreeTypeFont, rng: Random, style: LineStyle) -> _Print:
    em = round(font.size)
    spaced = rng.random() < 0.25 * style.strength
    tracking = em * rng.uniform(-0.02, 0.18) if spaced else 0.0
    edges = advances(text, font) + tracking * np.arange(len(text))[:, None]
    pad = em  # room for what leans out of its advance, and for ascenders of any face
    origin = (pad, 2 * pad)
    mask = Image.new("L", (math.ceil(edges[-1, 1]) + 2 * pad, 4 * pad))
    draw = ImageDraw.Draw(mask)
    if spaced:
        for char, x in zip(text, edges[:, 0], strict=True):
            draw.text((pad + x, 2 * pad), char, fill=255, font=font, anchor="ls")
    else:
        draw.text(origin, text, fill=255, font=font, anchor="ls")
    ink = mask.getbbox()
    if ink is None:  # only a face that find_fonts() would have refused
        raise InputError(f"face {font.getname()} has no ink for {text[:40]!r}")
    _, rise = draw.textbbox((0, 0), "d", font=font, anchor="ls")[:2]
    fall = draw.textbbox((0, 0), "p", font=font, anchor="ls")[3]
    top, bottom = min(ink[1] - origin[1], 0), max(ink[3] - origin[1], 0)
    # A tight crop of "ooo" would look like one of "OOO": those keep the whole height of the line.
    telling = bottom - top > 0.6 * (fall - rise) or len(set(text)) > 4
    if not (telling and rng.random() < 0.5):
        top, bottom = min(top, int(rise)), max(bottom, int(fall))
    if rng.random() < style.underline * style.strength and "_" not in text:  # it would hide it
        y, thick = (max(1, round(em * share)) for share in rng.uniform((0.06, 0.03), (0.14, 0.08)))
        first, last = origin[1] + y, origin[1] + y + thick - 1
        draw.rectangle((pad, first, pad + edges[-1, 1], last), fill=255)
        bottom = max(bottom, y + thick)
    mask = _restroke(mask, em, rng, style.strength)
    box = (
        min(ink[0] - origin[0], 0.0), top - 0.5, max(ink[2] - origin[0], edges[-1, 1]), bottom + 0.5
    )  # fmt: skip
    return _Print(mask, origin, edges, box, float(fall - rise))


def _restroke(mask: Image.Image, em: int, rng: Random, strength: float) -> Image.Image:
    """Fatter or thinner strokes, by less than a pixel: small print must stay whole."""
    chance = rng.random()
    if chance < 0.12 * strength:
        extreme, share = ImageChops.lighter, rng.uniform(0.2, 0.8)
    elif chance < 0.24 * strength and em >= 24:
        extreme, share = ImageChops.darker, rng.uniform(0.1, 0.5) * min(1.0, em / 48)
    else:
        return mask
    changed = mask  # with each of the four neighbours; the mask's edge is empty
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        changed = extreme(changed, ImageChops.offset(mask, x, y))
    return Image.blend(mask, changed, share)


def _apply(matrix: Matrix, x: Matrix, y: Matrix) -> Matrix:
    """Mapped points, float64[2, N]."""
    moved = matrix @ np.stack([x, y, np.ones_like(x)])
    return np.asarray(moved[:2] / moved[2])


def _shift(x: float, y: float) -> Matrix:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _place(
    print_: _Print, font: ImageFont.FreeTypeFont, rng: Random, style: LineStyle
) -> tuple[Matrix, tuple[int, int]]:
    """The mapping from the print's coordinates to the picture's, and the picture's ``(W, H)``."""
    left, top, right, bottom = print_.box
    middle = ((left + right) / 2, (top + bottom) / 2)
    bend = _bend(right - left, bottom - top, font.size, rng, style)
    matrix = bend @ _shift(-middle[0], -middle[1])
    x, y = np.array([left, right, right, left]), np.array([top, top, bottom, bottom])
    corners = _apply(matrix, x, y)
    low, extent = corners.min(1), np.ptp(corners, axis=1)
    height = max(math.ceil(extent[1] / rng.uniform(*style.fill)), math.ceil(extent[1]) + 1)
    above = (height - extent[1]) * rng.uniform(0.15, 0.85)
    before, after = font.size * rng.uniform(*style.margin, size=2)
    width = math.ceil(extent[0] + before + after)
    move = np.array([before - low[0], above - low[1]])
    if np.array_equal(bend, np.eye(3)):
        # Ink that is only moved stays as sharp as it was drawn: whole pixels.
        move = np.floor(move - middle) + middle
    return _shift(*move) @ matrix, (width, height)


def _bend(width: float, height: float, em: float, rng: Random, style: LineStyle) -> Matrix:
    """Small rotation, shear, stretch and perspective about the middle of the text."""
    matrix = np.eye(3)
    if rng.random() < 0.6 * style.strength:
        # A long line may rise by half its height at most, or it would no longer fill its picture.
        limit = min(math.radians(style.rotation), 0.5 * em / width) * style.strength
        angle = rng.uniform(-limit, limit)
        matrix[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    if rng.random() < 0.4 * style.strength:
        lean = rng.uniform(-style.shear, style.shear) * style.strength
        matrix[:, 1] += lean * matrix[:, 0]
    if rng.random() < 0.5 * style.strength:
        stretch = np.exp(rng.uniform(-0.12, 0.12, size=2) * style.strength)
        matrix = matrix @ np.diag([stretch[0], stretch[1], 1.0])
    if rng.random() < 0.2 * style.strength:
        matrix[2, :2] = rng.uniform(-0.12, 0.12, size=2) * style.strength / (width, 4 * height)
    return matrix


def _warp(
    mask: Image.Image, matrix: Matrix, size: tuple[int, int], origin: tuple[int, int]
) -> Image.Image:
    back = np.linalg.inv(matrix @ _shift(-origin[0], -origin[1]))
    back /= back[2, 2]
    data = tuple(map(float, back.flat[:8]))
    if np.array_equal(matrix[:2, :2], np.eye(2)) and not matrix[2, :2].any():
        x, y = round(data[2]), round(data[5])
        return mask.crop((x, y, x + size[0], y + size[1]))
    if not matrix[2, :2].any():
        return mask.transform(size, Image.Transform.AFFINE, data[:6], Image.Resampling.BICUBIC)
    return mask.transform(size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BICUBIC)


def _colour(ink: Floats, rng: Random, style: LineStyle) -> Image.Image:
    """Ink on paper, from float32[H, W] coverage to RGB, or to L where all is grey (faster)."""
    strength = style.strength
    dark, light = surface.luminances(rng, strength)
    pen, paper = (light, dark) if rng.random() < 0.2 * strength else (dark, light)
    reach = math.copysign(light - dark - style.least_contrast, pen - paper)
    ground = surface.paper(ink.shape, paper, reach, rng, strength)
    tint = surface.tint(pen, rng) if rng.random() < 0.3 * strength else np.full(1, pen)
    if rng.random() < 0.3 * strength:
        room = max(0.0, 1.0 - 1.2 * style.least_contrast / (light - dark))
        ink = ink * (1 - np.float32(min(room, 0.5)) * surface.clouds(ink.shape, rng)[..., 0])
    mixed = tint.astype(np.float32) - ground
    mixed *= ink[..., None]
    mixed += ground
    return surface.picture(mixed)


def _damage(image: Image.Image, height: float, rng: Random, style: LineStyle) -> Image.Image:
    """Blur, a coarse scan, noise and JPEG. ``height``: of the text, in pixels, bounds them all."""
    strength = style.strength
    if rng.random() < 0.35 * strength:
        image = image.filter(
            ImageFilter.GaussianBlur(strength * rng.uniform(0.005, 0.045) * height)
        )
    if rng.random() < 0.35 * strength:
        target = rng.uniform(style.least_height, 26.0)
        if target < height:
            image = surface.coarser(image, target / height, rng)
            height = target
    if rng.random() < 0.3 * strength:
        image = surface.noisy(image, strength * rng.uniform(2, 14), rng)
    if rng.random() < 0.45 * strength:
        image = surface.jpeg(image, int(rng.integers(30 if height > 20 else 60, 96)))
    return image
