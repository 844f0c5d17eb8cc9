"""Where every record of a file begins and ends, so that any of them can be read alone.

A file is gone through once, damaged places are noted and passed over.  Knows nothing about what
the records mean.
"""

from __future__ import annotations

import json
import mmap
import re
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .media import FileSlice

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Strings come first: brackets inside them are text.  No JSON string holds a bare line break, so a
# forgotten quotation mark spoils one line and not the rest of the file.
# Strings with what is between them are one token, since every token costs a step in Python.
_TOKEN = re.compile(rb'(?:"[^"\\\n]*(?:\\.[^"\\\n]*)*"[\s:,]*)+|[\[\]{}]')
_FIRST_KEY = re.compile(rb'\{\s*("[^"\n]*"\s*:)')
_OPEN, _CLOSE = b"[{", b"]}"


@dataclass
class Problem:
    """A place of a file where no record can be read."""

    where: str
    reason: str


@dataclass
class Spans:
    """Records of one JSON file: byte ranges and lines, ``int64[N, 3]`` of start, end, line."""

    path: Path
    table: NDArray[np.int64]
    problems: list[Problem] = field(default_factory=list)

    def line(self, index: int) -> int:
        """The line, from 1, on which the record begins."""
        return int(self.table[index, 2])

    def parse(self, index: int) -> Any:
        """The record as an object.

        Raises:
            InputError: not UTF-8 or not JSON.
        """
        start, end, line = map(int, self.table[index])
        with self.path.open("rb") as file:
            file.seek(start)
            return parse_json(file.read(end - start), line)


def parse_json(data: bytes, line: int = 1) -> Any:
    """An object from the bytes of JSON that begin on ``line`` of their file.

    Raises:
        InputError: not UTF-8 or not JSON; the line is named.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise InputError(
            f"not UTF-8 (byte 0x{data[error.start]:02x} in line {at}); save it as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON ({error.msg}: line {line + error.lineno - 1}, column {error.colno})"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"not JSON that can be read ({error})") from None


def json_spans(path: Path) -> Spans:
    """The records of a JSON list, or of JSON lines; the first sign of the file decides.

    Raises:
        InputError: unreadable, empty, UTF-16, or one object over several lines.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            if head.startswith(_UTF16):
                raise InputError(f"{path}: UTF-16; save it as UTF-8")
            start = len(_BOM) if head.startswith(_BOM) else 0
            first = head[start:].lstrip()[:1]
            if not first and not file.read().strip():
                raise InputError(f"{path}: empty; it was perhaps not written fully")
            if first == b"[":
                return _List(path, start).spans()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return _lines(path, start)


def _lines(path: Path, start: int) -> Spans:
    rows: list[tuple[int, int, int]] = []
    with path.open("rb") as file:
        file.seek(start)
        at = start
        for number, line in enumerate(file, 1):
            if line.strip():
                if not rows and line.strip() == b"{":
                    raise InputError(
                        f"{path}: one object over several lines; give a list [...] of records or "
                        "one record a line"
                    )
                rows.append((at, at + len(line), number))
            at += len(line)
    return Spans(path, np.array(rows, np.int64).reshape(-1, 3))


class _List:
    """Finds the elements of a JSON list by counting brackets."""

    def __init__(self, path: Path, start: int) -> None:
        self.path, self.start = path, start
        self.rows: list[tuple[int, int, int]] = []
        self.problems: list[Problem] = []
        self.line, self.counted = 1, 0
        self.head: re.Pattern[bytes] | None = None

    def spans(self) -> Spans:
        with (
            self.path.open("rb") as file,
            closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data,
        ):
            at: int | None = data.find(b"[", self.start) + 1
            while at is not None:
                at = self._scan(data, at)
        return Spans(self.path, np.array(self.rows, np.int64).reshape(-1, 3), self.problems)

    def _scan(self, data: mmap.mmap, at: int) -> int | None:
        """Read elements from ``at`` on; the place to go on from after a damaged one, or none."""
        depth, begin, behind, closed, fresh = 0, at, at, False, True
        for token in _TOKEN.finditer(data, at):
            sign = data[token.start()]
            if depth == 0 and sign not in _CLOSE:
                begin = token.start()
                self._between(data, behind, begin, b"" if fresh else b",")
                closed = fresh = False
                # Records of one file begin with the same key: how the next one is known again.
                if self.head is None and (key := _FIRST_KEY.match(data, begin)):
                    self.head = re.compile(rb"\{\s*" + re.escape(key[1]))
            if sign in _OPEN:
                depth += 1
            elif sign in _CLOSE and depth:
                depth -= 1
            elif sign in _CLOSE:
                closed = closed or sign == ord("]")
                continue
            if depth == 0:
                behind = token.end()
                self.rows.append((begin, behind, self._line(data, begin)))
        if depth == 0 and closed:
            self._between(data, behind, len(data), b"]")
            return None
        return self._lost(data, begin, behind, depth)

    def _between(self, data: mmap.mmap, start: int, end: int, due: bytes) -> None:
        gap = b"".join(data[start:end].split())
        if gap != due:
            found = repr(gap[:40].decode(errors="replace")) if gap else "nothing"
            self._problem(data, start, f"{found} where {due.decode()!r} is due between records")

    def _lost(self, data: mmap.mmap, begin: int, behind: int, depth: int) -> int | None:
        """The list has no end: a record is not closed.  Cut it off where the next one begins."""
        if depth == 0 and (not self.rows or self.rows[-1][1] != behind):
            begin = behind
        elif depth == 0:
            begin = self.rows[-1][0]
        following = self.head.search(data, begin + 1) if self.head is not None else None
        if following is None:
            reason = "the record is not closed" if depth else "the list is not closed by ']'"
            self._problem(data, begin if depth else behind, f"{reason}; the file is perhaps cut")
            return None
        if depth == 0 and self.rows and self.rows[-1][0] == begin:
            self.rows.pop()  # it swallowed the rest of the file
        self._problem(data, begin, "the record is not closed: a bracket or brace is missing")
        return following.start()

    def _problem(self, data: mmap.mmap, at: int, reason: str) -> None:
        while at < len(data) and data[at : at + 1].isspace():
            at += 1
        self.problems.append(Problem(f"{self.path}:{self._line(data, at)}", reason))

    def _line(self, data: mmap.mmap, at: int) -> int:
        if at < self.counted:
            return data[:at].count(b"\n") + 1
        self.line += data[self.counted : at].count(b"\n")
        self.counted = at
        return self.line


# --- archives ----------------------------------------------------------------------------------


@dataclass
class Group:
    """Members of an archive with one key: ``a/7.jpg`` and ``a/7.txt`` are the group ``a/7``."""

    key: str
    members: dict[str, FileSlice] = field(default_factory=dict)  # by extension, without the dot
    reason: str | None = None  # why it cannot be used


def tar_groups(path: Path) -> tuple[list[Group], list[Problem]]:
    """The groups of an archive, in order, and what of it cannot be read.

    Raises:
        InputError: compressed, or not a tar file from its first byte on.
    """
    groups: list[Group] = []
    problems: list[Problem] = []
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in _members(archive, path, problems):
                _sort_in(groups, member, path, size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(
            f"{path}: not a tar file ({error}); unpack it if it is compressed"
        ) from error
    return groups, problems


def _members(
    archive: tarfile.TarFile, path: Path, problems: list[Problem]
) -> Iterator[tarfile.TarInfo]:
    last = "the start"
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, EOFError, ValueError, OSError) as error:
            problems.append(Problem(f"{path}", f"cut off or damaged after {last} ({error})"))
            return
        if member is None:
            if not _ends(archive, path):
                problems.append(Problem(f"{path}", f"cut off or damaged after {last}"))
            return
        last = f"member {member.name!r}"
        # The library keeps every member it has seen.
        archive.members = []  # type: ignore[attr-defined]
        yield member


def _ends(archive: tarfile.TarFile, path: Path) -> bool:
    """Whether zeros, the mark of the end, stand where the next member would; tarfile is silent."""
    with path.open("rb") as file:
        file.seek(archive.offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _sort_in(groups: list[Group], member: tarfile.TarInfo, path: Path, size: int) -> None:
    folder, slash, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if member.isdir() or not stem:  # folders, and the hidden files of some systems
        return
    key = folder + slash + stem
    if not groups or groups[-1].key != key:
        groups.append(Group(key))
    group, extension = groups[-1], extension.lower()
    if not member.isfile():
        group.reason = f"member {member.name!r} is a link or device; write the file itself"
    elif member.offset_data + member.size > size:
        group.reason = f"member {member.name!r} is cut off; download the archive again"
    elif extension in group.members:
        group.reason = f"two members {member.name!r}; every extension once in a group"
    else:
        name = f"{path}[{member.name}]"
        group.members[extension] = FileSlice(path, member.offset_data, member.size, name)
