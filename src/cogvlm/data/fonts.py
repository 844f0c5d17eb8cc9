"""Find the text fonts of a machine, split them by family, draw them at random.

Knows nothing about text or pictures. A usable face has a real glyph for every printable ASCII
character and the anatomy of a text face (ascenders rise, descenders fall, stops are small), which
refuses symbols, dingbats and small capitals without a list of their names.
"""

from __future__ import annotations

import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ImageFont

from cogvlm.data.text import PRINTABLE, stable_fraction
from cogvlm.errors import ConfigError, ResourceError

SUFFIXES = (".ttf", ".otf", ".ttc")
# Geometric steps: the cache would be of no use if every size in between occurred.
SIZES = (16, 18, 20, 22, 25, 28, 32, 36, 40, 45, 50, 57, 64)

# Faces with ASCII glyphs that are not meant for reading lines of text.
_NO_TEXT = re.compile(
    r"symbol|dingbat|wingding|webding|emoji|ornament|initials|keyboard|keyfont|small ?caps|outline"
    r"|\bmath\b|integrals|nonunicode|variants|icons?\b|awesome|braille|barcode|blank|redacted",
    re.IGNORECASE,
)
# Of Noto's hundreds of scripts, most repeat the Latin of Noto Sans.
_NOTO = re.compile(r"Noto (Sans|Serif|Sans Mono|Sans Display|Serif Display)$")
# Families whose outlines descend from one another although their names differ.
_KIN = {
    "arimo": "liberation", "tinos": "liberation", "cousine": "liberation",
    "carlito": "lato", "hack": "deja", "verana": "deja", "bitstream": "deja",
    "free": "nimbus", "tex": "nimbus", "p052": "pagella", "noto": "open", "droid": "open",
    "xits": "stix", "libertinus": "linux", "latin": "cmu", "lm": "cmu", "lmroman": "cmu",
}  # fmt: skip


@dataclass(frozen=True)
class FontFile:
    """One face on disk: its file, and family and style as the file names them."""

    path: Path
    family: str
    style: str

    @property
    def group(self) -> str:
        """Families that share a design share a group: ``DejaVu Sans Mono`` -> ``deja``.

        The first word of the name, cut where small letters turn to capitals, and known kinship.
        Too large a group costs variety only; one too small would put a design on both sides.
        """
        words = re.findall(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z0-9]+", self.family)
        first = words[0].lower() if words else self.family.lower()
        return _KIN.get(first, first)


def default_folders() -> list[Path]:
    """The system's and the user's font folders that exist here."""
    home = Path.home()
    if sys.platform == "darwin":
        names = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    elif sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", home / "AppData/Local"))
        windows = Path(os.environ.get("WINDIR", "C:/Windows"))
        names = [windows / "Fonts", local / "Microsoft/Windows/Fonts"]
    else:
        data = Path(os.environ.get("XDG_DATA_HOME", home / ".local/share"))
        names = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), data / "fonts"]
        names.append(home / ".fonts")
    return [folder for folder in names if folder.is_dir()]


def find_fonts(folders: Sequence[Path] | None = None) -> list[FontFile]:
    """Usable text faces in ``folders`` and below (default: :func:`default_folders`).

    Faces of one family and style found twice (a package in two formats) count once. Sorted by
    family, style and path; of a collection (``.ttc``) only the first face is read.

    Raises:
        ConfigError: a named folder does not exist.
    """
    for folder in folders or ():
        if not folder.is_dir():
            raise ConfigError(f"font folder {str(folder)!r} does not exist; name another")
    places = default_folders() if folders is None else folders
    found: dict[tuple[str, str, str], FontFile] = {}
    for path in sorted(p for folder in places for p in folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and (font := _read(path)) is not None:
            found.setdefault((font.family, font.style, path.stem.lower()), font)
    return sorted(found.values(), key=lambda f: (f.family, f.style, str(f.path)))


def load(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """The face at ``size`` pixels an em. Basic layout: the same on every machine, no ligatures.

    Raises:
        ResourceError: the file is no font.
    """
    try:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ResourceError(f"font {str(path)!r} cannot be opened: {error}") from error


def _read(path: Path) -> FontFile | None:
    try:
        font = load(path, 40)
        family, style = (name or "" for name in font.getname())
        if not family or _NO_TEXT.search(f"{family} {style}"):
            return None
        if family.startswith("Noto ") and not _NOTO.match(family):
            return None
        if not (_has_anatomy(font) and _has_all_glyphs(font)):
            return None
    except (OSError, ResourceError):
        return None  # a damaged font file, or a bitmap one without this size
    return FontFile(path, family, style.strip())


def _has_all_glyphs(font: ImageFont.FreeTypeFont) -> bool:
    """Whether every printable ASCII character has ink of its own and the blank has none."""
    missing = _glyph(font, "\U0010ffff")
    glyphs = {char: _glyph(font, char) for char in PRINTABLE}
    blank = glyphs.pop(" ")
    if any(blank[1]) or font.getlength(" ") <= 0:
        return False
    if any(glyph == missing or not any(glyph[1]) for glyph in glyphs.values()):
        return False
    letters = "abcdefghijklmnopqrstuvwxyz"
    return all(glyphs[c] != glyphs[c.upper()] for c in letters)


def _glyph(font: ImageFont.FreeTypeFont, char: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(char, mode="L")
    return mask.size, bytes(mask)


def _has_anatomy(font: ImageFont.FreeTypeFont) -> bool:
    """Whether the glyphs sit where those of a text face do; heights in x-heights."""
    top, bottom = {}, {}
    for char in "xoldphgAM.-_":
        mask, (_, above) = font.getmask2(char, mode="L", anchor="ls")
        ink = mask.getbbox()  # font.getbbox() would count the baseline as ink
        if ink is None:
            return False
        top[char], bottom[char] = -above - ink[1], -above - ink[3]  # y up from the baseline
    x = top["x"] - bottom["x"]
    if x < 6:
        return False
    stands = all(abs(bottom[c]) < 0.25 * x for c in "xoldhAM.")
    rises = all(top[c] > 1.12 * x for c in "ldhAM")
    falls = all(bottom[c] < -0.15 * x for c in "pg")
    small = top["."] < 0.6 * x and top["-"] - bottom["-"] < 0.5 * x and top["_"] < 0.2 * x
    return stands and rises and falls and small


def split(
    fonts: Sequence[FontFile], held_out: float = 0.1, seed: int = 0
) -> tuple[list[FontFile], list[FontFile]]:
    """``(train, held_out)``: whole family groups, about ``held_out`` of them on the right.

    A group's side depends on its name and ``seed`` only: not on the machine, nor on what other
    fonts it has. With few fonts the right side may be empty.

    Raises:
        ConfigError: ``held_out`` outside 0..1.
    """
    if not 0.0 <= held_out <= 1.0:
        raise ConfigError(f"held_out is {held_out}: a share between 0 and 1 is needed")
    sides: tuple[list[FontFile], list[FontFile]] = ([], [])
    for font in fonts:
        sides[stable_fraction(font.group, seed) < held_out].append(font)
    return sides


class FontSampler:
    """Draws faces at random: first a family group, then a face of it, then a size.

    Large families therefore do not dominate. Opened faces are kept, the last ``keep`` used ones:
    each may hold a file open, and some systems allow 256.

    Raises:
        ResourceError: ``fonts`` is empty.
    """

    def __init__(self, fonts: Sequence[FontFile], seed: int = 0, keep: int = 128) -> None:
        if not fonts:
            raise ResourceError(
                "no usable fonts; install some (DejaVu, Liberation) or name folders"
            )
        groups: dict[str, list[FontFile]] = {}
        for font in sorted(fonts, key=lambda f: (f.family, f.style, str(f.path))):
            groups.setdefault(font.group, []).append(font)
        self.groups = [groups[name] for name in sorted(groups)]
        self.keep = max(1, keep)
        self._rng = np.random.default_rng(seed)
        self._open: OrderedDict[tuple[Path, int], ImageFont.FreeTypeFont] = OrderedDict()

    def __iter__(self) -> Iterator[ImageFont.FreeTypeFont]:
        """Opened faces without end, by the sampler's own seed."""
        while True:
            yield self.sample(self._rng)

    def pick(self, rng: np.random.Generator) -> FontFile:
        """A face: every group equally likely, then every face of the group."""
        group = self.groups[int(rng.integers(len(self.groups)))]
        return group[int(rng.integers(len(group)))]

    def sample(
        self, rng: np.random.Generator, sizes: Sequence[int] = SIZES
    ) -> ImageFont.FreeTypeFont:
        """An opened face at one of ``sizes`` (pixels an em); depends on ``rng`` alone."""
        return self.open(self.pick(rng), sizes[int(rng.integers(len(sizes)))])

    def open(self, font: FontFile, size: int) -> ImageFont.FreeTypeFont:
        """The face at ``size`` pixels an em, opened at most once while it is kept."""
        key = (font.path, size)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        self._open[key] = opened = load(font.path, size)
        if len(self._open) > self.keep:
            self._open.popitem(last=False)
        return opened
