"""Pages of program code, from the standard library of Python."""

from __future__ import annotations

import keyword
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np

from .. import surface
from ..text import HELD_OUT, stable_fraction
from . import words
from .ink import Canvas, Colour, Style
from .pages import Setting, rgb
from .step import Random, Refused

_TOKEN = re.compile(r"#.*|\"[^\"]*\"|'[^']*'|\b\w+\b|\s+|.")


def code(setting: Setting, rng: Random) -> Canvas:
    """Some lines of a program as an editor shows them."""
    size = setting.size(rng, 0.9, 2.0)
    em = setting.em(rng, 0.026, 0.042)
    dark = rng.random() < 0.5
    paper = rgb(np.full(3, rng.uniform(15, 45) if dark else rng.uniform(240, 255)))
    plain = rgb(np.full(3, rng.uniform(200, 240) if dark else rng.uniform(0, 50)))
    tones = [
        rgb(surface.tint(rng.uniform(150, 200) if dark else rng.uniform(50, 110), rng))
        for _ in range(4)
    ]
    canvas = Canvas(size, paper)
    path = setting.faces.pick(rng, "mono").path
    style = Style(path, em, plain)
    advance = style.font.getlength("0")
    numbers = rng.random() < 0.5
    gutter = round(advance * 5) if numbers else round(0.8 * em)
    rows = int((size[1] - 1.2 * em) // style.leading)
    columns = int((size[0] - gutter - em) // advance)
    found = _some_code(rng, rows, columns, setting.held_out)
    first = int(rng.integers(1, 400))
    y = round(1.3 * em)
    for k, row in enumerate(found):
        if numbers and row.strip():
            canvas.draw.text(
                (gutter - round(1.2 * advance), y),
                str(first + k),
                fill=rgb(np.full(3, 128.0)),
                font=style.font,
                anchor="rs",
            )
        if row.strip():
            canvas.line(gutter, y, row, style, role="code")
            _paint(canvas, gutter, y, row, style, tones, paper)
        y += style.leading
    text = "\n".join(found).strip("\n")
    canvas.extra["code"] = text
    canvas.caption = "A piece of a Python program" + (" with line numbers." if numbers else ".")
    return canvas


def _paint(
    canvas: Canvas, x: int, y: int, row: str, style: Style, tones: list[Colour], paper: Colour
) -> None:
    """Colour keywords, strings and comments over what is there already."""
    for word in re.finditer(r"\S+", row):
        tone = _tone(row, word.start(), word[0], tones)
        if tone is not None:
            # The pen of each word as Canvas.line() had it, so that the colours lie on the ink.
            pen = x + sum(
                style.font.getlength(p) for p in re.findall(r"\s+|\S+", row[: word.start()])
            )
            canvas.draw.text((round(pen), y), word[0], fill=tone, font=style.font, anchor="ls")


def _tone(row: str, at: int, word: str, tones: list[Colour]) -> Colour | None:
    if "#" in row[: at + 1]:
        return tones[0]
    if keyword.iskeyword(word.rstrip(":")):
        return tones[1]
    if word[0] in "\"'":
        return tones[2]
    return tones[3] if word[0].isdigit() else None


@lru_cache(maxsize=2)
def _code_files(held_out: bool) -> tuple[Path, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(root.glob("*.py"))
    side = [p for p in found if (stable_fraction(p.stem) < HELD_OUT) == held_out]
    return tuple(p for p in side if 2_000 < p.stat().st_size < 200_000)


@lru_cache(maxsize=32)
def _code_rows(path: Path) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8", errors="replace").expandtabs(4)
    return tuple(row.rstrip() for row in text.split("\n"))


def _some_code(rng: Random, rows: int, columns: int, held_out: bool) -> list[str]:
    files = _code_files(held_out)
    if not files:
        raise Refused("no program code on this machine")
    for _ in range(40):
        found = _code_rows(words.pick(rng, files))
        start = int(rng.integers(max(1, len(found) - rows)))
        part = list(found[start : start + int(rng.integers(min(4, rows), rows + 1))])
        while part and not part[0]:
            part.pop(0)
        indent = min((len(r) - len(r.lstrip()) for r in part if r), default=0)
        part = [r[indent:] for r in part]
        good = all(len(r) <= columns and r.isascii() for r in part)
        if good and sum(map(len, part)) > 40:
            return part
    raise Refused("no program code that fits")
