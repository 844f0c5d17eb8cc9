"""A pixel plan for print: the picture is cut into its lines, and each is a strip for the tower.

A tower too small for whole pages reads lines well.  So a page is straightened, its lines are found
by where its ink is, long ones are cut between words, wide gaps are left out, and every piece
becomes an image block of its own; between blocks stands as text what a reader would type::

    Milk         1.20        [Milk] \\t [1.20] \\n [Thank you] \\n
    Thank you

With ``places``, in conversations that ask for a place, the box of every part of a line is in that
text, as the grounding models of the family write boxes: a strip does not show where on the page it
was.  A box is as long as ten words, so other conversations go without.  The box of a part that
stands alone in a frame is the frame's: that is the button or the field::

    [Milk][[050,100,290,480]] \\t [1.20][[750,100,950,480]] \\n [Thank you][[050,520,700,900]] \\n

With ``shown``, only the first pieces are image blocks.  What a head on the tower reads in each
stands behind it as text, which is a third of the tokens and in the language model's own words::

    [Milk] Milk \t [1.20] 1.20 \n Thank you \n          shown: 2

A picture that is one line stays whole, and so does one in which no line is found.  Knows nothing
about letters.

``H, W`` pixels of the picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .image import NativePixels
from .ink import Box, Ink, frames_of, ink_of, letter_height, without_figures, without_rules
from .letters import beside, is_photograph, letters_of

_SIDE = 2048  # pixels: larger pictures are made smaller before anything is looked for
_BLANK, _GAP, _LINE = " ", "\t", "\n"
_ASKS = re.compile(
    r"\[\[|\b(?:where|find|locate|location|places?|position|point|click|region|box|boxes|"
    r"bounding|coordinates?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Piece:
    """A part of a line, or of its text: where it is in the straightened picture."""

    box: Box
    behind: str  # a blank, a tab or a newline
    place: str = ""  # of the part of a line that ends here, in the picture as it was
    whole: Box | None = None  # the ink of that part


@dataclass(frozen=True)
class Straight:
    """A straightened picture and its pieces, in reading order."""

    image: Image.Image
    angle: float  # degrees that it was turned by, counter-clockwise, about its middle
    scale: float  # of the picture before, at most 1
    pieces: tuple[Piece, ...]

    def crop(self, piece: Piece) -> Image.Image:
        """The picture of a piece."""
        return self.image.crop(piece.box)


@dataclass(frozen=True)
class LinePixels(NativePixels):
    """Lines as strips of ``max_rows`` patches, at most ``max_cols`` long.

    Attributes:
        longest: width of a strip, in its heights; longer lines are cut between words.
        max_strips: pieces of a picture; the rest is left out.
        places: whether boxes, in thousandths of the picture, stand behind the parts of lines in
            conversations that ask for places.
        shown: pieces of a picture that are shown; all are read.  None: all are shown, none is read.
    """

    longest: int = 12
    max_strips: int = 64
    places: bool = False
    shown: int | None = None

    def cut(self, image: Image.Image, placed: bool = True) -> Straight:
        """Straighten a picture and find its lines, and where ``places`` and ``placed``, the boxes
        of their parts.
        """
        scale = min(1.0, _SIDE / max(image.size))
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        ink = print_of(image)
        angle = slant(ink)
        if angle:
            image = turned(image, angle)
            ink = print_of(image)
        pieces = self._pieces(ink)
        if self.places and placed:
            parts = [p.whole for p in pieces if p.whole]
            around = framed(parts, frames_of(image))
            pieces = [
                replace(p, place=_where(around[p.whole], image.size, angle)) if p.whole else p
                for p in pieces
            ]
        if not pieces:
            pieces = [Piece((0, 0, *image.size), "" if self.shown is None else _LINE)]
        return Straight(image, angle, scale, tuple(pieces[: self.max_strips]))

    def _pieces(self, ink: Ink) -> list[Piece]:
        height, width = ink.shape
        lines = find_lines(ink)
        if len(lines) == 1 and len(lines[0]) == 1:
            _, y0, _, y1 = lines[0][0]
            if height <= 2.4 * (y1 - y0) and width * self.max_rows <= self.max_cols * height:
                return []  # one line, cut out already
        usual = [y1 - y0 for line in lines for _, y0, _, y1 in line]
        pieces: list[Piece] = []
        for line in lines:
            for number, box in enumerate(line):
                strips = list(self._strips(ink, box, usual))
                for k, strip in enumerate(strips):
                    last = k + 1 == len(strips)
                    behind = _BLANK if not last else _GAP if number + 1 < len(line) else _LINE
                    pieces.append(Piece(strip, behind, whole=box if last else None))
        return pieces

    def _strips(self, ink: Ink, box: Box, usual: list[int]) -> Iterator[Box]:
        """A box of ink with margins, cut between words where it is too long."""
        height, width = ink.shape
        x0, y0, x1, y1 = box
        own = y1 - y0
        # Letters without heads or tails are given the room that their neighbours have.
        like = [h for h in usual if own <= h <= 1.6 * own]
        tall = max(own, float(np.median(like)) if like else own)
        margin = round((1.25 * tall - own) / 2)
        top, bottom = max(0, y0 - margin), min(height, y1 + margin)
        side = round(0.3 * tall)
        room = self.longest * (bottom - top) - 2 * side
        for a, b in _between_words(_columns(ink[y0:y1, x0:x1]), room):
            yield max(0, x0 + a - side), top, min(width, x0 + b + side), bottom


def asks_for_places(questions: Iterable[str]) -> bool:
    """Whether any question needs to know where things are.

    >>> asks_for_places(["Who?", "Find the date."]), asks_for_places(["What is the date?"])
    (True, False)
    """
    return any(_ASKS.search(question) for question in questions)


def read_out(text: str | None, behind: str, place: str = "") -> str:
    """What stands behind a piece: what it says, unless nobody read it, its place, and the gap.

    The place of one that was read and says nothing is left out.

    >>> read_out("Milk", "\\n", "[[050,100,290,480]]"), read_out("", "\\n", "[[050,100,290,480]]")
    ('Milk[[050,100,290,480]]\\n', '\\n')
    """
    return behind if text == "" else (text or "") + place + behind


def joined(texts: Sequence[str], behinds: Sequence[str]) -> str:
    """The text of all pieces, without what is empty.

    >>> joined(["Milk", "1.20", "", "Bread"], ["\\t", "\\n", "\\n", "\\n"])
    'Milk\\t1.20\\nBread'
    """
    said = "".join(text + behind for text, behind in zip(texts, behinds, strict=True))
    return "\n".join(line.strip() for line in said.splitlines() if line.strip())


def framed(parts: Sequence[Box], frames: Sequence[Box]) -> dict[Box, Box]:
    """The frame about every part that stands alone in one, else the part itself.

    >>> framed([(10, 10, 50, 20), (10, 40, 50, 50)], [(5, 5, 80, 25), (0, 0, 99, 99)])
    {(10, 10, 50, 20): (5, 5, 80, 25), (10, 40, 50, 50): (10, 40, 50, 50)}
    """
    found = {part: part for part in parts}
    for frame in sorted(frames, key=lambda f: (f[2] - f[0]) * (f[3] - f[1]), reverse=True):
        inside = [part for part in parts if _holds(frame, part)]
        if len(inside) == 1 and frame[3] - frame[1] <= 5 * (inside[0][3] - inside[0][1]):
            found[inside[0]] = frame
    return found


def _holds(frame: Box, part: Box) -> bool:
    x, y = (part[0] + part[2]) / 2, (part[1] + part[3]) / 2
    return frame[0] <= x <= frame[2] and frame[1] <= y <= frame[3]


def guessed(strips: Sequence[NDArray[np.float32]]) -> list[str]:
    """Texts about as long as those of strips ``float32[3, H, W]``, to count tokens by."""
    return ["word " * (strip.shape[-1] // 110) for strip in strips]


# --- straightening ----------------------------------------------------------------------------


def print_of(image: Image.Image) -> Ink:
    """The ink of print alone: in a photograph, of letters that stand in rows, if there are any."""
    # Frames are whole before their rules are gone; what the rules joined is apart after.
    ink = without_figures(without_rules(without_figures(ink_of(image))))
    if not is_photograph(image):
        return ink
    letters, height = letters_of(image)
    if height > 2 * letter_height(ink):  # beside large ones are frames and shadows
        return letters
    near = ink & beside(letters, height)
    # A page in uneven light has hardly an edge elsewhere, and small print that is no row.
    return letters | near if 0 < near.sum() < 0.9 * ink.sum() else ink


def slant(ink: Ink, most: float = 6.0) -> float:
    """Degrees by which lines fall to the right, 0 where they are straight or there are none.

    Seen along the lines, ink is in few rows and much in each: the sum of squares is largest.
    """
    ys, xs = np.nonzero(ink)
    if len(ys) < 50:
        return 0.0
    if len(ys) > 20_000:
        chosen = np.linspace(0, len(ys) - 1, 20_000).astype(np.int64)
        ys, xs = ys[chosen], xs[chosen]

    def sharp(angle: float) -> float:
        rows = np.rint(ys - xs * math.tan(math.radians(angle))).astype(np.int64)
        return float(np.square(np.bincount(rows - rows.min()), dtype=np.float64).sum())

    coarse = max(np.arange(-most, most + 0.1, 0.5), key=sharp)
    best = float(max(np.arange(coarse - 0.4, coarse + 0.41, 0.1), key=sharp))
    return best if abs(best) >= 0.3 and sharp(best) > 1.05 * sharp(0.0) else 0.0


def turned(image: Image.Image, angle: float) -> Image.Image:
    """The picture with lines that fell by ``angle`` degrees made straight; of the same size."""
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    fill = tuple(int(v) for v in np.median(edge, axis=0))
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill)


def turn_points(
    points: NDArray[np.floating[Any]], size: tuple[int, int], angle: float
) -> NDArray[np.float32]:
    """Where points ``[N, 2]`` of a picture of ``size`` are in the one that is ``turned``."""
    turn = math.radians(angle)
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    middle = np.array(size) / 2
    return np.asarray((points - middle) @ matrix + middle, np.float32)


def _where(box: Box, size: tuple[int, int], angle: float) -> str:
    """The place of a box of the straightened picture in the picture as it was."""
    x0, y0, x1, y1 = box
    corners = np.array([(x0, y0), (x1, y0), (x0, y1), (x1, y1)], np.float32)
    before = turn_points(corners, size, -angle)
    return place((*before.min(0).tolist(), *before.max(0).tolist()), size)


def place(box: Sequence[float], size: tuple[int, int]) -> str:
    """A box as the grounding models of the family write it, in thousandths of the picture.

    >>> place((0, 10, 50, 100), (100, 100))
    '[[000,100,500,999]]'
    """
    sides = [value / size[i % 2] for i, value in enumerate(box)]
    return "[[" + ",".join(f"{min(999, max(0, round(1000 * s))):03d}" for s in sides) + "]]"


# --- lines -------------------------------------------------------------------------------------


def find_lines(ink: Ink) -> list[list[Box]]:
    """The parts of every line, from top to bottom and left to right."""
    letter = letter_height(ink)
    lines: list[list[Box]] = []
    for y0, y1 in _bands(ink.sum(1), letter):
        parts = list(_parts(ink, y0, y1, letter))
        # Columns whose lines stand at other heights are a band together, and none of their own.
        boxes = []
        for a, b in parts:
            for top, bottom in _bands(ink[y0:y1, a:b].sum(1), letter):
                inside = np.flatnonzero(_columns(ink[y0 + top : y0 + bottom, a:b]))
                left, right = a + int(inside[0]), a + int(inside[-1]) + 1
                boxes.append((left, y0 + top, right, y0 + bottom))
        lines += _level(boxes)
    heights = [y1 - y0 for line in lines for _, y0, _, y1 in line]
    if not heights:
        return []
    usual = float(np.median(heights))
    kept = [[box for box in line if _is_print(box, usual)] for line in lines]
    return [line for line in kept if line]


def _level(boxes: list[Box]) -> list[list[Box]]:
    """Boxes in lines: those whose middle is beside the first of a line, from left to right."""
    lines: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: box[1]):
        middle = (box[1] + box[3]) / 2
        beside = next((line for line in lines if line[0][1] <= middle < line[0][3]), None)
        if beside is None:
            lines.append([box])
        else:
            beside.append(box)
    return [sorted(line) for line in lines]


def _is_print(box: Box, usual: float) -> bool:
    """Neither a stroke nor dirt, nor the side of a frame."""
    width, height = box[2] - box[0], box[3] - box[1]
    return height >= max(5.0, 0.3 * usual) and (width >= 0.15 * height or height < 1.15 * usual)


def _bands(profile: NDArray[np.int64], letter: float) -> list[tuple[int, int]]:
    """Runs of rows that hold ink, those of accents and dots joined to what they belong to."""
    inked = profile[profile > 0]
    if not len(inked):
        return []
    usual = float(np.percentile(inked, 75))
    level = max(1.0, min(2.0, 0.15 * usual), 0.06 * usual)  # a stroke alone has two edges
    bands: list[tuple[int, int]] = []
    for band in _spans(profile > level):
        if bands and _belong(profile, bands[-1], band, letter):
            bands[-1] = (bands[-1][0], band[1])
        else:
            bands.append(band)
    return bands


def _belong(
    profile: NDArray[np.int64], upper: tuple[int, int], lower: tuple[int, int], letter: float
) -> bool:
    """Whether one of two neighbours is low and near, or next to nothing and not far.

    Dots and heads of slanted letters are so; an arrow between two boxes is high for its ink.
    """
    small, large = sorted(b - a for a, b in (upper, lower))
    little, much = sorted(int(profile[a:b].sum()) for a, b in (upper, lower))
    gap = lower[0] - upper[1]
    large = min(large, round(4 * letter))  # not of what many have been joined to
    return (gap <= max(1, 0.2 * large) and small < 0.4 * large) or (
        gap <= 0.4 * large and little * small < 0.03 * much * large
    )


def _parts(ink: Ink, y0: int, y1: int, letter: float) -> Iterator[tuple[int, int]]:
    """Columns of a band that belong together: gaps wider than a blank divide them."""
    spans = _spans(_columns(ink[y0:y1]))
    wide = 1.3 * min(y1 - y0, 2.2 * letter)  # a band may be many lines, of columns out of step
    first = 0
    for number in range(1, len(spans) + 1):
        if number == len(spans) or spans[number][0] - spans[number - 1][1] > wide:
            yield spans[first][0], spans[number - 1][1]
            first = number


def _between_words(columns: NDArray[np.bool_], room: float) -> Iterator[tuple[int, int]]:
    """Pieces of a line that are no longer than ``room``, cut at its widest gaps."""
    start, end = 0, len(columns)
    while end - start > room:
        gaps = [
            (b - a, (a + b) // 2)
            for a, b in _spans(~columns[start : start + int(room)])
            if a > 0.35 * room
        ]
        # The last of the wide ones, or if there is none, wherever the strip is full.
        widest = max((g for g, _ in gaps), default=0)
        at = max((x for g, x in gaps if g >= 0.7 * widest), default=int(room))
        yield start, start + at
        start += at
    yield start, end


def _columns(ink: Ink) -> NDArray[np.bool_]:
    """Which columns hold ink."""
    return np.asarray(ink.any(axis=0))


def _spans(where: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of true.

    >>> _spans(np.array([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    padded = np.concatenate(([False], where, [False]))
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
