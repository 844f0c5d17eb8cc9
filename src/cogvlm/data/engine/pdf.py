"""Pages of PDF documents with the words of their text layer and where they stand.

A page as a whole is too fine for a small picture, so parts of it are shown: whole lines that stand
together, at a size that can be read.  What they say and where is the document's own word.
"""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import InputError, ResourceError
from .ink import around
from .step import Box, Piece, Random, Refused, Truth

_LEAST_EM = 0.026  # of the side: smaller print is not shown
_LEAST_SIGNS = 20  # of a text layer
_LEAST_LETTERS = 12  # of a part
# A hyphen at a line's end; ligatures and the bullet of LaTeX's fonts that do not name their glyphs.
_SIGNS = {2: "-", 0x1B: "ff", 0x1C: "fi", 0x1D: "fl", 0x1E: "ffi", 0x1F: "ffl", 0x88: "\u2022"}


@dataclass(frozen=True)
class Layer:
    """The text of a page; boxes in points, from the page's upper left corner."""

    size: tuple[float, float]
    lines: tuple[tuple[Piece, ...], ...]  # of words


def open_pdf(path: Path) -> Any:
    """The document, also if it is compressed by gzip.

    Raises:
        InputError: it cannot be read.
        ResourceError: the library is not installed.
    """
    try:
        library = import_module("pypdfium2")
    except ImportError:
        raise ResourceError("pypdfium2 is not installed; pip install 'cogvlm[engine]'") from None
    try:
        data = path.read_bytes()
        return library.PdfDocument(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (OSError, EOFError, library.PdfiumError) as error:
        raise InputError(f"{path}: no PDF that can be read ({error})") from None


def read_layer(page: Any, strict: bool = True) -> Layer:
    """The words of a page.

    Args:
        page: of the document.
        strict: refuse a layer that is hardly there, or has letters without meaning.

    Raises:
        Refused: no text, or one that means nothing: its fonts do not say which letters they show.
    """
    raw = import_module("pypdfium2.raw")
    if page.get_rotation():
        raise Refused("turned page")
    left, bottom, right, top = page.get_bbox()
    text = page.get_textpage()
    lines: list[list[Piece]] = [[]]
    letters: list[str] = []
    boxes: list[Box] = []
    strange = 0

    def end_word() -> None:
        if letters:
            # Signs beyond 16 bits come as two halves; one without the other means nothing.
            joined = "".join(letters).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            said = unicodedata.normalize("NFKC", joined).replace("\u00ad", "-")
            lines[-1].append(Piece(said, around(boxes)))
        letters.clear()
        boxes.clear()

    count = text.count_chars()
    for index in range(count):
        code = raw.FPDFText_GetUnicode(text.raw, index)
        sign = _SIGNS.get(code) or (chr(code) if code < 0x110000 else "\ufffd")
        if sign in "\r\n":
            end_word()
            if lines[-1]:
                lines.append([])
            continue
        if sign.isspace():
            end_word()
            continue
        x0, y0, x1, y1 = text.get_charbox(index)
        if x1 <= x0 or y1 <= y0:  # nothing is drawn
            continue
        box = (x0 - left, top - y1, x1 - left, top - y0)
        strange += sign == "\ufffd" or unicodedata.category(sign[0]) in ("Cc", "Co", "Cn")
        if letters and _apart(boxes[-1], box):
            end_word()
            # Far to the left, or on another height: the layer lacks the line's end.
            if lines[-1] and (box[0] < lines[-1][-1].box[0] or box[1] > lines[-1][-1].box[3]):
                lines.append([])
        letters.append(sign)
        boxes.append(box)
    end_word()
    if strict and (count < _LEAST_SIGNS or not any(lines)):
        raise Refused("no text layer")
    if strict and strange > 0.02 * count:
        raise Refused("letters without meaning", f"{strange} of {count}")
    return Layer((right - left, top - bottom), tuple(tuple(line) for line in lines if line))


def _apart(one: Box, other: Box) -> bool:
    """Whether two letters that follow one another cannot be of one word."""
    high = max(one[3] - one[1], other[3] - other[1], 4.0)
    return (
        other[0] - one[2] > 1.2 * high or other[2] < one[0] - high
        or other[1] > one[3] + 0.6 * high or other[3] < one[1] - 0.6 * high
    )  # fmt: skip


def parts(
    page: Any, layer: Layer, rng: Random, side: int, count: int
) -> Iterator[tuple[Image.Image, Truth] | Refused]:
    """Up to ``count`` parts of a page: pictures with their truth, or :class:`Refused`.

    Args:
        page: of the document.
        layer: its text.
        rng: chooses which lines and how large.
        side: a picture has at most as many pixels as a square of this side.
        count: how many are tried.
    """
    for _ in range(count):
        try:
            yield _part(page, layer, rng, side)
        except Refused as refused:
            yield refused


def _part(page: Any, layer: Layer, rng: Random, side: int) -> tuple[Image.Image, Truth]:
    first = int(rng.integers(len(layer.lines)))
    em = _em(layer.lines[first])
    target = side * _LEAST_EM * float(rng.uniform(1.15, 2.2))  # pixels an em
    chosen = _run(layer, first, em, int(rng.integers(1, 16)), (side * em / target) ** 2)
    box, inside = _frame(layer, chosen, em, float(rng.uniform(0.3, 1.2)))
    wide, high = box[2] - box[0], box[3] - box[1]
    scale = min(target / em, side / (wide * high) ** 0.5)
    if scale * em < side * _LEAST_EM:
        raise Refused("print too small", f"{scale * em:.1f} pixels")
    if max(wide, high) > 6 * min(wide, high):
        raise Refused("wider than 6:1")
    if sum(len(w.text) for line in inside for w in line) < _LEAST_LETTERS:
        raise Refused("hardly any text")
    image = page.render(
        scale=scale, crop=(box[0], layer.size[1] - box[3], layer.size[0] - box[2], box[1])
    ).to_pil()
    truth = truth_of(inside)
    moved = truth.moved(lambda b: clip(b, box, scale, image.size))
    return image.convert("RGB"), moved


def _frame(
    layer: Layer, chosen: list[tuple[Piece, ...]], em: float, margin: float
) -> tuple[Box, list[list[Piece]]]:
    """A box around the chosen lines whose edge cuts no letter, and the words in it by lines.

    Lines that would be cut are taken in, as long as the part stays small.
    """
    core = around([w.box for line in chosen for w in line])
    for pad in (margin * em, 0.5 * em, 0.3 * em, 0.3 * em, 0.2 * em, 0.1 * em):
        box = (max(0.0, core[0] - pad), max(0.0, core[1] - pad),
               min(layer.size[0], core[2] + pad), min(layer.size[1], core[3] + pad))  # fmt: skip
        touched = [[w for w in line if _overlap(w.box, box) > 0] for line in layer.lines]
        if all(_overlap(w.box, box) > 0.999 for line in touched for w in line):
            return box, [line for line in touched if line]
        if pad <= 0.5 * em:
            core = around([core, *(w.box for line in touched for w in line)])
    raise Refused("cuts through other text")


def _em(line: Sequence[Piece]) -> float:
    """About the size of print: letters that rise and fall make up three quarters of it."""
    box = around([w.box for w in line])
    return max(3.0, (box[3] - box[1]) / 0.85)


def _run(layer: Layer, first: int, em: float, most: int, area: float) -> list[tuple[Piece, ...]]:
    """Lines from ``first`` on that stand under one another in print of one size."""
    chosen = [layer.lines[first]]
    for line in layer.lines[first + 1 : first + most]:
        above, box = around([w.box for w in chosen[-1]]), around([w.box for w in line])
        near = 0 < box[3] - above[3] < 3 * em
        whole = around([w.box for part in (*chosen, line) for w in part])
        if not near or (whole[2] - whole[0]) * (whole[3] - whole[1]) > 0.9 * area:
            break
        chosen.append(line)
    return chosen


def _overlap(word: Box, box: Box) -> float:
    """Which share of a word is in the box."""
    across = min(word[2], box[2]) - max(word[0], box[0])
    down = min(word[3], box[3]) - max(word[1], box[1])
    if across <= 0 or down <= 0:
        return 0.0
    return across * down / max(1e-9, (word[2] - word[0]) * (word[3] - word[1]))


def truth_of(lines: Sequence[Sequence[Piece]]) -> Truth:
    """Of lines of words, in the order of reading; of leaders of dots the first one only."""
    lines = [[w for i, w in enumerate(line) if i == 0 or w.text != "." or line[i - 1].text != "."]
             for line in lines]  # fmt: skip
    rows = tuple(
        Piece(" ".join(w.text for w in line), around([w.box for w in line]), "line")
        for line in lines
    )
    words = tuple(w for line in lines for w in line)
    return Truth("\n".join(r.text for r in rows), words, rows)


def clip(word: Box, box: Box, scale: float, size: tuple[int, int]) -> Box:
    """A box of the page in pixels of the picture of its part ``box``."""
    x0, y0, x1, y1 = (scale * (v - box[i % 2]) for i, v in enumerate(word))
    # Thin signs have ink beside their outline.
    return (max(0.0, x0 - 0.5), max(0.0, y0 - 0.5), min(float(size[0]), x1 + 0.5),
            min(float(size[1]), y1 + 0.5))  # fmt: skip
