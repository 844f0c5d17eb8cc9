"""The fonts that pages are set in: text faces, those of fixed width, and Chinese ones.

Finding them opens every font of the machine once; the list is kept in the cache folder until a
font comes or goes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from ...errors import ConfigError, ResourceError
from ...hub import cache_dir
from ...journal import dump, write_whole
from ..fonts import SUFFIXES, FontFile, FontSampler, default_folders, find_fonts, load, split
from .step import Random

_CJK = re.compile(
    r"cjk|wqy|wenquan|source ?han|simsun|simhei|pingfang|uming|ukai|songti|heiti", re.I
)
_MONO = re.compile(r"mono|courier|code|console|hack|typewriter|fixed|inconsolata|cousine", re.I)
_EMOJI = re.compile(r"color ?emoji", re.I)


@dataclass(frozen=True)
class Faces:
    """Fonts of one side, training or held out."""

    text: tuple[FontFile, ...]
    mono: tuple[FontFile, ...]
    han: tuple[FontFile, ...]  # may be empty

    def pick(self, rng: Random, kind: str = "text") -> FontFile:
        """A face, every family group equally likely.

        Raises:
            ResourceError: there is no face of the kind.
        """
        return _sampler(getattr(self, kind), kind).pick(rng)


@lru_cache(maxsize=8)
def _sampler(fonts: tuple[FontFile, ...], kind: str) -> FontSampler:
    if not fonts:
        raise ResourceError(f"no {kind} font on this machine; install one (DejaVu, Noto CJK)")
    return FontSampler(fonts)


@lru_cache(maxsize=256)
def opened(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A face at ``size`` pixels an em."""
    return load(path, size)


def find_faces(folders: Sequence[Path] = (), *, held_out: bool = False) -> Faces:
    """Fonts of ``folders``, or of this machine.

    A face is held out with its whole family, as for nano's lines.

    Raises:
        ConfigError: a folder does not exist.
        ResourceError: no usable font on this side.
    """
    latin, han = _listed(tuple(folders))
    sides = split(latin)
    side = sides[held_out] or latin  # with very few fonts one side may have none
    if not side:
        raise ResourceError("no usable fonts; install some (DejaVu, Liberation) or name folders")
    mono = tuple(f for f in side if _MONO.search(f"{f.family} {f.style}"))
    if not mono:
        mono = tuple(f for f in latin if _MONO.search(f"{f.family} {f.style}")) or tuple(side)
    return Faces(tuple(side), mono, tuple(han))


def find_emoji() -> Path | None:
    """The font of coloured pictures, if there is one."""
    for folder in default_folders():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and _EMOJI.search(path.stem.replace("-", " ")):
                return path
    return None


def _listed(folders: tuple[Path, ...]) -> tuple[list[FontFile], list[FontFile]]:
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"font folder {str(folder)!r} does not exist; name another")
    files = sorted(
        p
        for folder in folders or default_folders()
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES
    )
    note = cache_dir() / "fonts.json"
    key = _key(files)
    if (known := _read(note, key)) is not None:
        return known
    latin = find_fonts(folders or None)
    han = [f for p in files if _CJK.search(p.stem) and (f := _chinese(p)) is not None]
    lists = [[{**asdict(f), "path": str(f.path)} for f in fonts] for fonts in (latin, han)]
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, dump({"key": key, "fonts": lists}))
    except (OSError, ResourceError):
        pass  # it is found again next time
    return latin, han


def _key(files: Sequence[Path]) -> str:
    sha = hashlib.sha256()
    for path in files:
        try:
            found = path.stat()
        except OSError:
            continue
        sha.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def _read(note: Path, key: str) -> tuple[list[FontFile], list[FontFile]] | None:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["key"] != key:
            return None
        latin, han = (
            [FontFile(Path(f["path"]), f["family"], f["style"]) for f in fonts]
            for fonts in known["fonts"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return latin, han


def _chinese(path: Path) -> FontFile | None:
    """A face that has its own glyphs for common signs of Chinese."""
    try:
        font = load(path, 32)
    except ResourceError:
        return None
    missing = bytes(font.getmask("\U0010ffff", mode="L"))
    signs = {bytes(font.getmask(sign, mode="L")) for sign in "的我中。"}
    if missing in signs or len(signs) < 4:
        return None
    family, style = (name or "" for name in font.getname())
    return FontFile(path, family, style.strip())
