"""What lies at a path -> the source that reads it."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import ConfigError, InputError, ResourceError
from .media import PICTURE_SUFFIXES
from .shapes import Shape
from .sources import Archive, Joined, JsonFile, Labels, Options, Pictures, Rows, Source

FORMATS: dict[str, tuple[Shape, ...]] = {
    "llava": ("conversations",),
    "sharegpt": ("conversations",),
    "openai": ("messages",),
    "qa": ("question",),
    "sft": ("captions", "conversations"),
    "webdataset": (),
    "datasets": (),
    "folder": (),
}
"""Names of formats, and the shapes of records that each may hold; none for any."""

_JSON = frozenset({".json", ".jsonl", ".ndjson"})
_TABLES = frozenset({".parquet", ".arrow"})
_LISTS = ("labels.jsonl", "metadata.jsonl", "requests.jsonl")
_PACKED = frozenset({".tgz", ".gz", ".zip", ".zst", ".xz", ".bz2", ".7z"})


def open_source(
    path: str | Path, format: str | None = None, options: Options | None = None
) -> Source:
    """The records at a path.

    Args:
        path: a file, a folder, or a pattern such as ``shards/*.tar``.
        format: one of :data:`FORMATS` instead of what is found there.
        options: see :class:`Options`.

    Raises:
        ConfigError: an unknown format.
        InputError: nothing there, nothing that is known, or not of the format.
        ResourceError: the library that reads it is not installed.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format {format!r} is not known; known: {', '.join(FORMATS)}")
    options = options or Options()
    path = Path(path).expanduser()
    if not path.exists() and glob.has_magic(str(path)):
        found = [Path(p) for p in sorted(glob.glob(str(path)))]
        if not found:
            raise InputError(f"{path}: nothing has such a name")
        return _several(path, found, format, options)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    source = _folder(path, format, options) if path.is_dir() else _file(path, format, options)
    for part in source.parts if isinstance(source, Joined) else (source,):
        part.shapes = FORMATS[format] if format is not None else ()
    return source


def _several(path: Path, found: Sequence[Path], format: str | None, options: Options) -> Source:
    if all(p.suffix in _TABLES for p in found):
        return _tables(path, found, options)
    return Joined(path, options, parts=tuple(open_source(p, format, options) for p in found))


def _file(path: Path, format: str | None, options: Options) -> Source:
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        raise InputError(f"{path}: compressed, so no record can be read alone; unpack it")
    if suffix == ".tar":
        return _only(Archive(path, options), format, "webdataset")
    if suffix in _TABLES:
        return _only(_tables(path, [path], options), format, "datasets")
    if suffix in _JSON:
        return _only(JsonFile(path, options), format, "llava", "sharegpt", "openai", "qa", "sft")
    raise InputError(
        f"{path}: {suffix or 'no suffix'} is not known; give .json, .jsonl, .tar, .parquet, "
        "or a folder"
    )


def _only(source: Source, format: str | None, *kinds: str) -> Source:
    if format is not None and format not in kinds:
        raise InputError(f"{source.path}: not a source of format {format!r}")
    return source


def _folder(path: Path, format: str | None, options: Options) -> Source:
    if format == "folder":
        return _pictures(path, options)
    names = sorted(p.name for p in path.iterdir())
    if "dataset_dict.json" in names:
        splits = ", ".join(p.name for p in sorted(path.iterdir()) if p.is_dir())
        raise InputError(f"{path}: several splits; give one of {splits}")
    if {"dataset_info.json", "state.json"} <= set(names):
        return _only(_saved(path, options), format, "datasets")
    if labels := _labels(path):
        return _only(_sft(path, labels, options), format, "sft")
    for suffixes, kind in (({".tar"}, "webdataset"), (_TABLES, "datasets")):
        if found := [path / name for name in names if Path(name).suffix in suffixes]:
            return _only(_several(path, found, None, options), format, kind)
    lists = [name for name in _LISTS if name in names]
    lists = lists or [n for n in names if Path(n).suffix in _JSON]
    stems = {Path(name).stem for name in names if Path(name).suffix.lower() in PICTURE_SUFFIXES}
    lists = [name for name in lists if Path(name).stem not in stems]
    if len(lists) == 1:
        return open_source(path / lists[0], format, options)
    if lists:
        raise InputError(f"{path}: several files of records; give one of {', '.join(lists[:8])}")
    return _only(_pictures(path, options), format, "folder")


def _labels(path: Path) -> list[Path]:
    """Folders of labels at, in, or one folder below ``path``."""
    if path.name.startswith("labels") and (path.parent / "images").is_dir():
        return [path]
    for pattern in ("labels*", "*/labels*"):
        found = sorted(p for p in path.glob(pattern) if p.is_dir())
        found = [p for p in found if (p.parent / "images").is_dir()]
        if found:
            return found
    return []


def _sft(path: Path, labels: Sequence[Path], options: Options) -> Source:
    if len(labels) == 1:
        return Labels(labels[0], options)
    return Joined(path, options, parts=tuple(Labels(p, options) for p in labels))


def _pictures(path: Path, options: Options) -> Source:
    if options.images is not None:
        raise InputError(f"{path}: texts lie beside their pictures; leave the other folder out")
    source = Pictures(path, options)
    if not len(source):
        raise InputError(
            f"{path}: no records; known are a folder of pictures with texts, labels.jsonl, images/ "
            "with labels*/, .json, .jsonl, .tar, .parquet, and a saved dataset"
        )
    return source


def _saved(path: Path, options: Options) -> Source:
    datasets = _library(path)
    try:
        return Rows(path, options, rows=datasets.load_from_disk(str(path)))
    except Exception as error:  # the library and Arrow raise nearly anything on broken files
        raise _broken(path, error) from None


def _tables(path: Path, files: Sequence[Path], options: Options) -> Source:
    datasets = _library(path)
    try:
        if all(file.suffix == ".arrow" for file in files):
            tables = [datasets.Dataset.from_file(str(file)) for file in files]
            return Rows(path, options, rows=datasets.concatenate_datasets(tables))
        # Written once to the library's cache in a form that any row can be read alone from.
        return Rows(path, options, rows=datasets.Dataset.from_parquet([str(f) for f in files]))
    except Exception as error:  # the library and Arrow raise nearly anything on broken files
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> InputError:
    cause = error.__cause__ or error
    return InputError(f"{path}: cannot be read ({' '.join(str(cause).split())[:200]})")


def _library(path: Path) -> Any:
    try:
        return import_module("datasets")
    except ImportError:
        raise ResourceError(
            f"{path}: Hugging Face's datasets reads it; pip install 'cogvlm[data]'"
        ) from None
