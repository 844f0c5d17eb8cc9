"""Set text on a picture and note where every word's ink is.

Pens stand on whole pixels, so a word's box is known exactly from its glyphs.  Knows nothing about
what the text says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from ..lines import advances
from .faces import opened
from .step import Box, Fact, Piece, Truth

Colour = tuple[int, int, int]
Align = Literal["left", "right", "center"]

_ATOM = re.compile(
    "[\u3000-\u303f\u4e00-\u9fff\uff00-\uff60\u2014\u2026]|[^\\s\u3000-\u303f\u4e00-\u9fff\uff00-\uff60]+"
)


@dataclass(frozen=True)
class Style:
    """A face, its size and its colour."""

    path: Path
    size: int  # pixels an em
    colour: Colour = (0, 0, 0)

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        """The opened face."""
        return opened(self.path, self.size)

    def width(self, text: str) -> int:
        """Of the text when set, in pixels."""
        return round(self.font.getlength(text))

    @property
    def leading(self) -> int:
        """From one baseline to the next, in pixels, as the face wants it but not excessive."""
        up, down = self.font.getmetrics()
        return round(min(max(up + down, 1.15 * self.size), 1.45 * self.size))


@lru_cache(maxsize=8192)
def _ink(path: Path, size: int, text: str) -> tuple[int, int, int, int] | None:
    """Box of the ink, from the pen's start on the baseline."""
    mask, (left, above) = opened(path, size).getmask2(text, mode="L", anchor="ls")
    box = mask.getbbox()
    if box is None:
        return None
    return (box[0] + left, box[1] + above, box[2] + left, box[3] + above)


def around(boxes: Sequence[Box]) -> Box:
    """The box around all of them; of none, an empty one."""
    if not boxes:
        return (0.0, 0.0, 0.0, 0.0)
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return (min(x0), min(y0), max(x1), max(y1))


class Canvas:
    """A picture that remembers what was written on it."""

    def __init__(self, size: tuple[int, int], paper: Colour | Image.Image) -> None:
        self.image = paper if isinstance(paper, Image.Image) else Image.new("RGB", size, paper)
        self.draw = ImageDraw.Draw(self.image)
        self.width, self.height = size
        self.words: list[Piece] = []
        self.lines: list[Piece] = []
        self.items: list[Piece] = []
        self.facts: list[Fact] = []
        self.table: tuple[tuple[str, ...], ...] = ()
        self.caption = ""
        self.extra: dict[str, str] = {}

    def truth(self, text: str | None = None) -> Truth:
        """What is known of the picture; its text is that of its lines unless given."""
        said = "\n".join(line.text for line in self.lines) if text is None else text
        return Truth(
            said, tuple(self.words), tuple(self.lines), tuple(self.items), tuple(self.facts),
            self.table, self.caption, self.extra,
        )  # fmt: skip

    def line(
        self, x: int, y: int, text: str, style: Style, align: Align = "left", role: str = "line"
    ) -> Box:
        """One line with its baseline at ``y``; blanks are kept as they are. Returns its box."""
        if align != "left":
            wide = style.width(text)
            x -= wide if align == "right" else wide // 2
        pen, font = float(x), style.font
        boxes: list[Box] = []
        for part in re.findall(r"\s+|\S+", text):
            if not part.isspace():
                at = round(pen)
                self.draw.text((at, y), part, fill=style.colour, font=font, anchor="ls")
                ink = _ink(style.path, style.size, part)
                if ink is not None:
                    x0, y0, x1, y1 = map(float, ink)
                    boxes.append((x0 + at, y0 + y, x1 + at, y1 + y))
                    middles = (advances(part, font).mean(1) - x0) / (x1 - x0)
                    level = -y0 / (y1 - y0)
                    word = Piece(part, boxes[-1], middles=tuple(middles.tolist()), baseline=level)
                    self.words.append(word)
            pen += font.getlength(part)
        box = around(boxes)
        if boxes:
            self.lines.append(Piece(" ".join(text.split()), box, role))
        return box

    def block(
        self,
        x: int,
        y: int,
        width: int,
        bottom: int,
        text: str,
        style: Style,
        *,
        align: Align = "left",
        justify: bool = False,
        leading: float = 1.0,
        role: str = "line",
    ) -> tuple[int, bool]:
        """Wrapped text from the first baseline ``y`` on, not below ``bottom``.

        Returns the next baseline, and whether all of the text found room.
        """
        step = round(style.leading * leading)
        rows = wrap(text, style, width)
        for number, row in enumerate(rows):
            if y > bottom:
                return y, False
            if justify and number + 1 < len(rows) and " " in row:
                self._justified(x, y, width, row, style, role)
            else:
                at = {"left": x, "right": x + width, "center": x + width // 2}[align]
                self.line(at, y, row, style, align, role)
            y += step
        return y, True

    def _justified(self, x: int, y: int, width: int, row: str, style: Style, role: str) -> None:
        words = row.split()
        gap = (width - sum(style.width(w) for w in words)) / (len(words) - 1)
        if gap > 1.6 * style.size:
            self.line(x, y, row, style, "left", role)
            return
        pen, before, count = float(x), len(self.words), len(self.lines)
        for word in words:
            self.line(round(pen), y, word, style)
            pen += style.width(word) + gap
        del self.lines[count:]
        boxes = [w.box for w in self.words[before:]]
        self.lines.append(Piece(row, around(boxes), role))

    def rule(self, x0: int, y0: int, x1: int, y1: int, colour: Colour, thick: int = 1) -> None:
        """A straight line."""
        self.draw.line((x0, y0, x1, y1), fill=colour, width=thick)

    def box(
        self,
        box: tuple[int, int, int, int],
        outline: Colour | None = None,
        fill: Colour | None = None,
        thick: int = 1,
        radius: int = 0,
    ) -> None:
        """A rectangle, its corners round where asked."""
        self.draw.rounded_rectangle(box, radius, fill=fill, outline=outline, width=thick)


def wrap(text: str, style: Style, width: int) -> list[str]:
    """Rows of at most ``width`` pixels; breaks at blanks and between Chinese signs.

    A word that is too long for a row is cut.
    """
    rows: list[str] = []
    row = ""
    for atom, blank in _atoms(text):
        joined = f"{row} {atom}" if blank and row else row + atom
        # A stop never begins a row.
        if not row or style.width(joined) <= width or atom in "，。；：、？！）》」":
            row = joined
        else:
            rows.append(row)
            row = atom
        while style.width(row) > width and len(row) > 1 and atom not in "，。；：、？！）》」":
            fits = len(row) - 1
            while fits > 1 and style.width(row[:fits]) > width:
                fits -= 1
            rows.append(row[:fits])
            row = row[fits:]
    return [*rows, row] if row else rows


def _atoms(text: str) -> list[tuple[str, bool]]:
    """What is never broken, and whether a blank stands before it."""
    return [(m[0], m.start() > 0 and text[m.start() - 1].isspace()) for m in _ATOM.finditer(text)]
