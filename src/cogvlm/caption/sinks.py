"""Where captions go: a text file beside each picture, one file of JSON lines, or tar shards.

Every sink may be killed at any time.  Opened again it knows what it has, and under a file's final
name there is a whole file or none.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import ConfigError, ImageError, InputError, ResourceError
from ..journal import append, dump, locked, open_journal, write_whole
from ..processor import load_image
from .pictures import Failure, Picture
from .work import Caption, never

FAILED = "_failed.jsonl"
_OF_ONE_FILE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR)
_KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}  # what loaders decode


class Sink(Protocol):
    """What takes captions."""

    failed: Path  # the list of failures
    done: Callable[[Picture], bool]  # can be sent to another process
    beside: bool  # whether every name of a picture has a caption of its own

    def put(self, captions: Sequence[Caption]) -> list[Failure]:
        """Store captions for good; those that cannot be stored come back."""

    def finish(self) -> list[Failure]:
        """The work is done."""


@dataclass(frozen=True)
class _HasSidecar:
    out: Path

    def __call__(self, picture: Picture) -> bool:
        return os.path.lexists(_sidecar(self.out, picture.name))


@dataclass(frozen=True)
class _IsKnown:
    names: frozenset[str]

    def __call__(self, picture: Picture) -> bool:
        return picture.name in self.names


class Sidecars:
    """``a/b.jpg`` -> ``a/b.txt``, in one line, as trainers of image generators read it."""

    beside = True

    def __init__(self, out: Path, overwrite: bool) -> None:
        self._out = out
        self.failed = out / FAILED
        self.done: Callable[[Picture], bool] = never if overwrite else _HasSidecar(out)

    @classmethod
    @contextmanager
    def open(cls, out: Path, overwrite: bool = False) -> Iterator[Sidecars]:
        """In the folder of the pictures, or in another that becomes its mirror.

        Raises:
            InputError: another run writes there, or nobody can.
        """
        with locked(out / ".caption.lock", str(out)):
            yield cls(out, overwrite)

    def put(self, captions: Sequence[Caption]) -> list[Failure]:
        """Write the files; those of folders that cannot be written come back."""
        failures = []
        for caption in captions:
            target = _sidecar(self._out, caption.name)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, (" ".join(caption.text.split()) + "\n").encode())
            except (OSError, ResourceError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                if not isinstance(cause, OSError) or cause.errno not in _OF_ONE_FILE:
                    raise
                failures.append(
                    Failure(caption.name, f"{str(target)!r} cannot be written ({cause.strerror})")
                )
        return failures

    def finish(self) -> list[Failure]:
        """Nothing is left to do."""
        return []


class Lines:
    """``{"file_name": "a/b.jpg", "text": ..., "prompt": ..., "stop": ...}`` a line.

    The names are those of the metadata.jsonl that the datasets library reads beside pictures.
    """

    beside = False

    def __init__(self, file: BinaryIO, names: Iterable[str], failed: Path) -> None:
        self._file = file
        self.failed = failed
        self.done: Callable[[Picture], bool] = _IsKnown(frozenset(names))

    @classmethod
    @contextmanager
    def open(cls, out: Path, overwrite: bool = False) -> Iterator[Lines]:
        """Appended to, or begun anew.

        Raises:
            InputError: another run writes it, nobody can, or it holds something else.
        """
        with open_journal(out, _line_key, "a caption") as (file, names):
            if overwrite:
                file.seek(0)
                file.truncate()
                names = set()
            failed = out.with_name(f"{out.stem}{FAILED}")
            yield cls(file, names, failed)

    def put(self, captions: Sequence[Caption]) -> list[Failure]:
        """Append lines, on the disk when this returns."""
        append(self._file, map(as_line, captions))
        return []

    def finish(self) -> list[Failure]:
        """Nothing is left to do."""
        return []


class Shards:
    """Webdataset: ``00000.tar`` with ``000000000.jpg``, ``.txt`` and ``.json``, and so on.

    ``captions.jsonl`` is what counts: shard ``i`` holds its lines ``i * size`` to ``(i + 1) *
    size``.  A shard that is there is whole; the last one is made at the end, and made again when
    lines are added.
    """

    beside = False

    def __init__(self, lines: Lines, folder: Path, out: Path, size: int) -> None:
        self._lines, self._folder, self._out, self._size = lines, folder, out, size
        self.failed, self.done = out / FAILED, lines.done
        self._pending: list[dict[str, Any]] = []
        self._index = 0  # of the shard that is being filled
        self._lost: list[Failure] = []  # not told yet

    @classmethod
    @contextmanager
    def open(
        cls, out: Path, folder: Path, size: int = 1000, overwrite: bool = False
    ) -> Iterator[Shards]:
        """Into folder ``out``, from pictures of ``folder``, ``size`` to a shard.

        Raises:
            ConfigError: ``size`` is below 1.
            InputError: another run writes there, nobody can, or the size was another.
        """
        if size < 1:
            raise ConfigError(f"shard_size={size} is out of range: give 1 or more")
        journal = out / "captions.jsonl"
        with Lines.open(journal, overwrite) as lines:
            if overwrite:
                for shard in out.glob("[0-9][0-9][0-9][0-9][0-9].tar"):
                    shard.unlink()
            _same_size(out / "shards.json", size, overwrite)
            sink = cls(lines, folder, out, size)
            sink._resume(journal)
            yield sink

    def put(self, captions: Sequence[Caption]) -> list[Failure]:
        """Note captions, and write the shards that are full."""
        if captions:
            # A shard that is there is never behind its lines.
            self._shard(self._index).unlink(missing_ok=True)
        self._lines.put(captions)
        self._pending += map(as_line, captions)
        while len(self._pending) >= self._size:
            self._pack()
        return self._told()

    def finish(self) -> list[Failure]:
        """Write the last shard, which need not be full."""
        if self._pending and not self._shard(self._index).exists():
            self._pack()
        return self._told()

    def _told(self) -> list[Failure]:
        lost, self._lost = self._lost, []
        return lost

    def _resume(self, journal: Path) -> None:
        with journal.open("rb") as file:
            while group := [json.loads(line) for line in islice(file, self._size)]:
                self._pending = group
                if len(group) < self._size:
                    break
                if self._shard(self._index).exists():
                    self._pending, self._index = [], self._index + 1
                else:
                    self._pack()

    def _shard(self, index: int) -> Path:
        return self._out / f"{index:05d}.tar"

    def _pack(self) -> None:
        """Write one shard; pictures that are gone by now are left out of it."""
        target = self._shard(self._index)
        half = target.with_name(f".{target.name}.part")
        first = self._index * self._size
        group, self._pending = self._pending[: self._size], self._pending[self._size :]
        try:
            with half.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
                for i, line in enumerate(group, first):
                    try:
                        _add(tar, f"{i:09d}", self._folder / line["file_name"], line)
                    except (ImageError, FileNotFoundError, PermissionError) as error:
                        reason = f"not in {target.name}: {error}"
                        self._lost.append(Failure(line["file_name"], reason))
                tar.close()
                file.flush()
                os.fsync(file.fileno())
            half.replace(target)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise ResourceError(
                f"{target}: cannot be written ({error.strerror}); make room and run it again, it "
                "goes on where it stopped"
            ) from error
        self._index += 1


def as_line(caption: Caption) -> dict[str, Any]:
    """A caption as one JSON object."""
    return {
        "file_name": caption.name,
        "text": caption.text,
        "prompt": caption.prompt,
        "stop": caption.stop,
    }


def _sidecar(out: Path, name: str) -> Path:
    return out / (os.path.splitext(name)[0] + ".txt")


def _line_key(values: dict[str, Any]) -> str | None:
    name = values.get("file_name")
    return name if isinstance(name, str) and isinstance(values.get("text"), str) else None


def _same_size(note: Path, size: int, overwrite: bool) -> None:
    if note.exists() and not overwrite:
        try:
            before = json.loads(note.read_text())["shard_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{note}: cannot be read; give --overwrite to begin anew") from error
        if before != size:
            raise InputError(
                f"{note.parent} was begun with --shard-size {before}; give that, or --overwrite"
            )
    else:
        write_whole(note, dump({"shard_size": size}))


def _add(tar: tarfile.TarFile, key: str, picture: Path, line: dict[str, Any]) -> None:
    suffix = _KEPT.get(picture.suffix.lower())
    if suffix is None:
        out = io.BytesIO()
        load_image(picture).save(out, "PNG")
        _add_bytes(tar, f"{key}.png", out.getvalue())
    else:
        with picture.open("rb") as source:
            entry = tarfile.TarInfo(f"{key}.{suffix}")
            entry.size = os.fstat(source.fileno()).st_size
            tar.addfile(entry, source)
    text = " ".join(line["text"].split())
    _add_bytes(tar, f"{key}.txt", text.encode())
    _add_bytes(tar, f"{key}.json", dump(line))


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
