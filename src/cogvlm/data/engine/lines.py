"""Single lines of print, as nano was trained on them first."""

from __future__ import annotations

from ..fonts import SIZES
from ..lines import LineStyle, render_line
from . import words
from .faces import opened
from .pages import Setting
from .step import Picture, Piece, Random, Refused, Truth

_WIDEST = 6.0  # the aspect beyond which CogVLM's own training left pictures out


def picture(setting: Setting, rng: Random) -> Picture:
    """A line with a box for each word: its advance wide, the picture's full height."""
    text = setting.corpus.phrase(rng, int(rng.integers(1, 4)))
    if not text.isascii() or not text.strip():
        raise Refused("no ASCII", text[:40])
    font = opened(setting.faces.pick(rng).path, words.pick(rng, SIZES[:9]))
    line = render_line(text, font, rng, LineStyle(strength=setting.strength, fill=(0.5, 0.95)))
    if line.image.width > _WIDEST * line.image.height:
        raise Refused("wider than 6:1", text[:40])
    image = line.image.convert("RGB")
    pieces, at = [], 0
    for word in text.split(" "):
        first, last = line.extents[at], line.extents[at + len(word) - 1]
        x0, x1 = sorted((float(first[0]), float(last[1])))
        box = (max(0.0, x0), 0.0, min(float(image.width), x1), float(image.height))
        pieces.append(Piece(word, box))
        at += len(word) + 1
    whole = (pieces[0].box[0], 0.0, pieces[-1].box[2], float(image.height))
    truth = Truth(text, tuple(pieces), (Piece(text, whole, "line"),), caption="A line of print.")
    return Picture.of(image, truth)
