"""Which files of a folder are pictures, in an order that is the same every time.

Opens none of them.  Hidden files and folders are left out, a folder is entered once by whatever
links lead to it, and a picture that is found under its own name is known as such under another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# What people keep pictures in; that Pillow cannot read all of it is said picture by picture.
SUFFIXES = frozenset(
    """
    .apng .avif .bmp .dds .gif .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm
    .psd .qoi .tga .tif .tiff .webp
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Picture:
    """A file that is a picture by its name.

    Attributes:
        path: Where it is.
        name: The same within the folder, with ``/`` between its parts.
        link: It is also found under another name.
        twin: Another picture beside it that differs in the suffix alone and comes first.
    """

    path: Path
    name: str
    link: bool = False
    twin: str | None = None


@dataclass(frozen=True)
class Failure:
    """A picture, or a folder, without captions, and why."""

    name: str
    reason: str


@dataclass
class _Seen:
    """What was met so far; only links are remembered, of which there are few."""

    root: Path
    deep: bool
    folders: set[tuple[int, int]] = field(default_factory=set)
    files: set[tuple[int, int]] = field(default_factory=set)

    def enter(self, path: str) -> bool:
        """Whether a folder is to be entered."""
        try:
            found = os.stat(path)
        except OSError:
            return True  # its listing will say what is wrong
        key = (found.st_dev, found.st_ino)
        new = key not in self.folders
        self.folders.add(key)
        return new

    def again(self, entry: os.DirEntry[str]) -> bool:
        """Whether a file has, or had, another name here."""
        try:
            linked = entry.is_symlink()
            if linked and self.finds(Path(os.path.realpath(entry.path))):
                return True
            found = entry.stat()
        except OSError:
            return False
        if not linked and found.st_nlink < 2:
            return False
        key = (found.st_dev, found.st_ino)
        old = key in self.files
        self.files.add(key)
        return old

    def finds(self, target: Path) -> bool:
        """Whether the walk meets the target of a link under its own name."""
        if not target.is_relative_to(self.root):
            return False
        parts = target.relative_to(self.root).parts
        hidden = any(part.startswith(".") for part in parts)
        reached = not hidden and (self.deep or len(parts) < 2) and _is_picture(target.name)
        return reached and target.is_file()


def find(folder: Path, recursive: bool = True) -> Iterator[Picture | Failure]:
    """Pictures of a folder, sorted within each folder, files before folders.

    A folder that cannot be read comes as a failure.
    """
    seen = _Seen(Path(os.path.realpath(folder)), recursive)
    seen.enter(str(folder))
    return _walk(str(folder), "", seen)


def _walk(folder: str, prefix: str, seen: _Seen) -> Iterator[Picture | Failure]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        yield Failure(prefix or ".", f"folder cannot be read ({error.strerror})")
        return
    folders: list[os.DirEntry[str]] = []
    first: dict[str, str] = {}
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            folders.append(entry)
        elif _is_picture(entry.name):
            stem = os.path.normcase(os.path.splitext(entry.name)[0])
            other = first.setdefault(stem, entry.name)
            twin = None if other == entry.name else other
            yield Picture(Path(entry.path), prefix + entry.name, seen.again(entry), twin)
    for entry in folders if seen.deep else ():
        target = Path(os.path.realpath(entry.path))
        inside = entry.is_symlink() and target.is_relative_to(seen.root)
        hidden = inside and any(
            part.startswith(".") for part in target.relative_to(seen.root).parts
        )
        # A link to a folder of this tree is left to the folder's own name.
        if (not inside or hidden) and seen.enter(entry.path):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", seen)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False
