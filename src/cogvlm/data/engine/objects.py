"""Drawings and photographs of things with their names, put on a ground at known places.

The things are Tux Paint's stamps (Debian's ``tuxpaint-stamps-default``), described by their
authors in many languages, and the pictures of an emoji font, named by Unicode.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import surface
from ..text import HELD_OUT, stable_fraction
from . import words
from .faces import find_emoji
from .pages import Setting
from .step import Fact, Piece, Random, Refused, Truth

SOURCE = "tuxpaint-stamps+emoji"
LICENCE = "GPL-2.0-or-later (stamps), OFL-1.1 (emoji)"
FOLDERS = (Path("/usr/share/tuxpaint/stamps"), Path("/usr/local/share/tuxpaint/stamps"))
_EMOJI_SIZE = 109  # the one size that bitmap fonts of emoji have
_RANGES = (
    (0x1F32D, 0x1F37F),
    (0x1F400, 0x1F43E),
    (0x1F680, 0x1F6A4),
    (0x1F950, 0x1F96F),
    (0x1F980, 0x1F9AE),
    (0x1F3A0, 0x1F3CA),
    (0x1F4D0, 0x1F4DA),
    (0x1F9F0, 0x1F9FA),
)
_ARTICLE = re.compile(r"^(an?|the|some)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Thing:
    """Something that has a name and a picture."""

    name: str  # "red kangaroo"
    phrase: str  # "a red kangaroo"
    path: Path | None = None
    sign: str = ""  # of the emoji font
    zh: str = ""


def missing() -> str:
    """Why there are no objects on this machine; nothing if there are."""
    if _stamp_folder() is None and find_emoji() is None:
        return "neither Tux Paint's stamps (tuxpaint-stamps-default) nor an emoji font is installed"
    return ""


def _stamp_folder() -> Path | None:
    return next((folder for folder in FOLDERS if folder.is_dir()), None)


@lru_cache(maxsize=2)
def things(held_out: bool = False) -> tuple[Thing, ...]:
    """All of this machine, on one side: a name is held out with everything that has it."""
    found = [*_stamps(), *_emoji()]
    return tuple(t for t in found if (stable_fraction(t.name) < HELD_OUT) == held_out)


def _stamps() -> Iterator[Thing]:
    folder = _stamp_folder()
    for note in sorted(folder.rglob("*.txt")) if folder is not None else ():
        picture = note.with_suffix(".png")
        if not picture.is_file():
            continue
        rows = note.read_text(encoding="utf-8", errors="replace").splitlines()
        said = rows[0].strip().rstrip(".!") if rows else ""
        name = _ARTICLE.sub("", said).strip().lower()
        if not 2 < len(name) <= 40 or not said.isascii():
            continue
        zh = next((r.partition("=")[2] for r in rows if r.startswith("zh_cn.utf8=")), "")
        phrase = said[0].lower() + said[1:] if _ARTICLE.match(said) else _with_article(name)
        yield Thing(name, phrase, picture, zh=zh.strip().rstrip("。."))


def _emoji() -> Iterator[Thing]:
    font = find_emoji()
    if font is None:
        return
    for first, last in _RANGES:
        for point in range(first, last + 1):
            name = unicodedata.name(chr(point), "").lower()
            if name and not any(w in name for w in ("modifier", "tone", "with", "face", "symbol")):
                yield Thing(name, _with_article(name), font, sign=chr(point))


def _with_article(name: str) -> str:
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@lru_cache(maxsize=64)
def picture_of(thing: Thing) -> Image.Image:
    """RGBA, without empty borders.

    Raises:
        Refused: the file is damaged, or there is nothing to see.
    """
    try:
        if thing.sign:
            font = ImageFont.truetype(str(thing.path), _EMOJI_SIZE)
            image = Image.new("RGBA", (160, 160))
            ImageDraw.Draw(image).text((10, 10), thing.sign, font=font, embedded_color=True)
        else:
            assert thing.path is not None
            image = Image.open(thing.path).convert("RGBA")
    except (OSError, ValueError) as error:
        raise Refused("drawing cannot be read", f"{thing.name}: {error}") from None
    # What is nearly clear is not seen; a box around it would be too large.
    box = image.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 24:
        raise Refused("drawing is empty", thing.name)
    return image.crop(box)


def scene(setting: Setting, rng: Random) -> tuple[Image.Image, Truth]:
    """One to four things, apart from one another, on a ground."""
    known = things(setting.held_out)
    if not known:
        raise Refused("no objects on this side")
    size = setting.size(rng, 0.7, 1.5)
    grey, colour = (surface.clouds((size[1], size[0]), rng, channels) for channels in (1, 3))
    ground = grey + (colour - grey) * np.float32(rng.uniform(0.1, 0.6))
    level = float(rng.choice((255, 235, 200, 120)))
    image = surface.picture(level - ground * 90 * float(rng.random() < 0.6) * setting.strength)
    count = int(rng.choice((1, 2, 3, 4), p=(0.45, 0.25, 0.18, 0.12)))
    chosen = words.several(rng, known, count)
    if count > 1 and rng.random() < 0.3:
        chosen[-1] = chosen[0]  # two of a kind, to be counted
    pieces = _place(image, chosen, rng)
    names = [p.text for p in pieces]
    facts = [Fact("object", name) for name in dict.fromkeys(names)]
    facts += [Fact("count", str(names.count(name)), name) for name in dict.fromkeys(names)]
    phrases = {t.name: t.phrase for t in chosen}
    said = [
        phrases[n] if names.count(n) == 1 else f"{names.count(n)} times {phrases[n]}"
        for n in dict.fromkeys(names)
    ]
    caption = ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1]
    extra = {"zh": chosen[0].zh} if len(pieces) == 1 and chosen[0].zh else {}
    caption = caption[0].upper() + caption[1:] + "."
    return image, Truth(items=tuple(pieces), facts=tuple(facts), caption=caption, extra=extra)


def _place(image: Image.Image, chosen: list[Thing], rng: Random) -> list[Piece]:
    """Paste them into different cells of a grid; returns where they are."""
    columns = 1 if len(chosen) == 1 else 2
    rows = -(-len(chosen) // columns)
    cells = words.several(rng, [(c, r) for c in range(columns) for r in range(rows)], len(chosen))
    wide, high = image.width / columns, image.height / rows
    pieces = []
    for thing, (column, row) in zip(chosen, cells, strict=True):
        drawing = picture_of(thing)
        if rng.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = rng.uniform(0.45, 0.95) * min(wide / drawing.width, high / drawing.height)
        scale = min(scale, 2.0)  # coarse when enlarged more
        fitted = drawing.resize(
            (max(8, round(drawing.width * scale)), max(8, round(drawing.height * scale))),
            Image.Resampling.LANCZOS,
        )
        x = round(column * wide + rng.uniform(0, wide - fitted.width))
        y = round(row * high + rng.uniform(0, high - fitted.height))
        image.paste(fitted, (x, y), fitted)
        box = (float(x), float(y), float(x + fitted.width), float(y + fitted.height))
        pieces.append(Piece(thing.name, box, "object"))
    return pieces
