"""Where the pictures of a record are: files under a root, members of an archive, or bytes.

Nothing is opened here.  A name never leads out of its root unless the caller allows it: training
sets come from strangers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ...errors import InputError
from ...processor.messages import Image, Video, parse_messages

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


class FileSlice(io.RawIOBase):
    """``size`` bytes of a file from ``offset`` on, as a file; opened for every reading.

    It holds no handle, so it can be pickled and there may be millions.
    """

    def __init__(self, path: Path, offset: int, size: int, name: str) -> None:
        super().__init__()
        self.path, self.offset, self.size, self.name = path, offset, size, name
        self._at = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.offset, self.size, self.name)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the start of the slice."""
        return self._at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if base + to < 0:
            raise ValueError(f"seek to {base + to}")
        self._at = base + to
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """As of any file."""
        left = max(0, self.size - self._at)
        count = left if size is None or size < 0 else min(size, left)
        with self.path.open("rb") as file:
            file.seek(self.offset + self._at)
            data = file.read(count)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """As of any file."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@dataclass(frozen=True)
class Files:
    """Pictures named by the records of one file.

    Args:
        root: relative names begin here.
        allow_outside: names, absolute ones and links may lead out of ``root``.
    """

    root: Path
    allow_outside: bool = False

    def open(self, value: Any, video: bool = False) -> Image | Video:
        """The picture or video that ``value`` means.

        Args:
            value: a path, a ``data:`` or ``file:`` URL, bytes, or ``{"bytes", "path"}`` as in the
                files of Hugging Face datasets.
            video: whether it is a video.

        Raises:
            InputError: nothing of these, a missing file, or one that is out of bounds.
        """
        kind = "video" if video else "picture"
        if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            if not value:
                raise InputError(f"the {kind} has no bytes; it was perhaps not written fully")
            return Video(value) if video else Image(value)
        if not isinstance(value, str) or not value:
            raise InputError(f"the {kind} is {_short(value)}; give a path")
        if value.startswith("data:"):
            return _decoded(value, video)
        source = self.find(value, kind)
        return Video(source) if video else Image(source)

    def find(self, name: str, kind: str) -> Any:
        """The source of a name: here a path that exists within bounds."""
        scheme = urlsplit(name).scheme if "://" in name else ""
        if scheme == "file":
            name = unquote(urlsplit(name).path)
        elif scheme:
            raise InputError(
                f"{kind} {_short(name)} is a URL, which is not fetched; download it and give a path"
            )
        path = self.root / name
        try:
            real = path.resolve()
            found = real.exists()
        except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links, too long a name
            raise InputError(f"{kind} {_short(name)} is no path that can be opened") from None
        # Bounds come first: whether a file out there exists is nobody's business.
        if not self.allow_outside and not real.is_relative_to(self.root.resolve()):
            raise InputError(
                f"{kind} {_short(name)} is outside of {self.root}; move it there, name the folder "
                "of the pictures with --images, or trust the file and say --allow-outside"
            )
        if not found:
            raise InputError(f"{kind} {_short(name)} does not exist under {self.root}")
        if not real.is_file():
            raise InputError(f"{kind} {_short(name)} is not a file")
        return path


@dataclass(frozen=True)
class Members(Files):
    """Pictures named by a record inside an archive: members of its own group alone."""

    members: tuple[tuple[str, FileSlice], ...] = ()  # full name and bytes

    def find(self, name: str, kind: str) -> Any:
        """The member of this name, with its folder or without."""
        for full, data in self.members:
            if name in (full, full.rpartition("/")[2]):
                return data
        raise InputError(f"{kind} {_short(name)} is not in the record's group of members")


def _decoded(url: str, video: bool) -> Image | Video:
    part = {"type": "image_url", "image_url": {"url": url}}
    image = parse_messages([{"role": "user", "content": [part]}])[0].images[0]
    return Video(image.source) if video and isinstance(image.source, bytes) else image


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:100] + "..."
