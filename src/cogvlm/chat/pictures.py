"""A picture as a person names it: a path in any spelling that terminals produce, or a URL."""

from __future__ import annotations

import re
import shlex
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import DownloadError, ImageError, InputError
from ..processor import Image, load_image

MAX_BYTES = 32_000_000  # of a picture that is fetched
_TIMEOUT = 30.0  # seconds without a byte
_BEGINNING = re.compile(r"""["'~/\\]|\.{1,2}[/\\]|file://|[A-Za-z]:[/\\]""")


def picture(typed: str) -> Image:
    """The picture that was named; it is read here once, so that what is broken is told now.

    Raises:
        InputError: nothing was named.
        ImageError: it cannot be read.
        DownloadError: it cannot be fetched.
    """
    if not typed.strip():
        raise InputError("which picture? give a path or a URL")
    if typed.strip().lower().startswith(("http://", "https://")):
        found = Image(fetch(typed.strip()))
    else:
        found = Image(typed_path(typed))
    load_image(found.source)
    return found


def typed_path(typed: str) -> Path:
    """A path as it stands, quoted, with ``\\ `` for spaces, with ``~``, or as ``file://`` URL.

    >>> typed_path("'/tmp/my cat.png' ").as_posix(), typed_path("file:///tmp/a%20b.png").as_posix()
    ('/tmp/my cat.png', '/tmp/a b.png')
    """
    plain = typed.strip()
    for candidate in _readings(plain):
        if _is_file(candidate):
            return candidate
    *_, last = _readings(plain)
    return last


def leading_pictures(line: str) -> tuple[list[Path], str]:
    """Files that a line begins with, as a terminal writes what is dropped on it, and the rest."""
    found: list[Path] = []
    rest = line.strip()
    while _BEGINNING.match(rest):
        if _is_file(whole := typed_path(rest)):
            return [*found, whole], ""
        word = _first_word(rest)
        if word is None or not _is_file(path := typed_path(word)):
            break
        found.append(path)
        rest = rest[len(word) :].strip()
    return found, rest


def fetch(url: str) -> bytes:
    """A picture from an http address that a person typed: private ones are theirs to name.

    Raises:
        DownloadError: it cannot be fetched, is too large, or is no http address.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DownloadError(f"{url}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(f"{url}: only http and https addresses are fetched")
    request = urllib.request.Request(url, headers={"Accept": "image/*", "User-Agent": "cogvlm"})
    try:
        with _opener().open(request, timeout=_TIMEOUT) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise DownloadError(f"{url}: the server says {error.code}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise DownloadError(f"{url}: cannot be fetched ({reason})") from None
    if len(data) > MAX_BYTES:
        raise DownloadError(f"{url}: over {MAX_BYTES // 1_000_000} MB; download and shrink it")
    try:
        load_image(data)
    except ImageError as error:
        raise DownloadError(f"{url}: no picture came ({error})") from None
    return data


def _opener() -> urllib.request.OpenerDirector:
    # Built by hand: the usual one also opens file: and ftp: addresses, by redirects too.
    opener = urllib.request.OpenerDirector()
    handlers: list[Any] = [
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ]
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _readings(plain: str) -> list[Path]:
    """What a typed path may mean, likeliest last."""
    readings = [plain]
    if words := _words(plain):
        readings.append(words)
    out = []
    for text in readings:
        if text.lower().startswith("file://"):
            text = unquote(urlsplit(text).path)
            text = re.sub(r"^/([A-Za-z]:)", r"\1", text)  # file:///C:/a.png
        path = Path(text)
        if text.startswith("~"):
            with suppress(RuntimeError):  # no such user
                path = path.expanduser()
        out.append(path)
    return out


def _words(text: str) -> str | None:
    """One word in a shell's quoting, without it."""
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe
        return None
    return words[0] if len(words) == 1 else None


def _first_word(text: str) -> str | None:
    """The first word in a shell's quoting, as written."""
    quoted = re.match(r"""("[^"]*"|'[^']*'|\\.|[^\s"'\\])+""", text)
    return quoted.group() if quoted else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name: it was a sentence
        return False
