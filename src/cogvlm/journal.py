"""A file of JSON lines that only grows: locked, and right on the disk after every append.

Knows nothing of what the lines say.  A process may be killed at any time; who opens the file again
cuts off a torn last line and learns which keys the others hold.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, ResourceError

Key = Callable[[dict[str, Any]], "str | None"]
"""What a line is known by; none if it is no line of such a file."""


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Be the only one who writes ``what``; the folder of the lock file ``path`` is made.

    Raises:
        InputError: another process is writing it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{what}: another run is writing it; wait, or name another") from error
    except OSError as error:
        raise InputError(f"{what}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def open_journal(path: Path, key: Key, noun: str) -> Iterator[tuple[BinaryIO, set[str]]]:
    """The file, locked and ready to append to, and the keys that it holds.

    Raises:
        InputError: another process writes it, it cannot be written, or it holds another kind of
            lines than ``noun`` says; it is left as it is then.
    """
    with locked(path.with_name(f".{path.name}.lock"), str(path)), _open(path) as file:
        yield file, _resume(file, path, key, noun)


def read_object(line: str, where: str) -> dict[str, Any]:
    """One line as a JSON object.

    Raises:
        InputError: it is none; ``where`` is named.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: {type(values).__name__} where a JSON object is expected")
    return values


def append(file: BinaryIO, lines: Iterable[dict[str, Any]]) -> None:
    """Put lines on the disk before anything else is done.

    Raises:
        ResourceError: the disk is full or gone.
    """
    text = b"".join(map(dump, lines))
    try:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise ResourceError(
            f"{file.name}: cannot be written ({error.strerror}); make room and run it again, it "
            "goes on where it stopped"
        ) from error


def dump(line: dict[str, Any]) -> bytes:
    """One line, its end included."""
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair: legal in JSON, not in UTF-8
        return json.dumps(line).encode() + b"\n"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that under its name there is all of it or what was there before.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    # The same name every time: what a killed process leaves is written over by the next.
    half = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.part")
    try:
        with half.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise ResourceError(f"{path}: cannot be written ({error.strerror})") from error


def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _open(path: Path) -> BinaryIO:
    try:
        path.touch()
        return path.open("r+b")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _resume(file: BinaryIO, path: Path, key: Key, noun: str) -> set[str]:
    """Cut a torn last line; leave ``file`` at its end and return the keys of its lines."""
    keys: set[str] = set()
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        if line.strip():
            keys.add(_key(line, key, f"{path}:{number}", noun))
    file.seek(end)
    file.truncate()
    return keys


def _key(line: bytes, key: Key, where: str, noun: str) -> str:
    try:
        found = key(read_object(line.decode(), where))
    except (InputError, UnicodeDecodeError):
        found = None
    if found is None:
        raise InputError(f"{where}: not {noun}; repair the file or name another")
    return found
