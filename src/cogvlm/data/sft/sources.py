"""Places where records lie, each a sequence that any record can be read from alone.

A source keeps no file open, so it can be sent to worker processes.  Which kind lies at a path is
found out in :mod:`cogvlm.data.sft.recognise`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...errors import InputError
from ...processor.messages import VIDEO_SUFFIXES, Image, Video
from .index import Group, Problem, Spans, json_spans, parse_json, tar_groups
from .media import PICTURE_SUFFIXES, Files, Members
from .record import Record, RecordError
from .shapes import Shape, read_object

_TEXTS = ("txt", "caption")


@dataclass(frozen=True)
class Options:
    """How a path is read.

    Args:
        question: of records that have none of their own.
        images: folder that the names of pictures begin in; default: where the file lies.
        allow_outside: names of pictures may lead out of that folder.
    """

    question: str | None = None
    images: Path | None = None
    allow_outside: bool = False


@dataclass
class Raw:
    """A record as it lies there."""

    values: Any
    files: Files
    given: Sequence[Image | Video] = ()


@dataclass
class Source:
    """Records of one place; the base of the kinds below.

    ``problems`` are places where no record can be read at all.
    """

    path: Path
    options: Options = field(default_factory=Options)
    shapes: tuple[Shape, ...] = ()  # none: as each record is written
    problems: list[Problem] = field(default_factory=list)
    kind = "source"

    def __len__(self) -> int:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """File and line, or file and member, of a record."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The id of a record that has none: made of its place, without the folder above."""
        raise NotImplementedError

    def raw(self, index: int) -> Raw:
        """The record before it is understood.

        Raises:
            InputError: it cannot be read.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        """Read a record.

        Raises:
            RecordError: it is not usable; where it is and why.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        where = self.where(index)
        try:
            raw = self.raw(index)
            found = read_object(
                raw.values, raw.files, self.options.question, self.shapes, raw.given
            )
        except (InputError, OSError) as error:
            raise RecordError(where, " ".join(str(error).split())) from None
        name = found.id if found.id is not None else self.name(index)
        source = str(self.path)
        return Record(found.messages, name, source, where, found.unread, found.unplaced)

    def __iter__(self) -> Iterator[Record]:
        """All records in the order of the file; the first bad one raises."""
        return (self[index] for index in range(len(self)))

    def key(self, index: int) -> str:
        """What decides between training and held out: the id."""
        try:
            values = self.raw(index).values
        except InputError:
            return self.name(index)
        found = values.get("id") if isinstance(values, dict) else None
        return self.name(index) if found is None else str(found)

    def _files(self, beside: Path) -> Files:
        return Files(self.options.images or beside, self.options.allow_outside)


@dataclass
class JsonFile(Source):
    """JSON lines, or a JSON list."""

    kind = "json"

    def __post_init__(self) -> None:
        self.spans: Spans = json_spans(self.path)
        self.problems = self.spans.problems

    def __len__(self) -> int:
        return len(self.spans.table)

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.path}:{self.spans.line(index)}"

    def name(self, index: int) -> str:
        """File and number of the record; lines may move."""
        return f"{self.path.name}#{index}"

    def raw(self, index: int) -> Raw:
        """See :meth:`Source.raw`."""
        return Raw(self.spans.parse(index), self._files(self.path.parent))


@dataclass
class Labels(Source):
    """A folder ``labels*`` of CogVLM-SFT: one JSON file a picture, pictures in ``../images``."""

    kind = "sft"

    def __post_init__(self) -> None:
        self.names = sorted(p.name for p in self.path.iterdir() if p.suffix.lower() == ".json")
        self.images = self.options.images or self.path.parent / "images"
        if not self.images.is_dir():
            raise InputError(f"{self.path}: no folder {self.images} with its pictures")
        self.pictures: dict[str, list[str]] = {}
        for picture in sorted(self.images.iterdir()):
            if picture.suffix.lower() in PICTURE_SUFFIXES:
                self.pictures.setdefault(picture.stem, []).append(picture.name)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        """The file of the label."""
        return str(self.path / self.names[index])

    def name(self, index: int) -> str:
        """Two folders and the file, without suffix."""
        return "/".join([*self.path.absolute().parts[-2:], Path(self.names[index]).stem])

    def key(self, index: int) -> str:
        """Without the language: a picture is held out in all of them or in none."""
        return f"{self.path.absolute().parent.name}/{Path(self.names[index]).stem}"

    def raw(self, index: int) -> Raw:
        """See :meth:`Source.raw`."""
        values = parse_json((self.path / self.names[index]).read_bytes())
        stem = Path(self.names[index]).stem
        found = self.pictures.get(stem, [])
        if len(found) != 1:
            raise InputError(f"{len(found) or 'no'} pictures {stem}.* in {self.images}; give one")
        files = Files(self.images, self.options.allow_outside)
        given = files.open(found[0])
        return Raw(values, files, (given,))


@dataclass
class Pictures(Source):
    """A folder of pictures with a text beside each: ``a/7.jpg`` and ``a/7.txt`` (or ``.json``)."""

    kind = "folder"

    def __post_init__(self) -> None:
        groups: dict[str, dict[str, str]] = {}
        for path in sorted(self.path.rglob("*")):
            suffix = path.suffix.lower()
            known = suffix in PICTURE_SUFFIXES or suffix in VIDEO_SUFFIXES
            if not known and suffix not in (".txt", ".caption", ".json"):
                continue
            if path.stem.upper() in ("README", "LICENSE") or path.name.startswith("."):
                continue
            name = path.relative_to(self.path).as_posix()
            groups.setdefault(name[: -len(suffix)], {})[suffix[1:]] = name
        self.groups = list(groups.items())

    def __len__(self) -> int:
        return len(self.groups)

    def where(self, index: int) -> str:
        """The file of the text, or where there is none the picture."""
        files = self.groups[index][1]
        named = next((files[k] for k in ("json", *_TEXTS) if k in files), None)
        return str(self.path / (named or next(iter(files.values()))))

    def name(self, index: int) -> str:
        """The path inside the folder, without suffix."""
        return self.groups[index][0]

    def raw(self, index: int) -> Raw:
        """See :meth:`Source.raw`."""
        stem, found = self.groups[index]
        files = Files(self.path, self.options.allow_outside)
        texts = {k: (self.path / n).read_bytes() for k, n in found.items() if _is_text(k)}
        shown = [
            files.open(n, f".{k}" in VIDEO_SUFFIXES) for k, n in found.items() if not _is_text(k)
        ]
        if not shown:
            raise InputError(f"no picture {stem}.* beside it")
        return Raw(_values(texts, f"{stem}.txt"), files, shown)


@dataclass
class Archive(Source):
    """A webdataset shard: a tar file whose members with one key are one record."""

    kind = "webdataset"

    def __post_init__(self) -> None:
        self.groups: list[Group]
        self.groups, self.problems = tar_groups(self.path)

    def __len__(self) -> int:
        return len(self.groups)

    def where(self, index: int) -> str:
        """File and key of the members."""
        return f"{self.path}: member {self.groups[index].key}"

    def name(self, index: int) -> str:
        """The key of the members, which webdatasets keep unique among all shards."""
        return self.groups[index].key

    def raw(self, index: int) -> Raw:
        """See :meth:`Source.raw`."""
        group = self.groups[index]
        if group.reason is not None:
            raise InputError(group.reason)
        ends = {name: "." + name.rpartition(".")[2] for name in group.members}
        shown: list[Image | Video] = []
        # Copies: a file has a place where it is read, and a record may be read twice.
        slices = {name: copy(data) for name, data in group.members.items()}
        for name, data in slices.items():
            if ends[name] in PICTURE_SUFFIXES:
                shown.append(Image(cast(BinaryIO, data)))
            elif ends[name] in VIDEO_SUFFIXES:
                shown.append(Video(cast(BinaryIO, data)))
        texts = {k: data.read() for k, data in slices.items() if _is_text(k)}
        members = tuple((f"{group.key}.{k}", data) for k, data in slices.items())
        files = Members(self.path, members=members)
        return Raw(_values(texts, f"{group.key}.txt"), files, shown)


@dataclass
class Rows(Source):
    """Rows of a Hugging Face dataset; pictures stay as their stored bytes."""

    rows: Any = None  # datasets.Dataset
    kind = "datasets"

    def __post_init__(self) -> None:
        columns = self.rows.column_names
        self.ids = self.rows.with_format(None)["id"] if "id" in columns else None
        self.rows = self.rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Path and row, from 0 as the library counts."""
        return f"{self.path}: row {index}"

    def name(self, index: int) -> str:
        """Name and row."""
        return f"{self.path.name}#{index}"

    def key(self, index: int) -> str:
        """See :meth:`Source.key`; the pictures stay where they are."""
        return self.name(index) if self.ids is None else str(self.ids[index])

    def raw(self, index: int) -> Raw:
        """See :meth:`Source.raw`."""
        return Raw(self.rows[index].to_pylist()[0], self._files(self.path.parent))


@dataclass
class Joined(Source):
    """Several sources one after another."""

    parts: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        self.ends = list(accumulate(map(len, self.parts)))
        self.problems = [problem for part in self.parts for problem in part.problems]
        self.kind = "+".join(sorted({part.kind for part in self.parts}))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _at(self, index: int) -> tuple[Source, int]:
        part = bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> Record:
        """See :meth:`Source.__getitem__`."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        part, inside = self._at(index)
        return part[inside]

    def raw(self, index: int) -> Raw:
        """As its part reads it."""
        part, inside = self._at(index)
        return part.raw(inside)

    def where(self, index: int) -> str:
        """As its part says."""
        part, inside = self._at(index)
        return part.where(inside)

    def key(self, index: int) -> str:
        """As its part says."""
        part, inside = self._at(index)
        return part.key(inside)


def _is_text(extension: str) -> bool:
    return extension in (*_TEXTS, "json")


def _values(texts: dict[str, bytes], wanted: str) -> Any:
    """The object of a group: its JSON, or its text as a caption; text fills JSON that has none."""
    try:
        captions = {k: data.decode("utf-8-sig").strip() for k, data in texts.items() if k != "json"}
    except UnicodeDecodeError as error:
        raise InputError(f"text is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    caption = next(iter(captions.values()), None)
    if "json" not in texts:
        if caption is None:
            raise InputError(f"no text {wanted} beside it")
        return {"caption": caption}
    values = parse_json(texts["json"])
    spoken = ("messages", "conversations", "texts", "captions", "answer", "truth", "caption")
    if caption is not None and isinstance(values, dict) and not any(k in values for k in spoken):
        # Tools that fetch pictures write what they know of one into the JSON beside its text.
        return {**{k: v for k, v in values.items() if k != "text"}, "caption": caption}
    return values
