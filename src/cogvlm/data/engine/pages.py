"""Pages of running text: paragraphs, columns, lists, signs.

Each layout is a function of a :class:`Setting` and an ``rng`` and returns a canvas; what happens to
the paper afterwards is :mod:`warp`'s business, what is asked about it :mod:`compose`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .. import surface
from . import words
from .corpus import Corpus
from .faces import Faces
from .ink import Align, Canvas, Colour, Style, around, wrap
from .step import Fact, Piece, Random, Refused


@dataclass(frozen=True)
class Setting:
    """What all layouts share.

    Attributes:
        corpus: Text to set.
        faces: Fonts to set it in.
        side: A page has about as many pixels as a square of this side.
        strength: Of damage and colour, 0 to 1.
        held_out: The side of program code that training never sees.
        larger: Print is so many times larger, and there is less of it.
    """

    corpus: Corpus
    faces: Faces
    side: int = 448
    strength: float = 1.0
    held_out: bool = False
    larger: float = 1.0

    def size(self, rng: Random, narrow: float = 0.6, wide: float = 1.6) -> tuple[int, int]:
        """Width and height of a page; its aspect between ``narrow`` and ``wide``."""
        aspect = math.exp(rng.uniform(math.log(narrow), math.log(wide)))
        area = (self.side * rng.uniform(0.8, 1.0)) ** 2
        return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))

    def em(self, rng: Random, low: float = 0.027, high: float = 0.06) -> int:
        """A size of print, from shares of ``side``; small ones are likelier."""
        share = self.larger * (low + (high - low) * rng.beta(1.2, 2.5))
        return max(11, round(self.side * share))

    def han(self, rng: Random, chance: float = 0.2) -> bool:
        """Whether this page is Chinese."""
        return bool(rng.random() < chance) and bool(self.faces.han) and bool(self.corpus.han)


@dataclass(frozen=True)
class Look:
    """Colours of a page."""

    ink: Colour
    paper: Colour
    accent: Colour
    faint: Colour  # of rules and frames


def look(rng: Random, strength: float, dark: float = 0.12) -> Look:
    """Colours that can be read; ``dark`` is the chance of a light print on dark."""
    low, high = surface.luminances(rng, strength)
    if rng.random() < dark * strength:
        low, high = high, low
    ink = rgb(surface.tint(low, rng)) if rng.random() < 0.25 * strength else (round(low),) * 3
    paper = surface.tint(high, rng)
    # Strong colours of paper are rare in print.
    share = rng.uniform(0, 0.5) if rng.random() < 0.5 * strength else 0.0
    ground = rgb(high + (paper - high) * share)
    accent = rgb(surface.tint(low * 0.7 + high * 0.3, rng))
    faint = rgb(np.full(3, low * 0.4 + high * 0.6))
    return Look(ink, ground, accent, faint)


def rgb(values: npt.NDArray[Any]) -> Colour:
    """A colour, cut to what there is."""
    red, green, blue = (int(v) for v in np.clip(values, 0, 255))
    return red, green, blue


def sheet(setting: Setting, rng: Random, size: tuple[int, int], colours: Look) -> Canvas:
    """Paper to write on: plain, or with grain, clouds or a slope of light."""
    if rng.random() > 0.4 * setting.strength:
        return Canvas(size, colours.paper)
    paper = float(np.mean(colours.paper))
    ink = float(np.mean(colours.ink))
    reach = 0.25 * (ink - paper)
    # Around 0: what differs from plain paper, towards the ink at most a quarter of the way.
    ground = surface.paper((size[1], size[0]), 0.0, reach, rng, 1.0)
    return Canvas(size, surface.picture(ground + np.array(colours.paper, np.float32)))


def paragraph(setting: Setting, rng: Random) -> Canvas:
    """Perhaps a heading, then paragraphs in one, two or three columns."""
    size = setting.size(rng)
    han = setting.han(rng)
    colours = look(rng, setting.strength)
    canvas = sheet(setting, rng, size, colours)
    em = setting.em(rng)
    face = setting.faces.pick(rng, "han" if han else "text")
    style = Style(face.path, em, colours.ink)
    margin = round(em * rng.uniform(0.8, 2.5))
    x, y = margin, margin + em
    bottom = size[1] - margin
    if rng.random() < 0.45:
        head = Style(
            _bold(setting, rng, face.path, han),
            round(em * rng.uniform(1.2, 1.9)),
            colours.accent if rng.random() < 0.3 else colours.ink,
        )
        title = setting.corpus.phrase(rng, int(rng.integers(2, 6)), han)
        y += head.size - em
        align: Align = "center" if rng.random() < 0.4 else "left"
        y, _ = canvas.block(
            x, y, size[0] - 2 * margin, bottom, title, head, align=align, role="title"
        )
        canvas.facts.append(Fact("title", title))
        y += round(0.3 * em)
    columns = 1
    if size[0] > 22 * em and not han:
        columns = int(
            rng.choice((1, 2, 3), p=(0.55, 0.35, 0.1) if size[0] > 34 * em else (0.6, 0.4, 0))
        )
    gap = round(1.4 * em)
    width = (size[0] - 2 * margin - (columns - 1) * gap) // columns
    foot = rng.random() < 0.2
    bottom -= round(1.8 * em) if foot else 0
    justify = rng.random() < 0.35
    leading = rng.uniform(0.95, 1.35)
    empty = rng.random() < 0.4  # not every page is full
    for column in range(columns):
        _fill(
            setting,
            rng,
            canvas,
            style,
            (x + column * (width + gap), y, width, bottom),
            han,
            justify,
            leading,
            empty,
        )
    if foot:
        number = str(int(rng.integers(1, 400)))
        canvas.line(size[0] // 2, size[1] - margin, number, style, "center", "footer")
        canvas.facts.append(Fact("page number", number))
    canvas.caption = _described("a page of text", columns, canvas)
    if columns == 1 and rng.random() < 0.08:
        canvas.rule(
            margin, y - round(1.1 * em), size[0] - margin, y - round(1.1 * em), colours.faint
        )
    return canvas


def _fill(
    setting: Setting,
    rng: Random,
    canvas: Canvas,
    style: Style,
    place: tuple[int, int, int, int],
    han: bool,
    justify: bool,
    leading: float,
    short: bool,
) -> None:
    """One column: paragraphs until it is full, or fewer."""
    x, y, width, bottom = place
    indent = (2 * style.size if han else style.size) if rng.random() < 0.3 else 0
    for number in range(12):
        if y > bottom or (short and number and rng.random() < 0.5):
            return
        room = max(1, (bottom - y) // round(style.leading * leading) + 1)
        most = max(8, int(room * width / (style.size * (1.0 if han else 0.5)) * 0.9))
        text = setting.corpus.text(rng, min(most, 500), han)
        # Only what fits is set: a sentence cut by the page's end would be no sentence.
        rows = wrap(text, style, width - indent)[:room]
        for row in rows if indent else ():
            canvas.line(x + indent, y, row, style)
            y += round(style.leading * leading)
        if not indent:
            y, _ = canvas.block(
                x,
                y,
                width,
                bottom,
                ("" if han else " ").join(rows),
                style,
                justify=justify,
                leading=leading,
            )
        y += round(style.size * rng.uniform(0.2, 0.9))


def _bold(setting: Setting, rng: Random, path: Path, han: bool) -> Path:
    """The same face or another, for headings."""
    if han or rng.random() < 0.5:
        return path
    return setting.faces.pick(rng).path


def _described(what: str, columns: int, canvas: Canvas) -> str:
    title = next((f.value for f in canvas.facts if f.name == "title"), "")
    where = f" in {('', '', 'two', 'three')[columns]} columns" if columns > 1 else ""
    return f"{what.capitalize()}{where}" + (f', headed "{title}".' if title else ".")


def bullets(setting: Setting, rng: Random) -> Canvas:
    """A list: numbered, with bullets, or with boxes to tick."""
    size = setting.size(rng)
    han = setting.han(rng, 0.15)
    colours = look(rng, setting.strength)
    canvas = sheet(setting, rng, size, colours)
    em = setting.em(rng, 0.03, 0.065)
    face = setting.faces.pick(rng, "han" if han else "text")
    style = Style(face.path, em, colours.ink)
    margin = round(em * rng.uniform(1, 2.5))
    y, bottom = margin + em, size[1] - margin
    title = setting.corpus.phrase(rng, int(rng.integers(1, 5)), han)
    head = Style(face.path, round(1.35 * em), colours.accent if rng.random() < 0.4 else colours.ink)
    y, _ = canvas.block(
        margin, y + em // 3, size[0] - 2 * margin, bottom, title, head, role="title"
    )
    canvas.facts.append(Fact("title", title))
    kind = words.pick(rng, ("number", "letter", "dot", "dash", "tick"))
    step = style.leading
    count = 0
    for number in range(int(rng.integers(3, 9))):
        text = setting.corpus.phrase(rng, int(rng.integers(1, 9)), han)
        mark = {"number": f"{number + 1}.", "letter": f"{chr(97 + number)})", "dash": "-"}.get(
            kind, ""
        )
        left = margin + round(1.9 * em)
        rows = wrap(text, style, size[0] - margin - left)
        if y + (len(rows) - 1) * step > bottom:
            break
        if kind == "dot":
            middle = y - round(0.32 * em)
            r = max(2, round(0.14 * em))
            canvas.draw.ellipse(
                (margin + em // 2 - r, middle - r, margin + em // 2 + r, middle + r),
                fill=colours.ink,
            )
        elif kind == "tick":
            _tick_box(canvas, rng, (margin, y - round(0.75 * em)), round(0.8 * em), text, colours)
        for k, row in enumerate(rows):
            if k == 0 and mark:
                # Mark and text are one line to a reader, though they stand apart.
                before = len(canvas.lines)
                a = canvas.line(margin, y, mark, style)
                b = canvas.line(left, y, row, style)
                del canvas.lines[before:]
                canvas.lines.append(Piece(f"{mark} {row}", around([a, b]), "line"))
            else:
                canvas.line(left, y, row, style)
            y += step
        canvas.facts.append(Fact("item", text, str(number + 1)))
        count += 1
        y += round(em * 0.35)
    if not count:
        raise Refused("too large for the page", title[:40])
    canvas.facts.append(Fact("number of items", str(count)))
    canvas.caption = f'A list of {count} items, headed "{title}".'
    return canvas


def _tick_box(
    canvas: Canvas, rng: Random, at: tuple[int, int], side: int, label: str, colours: Look
) -> None:
    x, y = at
    canvas.box((x, y, x + side, y + side), colours.ink, thick=1 + side // 18)
    ticked = rng.random() < 0.5
    if ticked:
        third = side / 3
        points = [
            (x + third * 0.5, y + side / 2),
            (x + third * 1.2, y + side - third * 0.5),
            (x + side - third * 0.4, y + third * 0.5),
        ]
        canvas.draw.line(points, fill=colours.ink, width=max(2, side // 9))
    role = "ticked box" if ticked else "empty box"
    canvas.items.append(Piece(label, (x, y, x + side + 1.0, y + side + 1.0), role))
    canvas.facts.append(Fact("ticked", "yes" if ticked else "no", label))


def sign(setting: Setting, rng: Random) -> Canvas:
    """A few large words on a board, before something that is no print."""
    size = setting.size(rng, 0.7, 1.8)
    han = setting.han(rng, 0.25)
    canvas = Canvas(size, _scene(size, rng))
    colours = look(rng, setting.strength, dark=0.6)
    if rng.random() < 0.7:  # signs have strong colours
        ground = rgb(surface.tint(float(rng.uniform(40, 120)), rng))
        white = (255, 255, 255) if rng.random() < 0.7 else (255, 225, 60)
        pair = (white, ground) if rng.random() < 0.7 else (ground, (245, 245, 240))
        colours = Look(pair[0], pair[1], pair[0], pair[0])
    margin = round(min(size) * rng.uniform(0.04, 0.16))
    board = (margin, margin, size[0] - margin, size[1] - margin)
    radius = round(rng.uniform(0, 0.12) * min(size))
    canvas.box(
        board,
        colours.ink if rng.random() < 0.6 else None,
        colours.paper,
        max(2, round(min(size) * rng.uniform(0.006, 0.02))),
        radius,
    )
    text = words.pick(rng, words.ZH_SIGNS if han else words.SIGNS)
    if not han and rng.random() < 0.4:
        text = setting.corpus.phrase(rng, int(rng.integers(1, 5)))
    text = text.upper() if rng.random() < 0.4 else text
    path = setting.faces.pick(rng, "han" if han else "text").path
    room = (board[2] - board[0] - 2 * margin // 2 - 12, board[3] - board[1] - 16)
    style, rows = _largest(text, path, room, colours.ink)
    step = style.leading
    y = (board[1] + board[3] - step * len(rows)) // 2 + round(0.8 * style.size)
    for row in rows:
        canvas.line(size[0] // 2, y, row, style, "center")
        y += step
    canvas.facts.append(Fact("sign", " ".join(text.split())))
    canvas.caption = f'A sign that says "{text}".'
    return canvas


def _largest(
    text: str, path: Path, room: tuple[int, int], colour: Colour
) -> tuple[Style, list[str]]:
    """The largest size at which the text fits, whole words only."""
    for size in (96, 80, 68, 57, 48, 40, 34, 28, 24, 20, 17, 14):
        style = Style(path, size, colour)
        rows = wrap(text, style, room[0])
        whole = all(style.width(word) <= room[0] for word in text.split())
        if whole and style.leading * len(rows) <= room[1]:
            return style, rows
    raise Refused("too long for its place", text[:40])


def _scene(size: tuple[int, int], rng: Random) -> Image.Image:
    """Something blurred in strong colours."""
    shape = (size[1], size[0])
    grey, colour = surface.clouds(shape, rng), surface.clouds(shape, rng, 3)
    share = np.float32(rng.uniform(0.1, 0.7))
    pixels = (grey + (colour - grey) * share) * np.float32(rng.uniform(120, 255))
    for _ in range(int(rng.integers(0, 4))):
        a, b = sorted(rng.uniform(0, size[0], 2)), sorted(rng.uniform(0, size[1], 2))
        part = pixels[int(b[0]) : int(b[1]), int(a[0]) : int(a[1])]
        part *= np.float32(rng.uniform(0.4, 1.2))
        part += rng.uniform(-40, 40, 3).astype(np.float32)
    return surface.picture(pixels)
