"""Samples to webdataset shards, rejects to lists beside them, and the counts of both.

::

    OUT/00000.tar          members KEY.png (or KEY.0.jpg, KEY.1.jpg, ...) and KEY.json
    OUT/rejects/00000.jsonl
    OUT/stats/00000.json   counts of one shard
    OUT/index.json         all of them together: what is in here, from where, under which licence

The bytes of a shard depend on its samples alone.  Under a file's name there is all of it or none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from ... import __version__
from ...errors import InputError, ResourceError
from ...journal import dump, write_whole
from .step import Item, Reject, Sample

INDEX = "index.json"
_COUNTS = ("kinds", "sources", "licences", "tasks")
_TRIES = 20  # an endless maker may refuse so many samples for each that is kept


@dataclass
class Stats:
    """What is in a shard, or in several."""

    samples: int = 0
    pictures: int = 0
    bytes: int = 0
    questions: int = 0
    answer_chars: int = 0
    words: int = 0  # with a box
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    sides: dict[str, list[int]] = field(default_factory=dict)  # width, height: least, greatest
    rejects: dict[str, Counter[str]] = field(default_factory=dict)  # step -> reason -> how many

    def add(self, sample: Sample) -> None:
        """Count a sample that is kept."""
        self.samples += 1
        self.pictures += len(sample.pictures)
        self.questions += sum(t.role == "user" for t in sample.turns)
        self.answer_chars += sum(len(t.text) for t in sample.turns if t.role == "assistant")
        self.kinds[sample.kind] += 1
        self.sources[sample.source] += 1
        self.licences[sample.licence] += 1
        self.tasks.update(sample.tasks)
        for picture in sample.pictures:
            self.words += len(picture.truth.words)
            for name, side in zip(("width", "height"), picture.size, strict=True):
                self._side(name, side, side)

    def refuse(self, reject: Reject) -> None:
        """Count a sample that is not."""
        self.rejects.setdefault(reject.step, Counter())[reject.reason] += 1

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the counts of another, as :meth:`as_dict` gave them."""
        for name in ("samples", "pictures", "bytes", "questions", "answer_chars", "words"):
            setattr(self, name, getattr(self, name) + other[name])
        for name in _COUNTS:
            getattr(self, name).update(other[name])
        for name, (low, high) in other["sides"].items():
            self._side(name, low, high)
        for step, reasons in other["rejects"].items():
            self.rejects.setdefault(step, Counter()).update(reasons)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON, in an order that does not depend on how the counts came together."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in _COUNTS:
            plain[name] = dict(sorted(plain[name].items()))
        plain["sides"] = dict(sorted(plain["sides"].items()))
        plain["rejects"] = {s: dict(sorted(r.items())) for s, r in sorted(self.rejects.items())}
        return plain

    def _side(self, name: str, low: int, high: int) -> None:
        known = self.sides.get(name, [low, high])
        self.sides[name] = [min(known[0], low), max(known[1], high)]


def write_shard(
    out: Path, shard: int, items: Iterable[Item], limit: int | None, endless: bool
) -> dict[str, Any]:
    """Write one shard, its rejects and its counts; returns the counts.

    Args:
        out: folder of the set.
        shard: number of the shard.
        items: what goes in; taken up to ``limit`` samples.
        limit: most samples; none for all there are.
        endless: ``items`` has no end, so too many rejects in a row are an error.

    Raises:
        InputError: an endless maker whose samples are refused nearly always.
        ResourceError: the disk is full, or the folder cannot be written.
    """
    stats, rejects = Stats(), io.BytesIO()
    target = out / f"{shard:05d}.tar"
    half = out / f".{target.name}.part"
    try:
        for folder in (out, out / "rejects", out / "stats"):
            folder.mkdir(parents=True, exist_ok=True)
        with half.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in _kept(items, limit, endless, stats, rejects):
                    _add_sample(tar, f"{shard:05d}-{stats.samples:06d}", sample)
                    stats.add(sample)
            file.flush()
            os.fsync(file.fileno())
        stats.bytes = half.stat().st_size
        plain = {"file": target.name, "sha256": _digest(half), **stats.as_dict()}
        half.replace(target)
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({error.strerror}); make room") from error
    finally:
        half.unlink(missing_ok=True)
    write_whole(out / "rejects" / f"{shard:05d}.jsonl", rejects.getvalue())
    write_whole(stats_file(out, shard), dump(plain))
    return plain


def stats_file(out: Path, shard: int) -> Path:
    """Written last: where it stands, the shard is whole."""
    return out / "stats" / f"{shard:05d}.json"


def write_index(out: Path, shards: Iterable[Mapping[str, Any]], made: Mapping[str, Any]) -> Stats:
    """Write ``index.json`` over the counts of all shards; returns their sum.

    Args:
        out: folder of the set.
        shards: what :func:`write_shard` returned for each.
        made: how the set was made: the command's settings.
    """
    total, rows = Stats(), []
    for plain in sorted(shards, key=lambda s: str(s["file"])):
        total.merge(plain)
        rows.append({k: plain[k] for k in ("file", "samples", "bytes", "sha256")})
    index = {"cogvlm": __version__, "made": dict(made), **total.as_dict(), "shards": rows}
    text = json.dumps(index, ensure_ascii=False, indent=1)
    write_whole(out / INDEX, text.encode() + b"\n")
    return total


def _kept(
    items: Iterable[Item], limit: int | None, endless: bool, stats: Stats, rejects: BinaryIO
) -> Iterator[Sample]:
    refused, last = 0, ""
    if limit == 0:
        return
    for item in items:
        if isinstance(item, Reject):
            stats.refuse(item)
            rejects.write(dump(asdict(item)))
            refused, last = refused + 1, f"{item.step}: {item.reason}"
            if endless and refused > _TRIES * (limit or 0) + 100:
                raise InputError(
                    f"{refused} samples were refused and {stats.samples} kept, the last because "
                    f"of {last!r}; loosen that rule or leave the kind out"
                )
            continue
        yield item
        if limit is not None and stats.samples >= limit:
            return


def _add_sample(tar: tarfile.TarFile, key: str, sample: Sample) -> None:
    several = len(sample.pictures) > 1
    names = []
    for number, picture in enumerate(sample.pictures):
        name = f"{key}.{number}.{picture.suffix}" if several else f"{key}.{picture.suffix}"
        names.append(name)
        _add_bytes(tar, name, picture.data)
    _add_bytes(tar, f"{key}.json", dump(sample.as_json(names)))


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # no time and no owner: the same bytes on every machine
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
