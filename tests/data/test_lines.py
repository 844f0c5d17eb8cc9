"""Lines: every character's centre is where its ink is, whatever the geometry; determinism."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
from PIL import ImageFont

from cogvlm.data import lines, surface
from cogvlm.data.fonts import FontFile, FontSampler, find_fonts, load, split
from cogvlm.data.lines import LineStream, LineStyle, advances, render_line
from cogvlm.data.text import LineText
from cogvlm.errors import ConfigError, InputError

CLEAN = LineStyle(strength=0.0)


@lru_cache(maxsize=1)
def every_font() -> list[FontFile]:
    """Read once, when the first test runs: it takes seconds."""
    return find_fonts() or pytest.skip("this machine has no fonts")


def some_fonts(number: int) -> list[FontFile]:
    """About that many, from all over the list."""
    return every_font()[:: max(1, len(every_font()) // number)]


def upright(size: int = 48) -> ImageFont.FreeTypeFont:
    """A plain sans or the first face there is."""
    plain = [f for f in every_font() if f.family in ("DejaVu Sans", "Liberation Sans", "Arial")]
    regular = [f for f in plain if f.style in ("Book", "Regular")]
    return load((regular or plain or every_font())[0].path, size)


def ink_centers(line: lines.Line, level: int = 128) -> list[float]:
    """Middle of each column run of dark ink, left to right."""
    dark = (np.asarray(line.image.convert("L")) < level).any(0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], dark.astype(int), [0]])))
    return [float(a + b) / 2 for a, b in zip(edges[::2], edges[1::2], strict=True)]


def letters(line: lines.Line) -> np.ndarray:
    return np.array([c for c, t in zip(line.centers, line.text, strict=True) if t != " "])


def test_clean_centres_are_the_ink_columns() -> None:
    line = render_line("i l i l", upright(), np.random.default_rng(0), CLEAN)
    np.testing.assert_allclose(ink_centers(line), letters(line), atol=1.0)
    assert line.centers.dtype == line.extents.dtype == np.float32
    assert line.centers.shape == (7,) and line.extents.shape == (7, 2)
    np.testing.assert_allclose(line.extents.mean(1), line.centers, atol=1e-3)
    np.testing.assert_allclose(line.extents[1:, 0], line.extents[:-1, 1], atol=0.51)


@pytest.mark.parametrize("seed", range(12))
def test_geometry_carries_the_centres(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation, shear, stretch, perspective and spacing, without damage to find the ink in."""

    def plain(ink: lines.Floats, rng: lines.Random, style: LineStyle) -> lines.Image.Image:
        return surface.picture(255 - ink[..., None] * 255)

    monkeypatch.setattr(lines, "_colour", plain)
    monkeypatch.setattr(lines, "_damage", lambda image, *_: image)
    monkeypatch.setattr(lines, "_restroke", lambda mask, *_: mask)
    style = LineStyle(underline=0.0)  # a rule has no centre
    line = render_line("I I I I I", upright(), np.random.default_rng(seed), style)
    dark = 255.0 - np.asarray(line.image.convert("L"), np.float64)
    assert dark.max() > 200
    columns = np.arange(dark.shape[1]) + 0.5
    bounds = line.centers[1::2].tolist()  # the blanks stand between the letters
    for center, low, high in zip(
        line.centers[::2], [-math.inf, *bounds], [*bounds, math.inf], strict=True
    ):
        weight = dark.sum(0) * ((columns > low) & (columns < high))
        assert float(weight @ columns / weight.sum()) == pytest.approx(float(center), abs=1.5)


def test_geometry_really_bends() -> None:
    """The test above would pass without any geometry."""
    rng = np.random.default_rng(0)
    bends = [lines._bend(200, 40, 40, rng, LineStyle()) for _ in range(200)]
    angles = [math.degrees(math.atan2(m[1, 0], m[0, 0])) for m in bends]
    assert max(angles) > 1.5 and min(angles) < -1.5 and max(map(abs, angles)) < 2.3
    assert max(m[0, 1] for m in bends) > 0.1 and any(m[2, 0] != 0 for m in bends)
    assert all(np.array_equal(lines._bend(200, 40, 40, rng, CLEAN), np.eye(3)) for _ in range(20))


@pytest.mark.parametrize("text", ["AVAVA To", "a", "W.,;:!", "  pad me ", "fifty office"])
def test_advances_add_up_to_the_font_s_own_length(text: str) -> None:
    for file in some_fonts(8):
        font = load(file.path, 37)
        edges = advances(text, font)
        assert edges[-1, 1] == pytest.approx(font.getlength(text), abs=0.05)
        for n in range(len(text)):
            assert edges[n, 1] == pytest.approx(font.getlength(text[: n + 1]), abs=0.05)


def test_clean_is_black_on_white_and_whole() -> None:
    rng = np.random.default_rng(1)
    for file in some_fonts(30):
        for text in ("fjord", "QgyJ|", "."):
            line = render_line(text, load(file.path, 40), rng, CLEAN)
            pixels = np.asarray(line.image)
            assert pixels.min() < 60 and (pixels[..., 0] == pixels[..., 2]).all()
            # Nothing is cut off: the border is paper all around.
            border = [pixels[0], pixels[:, 0], pixels[:, -1], pixels[-1]]
            assert all((side == 255).all() for side in border), file


def test_height_follows_the_fill() -> None:
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(200):
        line = render_line("Tight Type", upright(40), rng, CLEAN)
        rows = np.flatnonzero((np.asarray(line.image)[..., 0] < 128).any(1))
        shares.append((rows[-1] - rows[0] + 1) / line.image.height)
    assert 0.42 <= min(shares) < 0.55 and 0.8 < max(shares) <= 1.0


def stream(strength: float = 1.0, seed: int = 9) -> LineStream:
    return LineStream(FontSampler(some_fonts(60)), LineText(), seed=seed, strength=strength)


def test_every_line_is_readable() -> None:
    """Ink stands out from paper somewhere in each character's columns."""
    for line in (stream().line_at(n) for n in range(150)):
        grey = np.asarray(line.image.convert("L"), np.float64)
        height, width = grey.shape
        assert 12 <= height < 260 and line.image.mode == "RGB"
        assert np.isfinite(line.centers).all()
        assert (line.centers > 0).all() and (line.centers < width).all()
        assert (np.diff(line.centers) > 0).all()
        assert np.ptp(grey) > 45, line.text


def test_line_at_is_pure() -> None:
    one, other = stream(), stream()
    backwards = {n: other.line_at(n) for n in reversed(range(12))}
    for n, line in zip(range(12), one, strict=False):
        assert line.text == backwards[n].text
        assert line.image.tobytes() == backwards[n].image.tobytes()
        np.testing.assert_array_equal(line.centers, backwards[n].centers)
    workers = [next(one.start(4)), next(one.start(4, step=8))]
    assert all(w.image.tobytes() == backwards[4].image.tobytes() for w in workers)
    assert stream(seed=10).line_at(4).image.tobytes() != backwards[4].image.tobytes()


def test_held_out_streams_share_no_font() -> None:
    train, held = split(every_font(), 0.3)
    if not held or not train:
        pytest.skip("too few families here")
    families = [{f.family for f in side} for side in (train, held)]
    assert not families[0] & families[1]


def test_impossible_wishes_are_refused() -> None:
    rng = np.random.default_rng(0)
    for text in ("", "   ", "caf\u00e9", "a\nb"):
        with pytest.raises(InputError, match="cannot print"):
            render_line(text, upright(), rng)
    with pytest.raises(ConfigError, match="strength"):
        LineStyle(strength=1.1)
    with pytest.raises(ConfigError, match="fill"):
        LineStyle(fill=(0.9, 0.5))
    with pytest.raises(ConfigError, match="margin"):
        LineStyle(margin=(-1.0, 0.5))
