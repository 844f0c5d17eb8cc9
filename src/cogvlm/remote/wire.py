"""OpenAI's chat completions on the wire, seen from the client: what is sent, what comes back.

Sends nothing itself.  Answers of servers are foreign data: every field is checked, and what is
shown of them is one printable line.
"""

from __future__ import annotations

import base64
import io
import json
import random
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage
from PIL.JpegImagePlugin import get_sampling

from ..backend import Reply
from ..errors import MessageError, RemoteError
from ..processor import Image, ImageLimits, Message, Text, load_image

if TYPE_CHECKING:
    import httpx

    from .client import Endpoint

_LOSSY = frozenset({"JPEG", "WEBP", "AVIF", "HEIF", "MPO"})
_FINE = {"quality": 95, "subsampling": 0}  # of a JPEG
_STOPS = {"stop": "end", "length": "length"}
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_OF_THE_REQUEST = frozenset({400, 413, 415, 422, 500})  # another request may fare better
_LONGEST = 120.0  # seconds that a server may make us wait


# --- what is sent ------------------------------------------------------------------------------


def to_json(message: Message, max_side: int) -> dict[str, Any]:
    """A message in the form of the API, pictures as ``data:`` URLs.

    Raises:
        MessageError: a video.
        ImageError: a picture cannot be read.
    """
    if not message.visuals:
        return {"role": message.role, "content": message.text}
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        elif isinstance(part, Image):
            url = data_url(part, max_side)
            content.append({"type": "image_url", "image_url": {"url": url}})
        else:
            raise MessageError(
                "a video is not sent to a server: the protocol has none; ask a local video model, "
                "or give frames as pictures"
            )
    return {"role": message.role, "content": content}


def data_url(image: Image, max_side: int, limits: ImageLimits | None = None) -> str:
    """A picture as a ``data:`` URL: its pixels, written anew, upright.

    Whatever else is in its file stays here: place, time and camera, comments, previews, further
    frames, what hangs on behind.  A JPEG stays one, of its own quality; other lossy formats become
    one of high quality, all others PNG.

    Args:
        image: of any kind.
        max_side: pixels; larger ones are scaled down to it, 0: never.
        limits: of what is read.

    Raises:
        ImageError: it cannot be read.
    """
    # Refuses what is no picture: nothing else leaves this machine.
    picture = load_image(image.source, limits)
    picture.info = {}  # which Pillow would write into the new file
    kind, options = _format(image.source)
    if 0 < max_side < max(picture.size):
        picture.thumbnail((max_side, max_side), PILImage.Resampling.LANCZOS)
        options = _FINE if kind == "JPEG" else options
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return f"data:{PILImage.MIME[kind]};base64,{base64.b64encode(out.getvalue()).decode()}"


def _format(source: Any) -> tuple[str, dict[str, Any]]:
    """The format to write a picture in that was read from ``source``, and its options."""
    if isinstance(source, PILImage.Image):
        return "PNG", {}
    with PILImage.open(io.BytesIO(_file(source))) as file:
        if file.format not in _LOSSY:
            return "PNG", {}
        tables = getattr(file, "quantization", None)
        # With the tables it was made with, a JPEG loses next to nothing, and grows by nothing.
        return "JPEG", {"qtables": tables, "subsampling": get_sampling(file)} if tables else _FINE


def _file(source: Any) -> bytes:
    if isinstance(source, (str, Path)):
        return Path(source).read_bytes()
    if isinstance(source, bytes):
        return source
    source.seek(0)
    return bytes(source.read())


# --- what comes back ---------------------------------------------------------------------------


def whole(data: bytes, host: str) -> Reply:
    """An answer that came in one piece.

    Raises:
        RemoteError: it is none.
    """
    values = _object(data, host)
    _raise_error(values, host)
    choice = _choice(values)
    message = choice.get("message") if choice else None
    text = message.get("content", "") if isinstance(message, dict) else None
    text = "" if isinstance(message, dict) and text is None else text
    if choice is None or not isinstance(text, str):
        raise _foreign(host, data)
    usage = values.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Reply(text, tokens if type(tokens) is int else None, _stop(choice))


def events(response: httpx.Response, host: str) -> Generator[str, None, Reply]:
    """Pieces of a streamed answer; returns the whole.

    Raises:
        RemoteError: an error inside the stream, an early end, or no stream at all.
    """
    if "event-stream" not in response.headers.get("content-type", ""):
        reply = whole(response.read(), host)  # a server that does not stream
        yield reply.text
        return reply
    pieces: list[str] = []
    stop: str | None = None
    tokens: int | None = None
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            stop = stop or "end"
            break
        values = _object(data.encode(), host)
        _raise_error(values, host)
        usage = values.get("usage")
        if isinstance(usage, dict) and type(usage.get("completion_tokens")) is int:
            tokens = usage["completion_tokens"]
        choice = _choice(values)
        if choice is None:
            continue
        if choice.get("finish_reason"):
            stop = _stop(choice)
        delta = choice.get("delta")
        piece = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(piece, str) and piece:
            pieces.append(piece)
            yield piece
    if stop is None:
        raise RemoteError(f"{host}: the connection ended inside the answer; ask again")
    return Reply("".join(pieces), tokens, stop)


def model_names(data: bytes, host: str) -> list[str]:
    """Names in a list of models.

    Raises:
        RemoteError: it is none.
    """
    models = _object(data, host).get("data")
    if not isinstance(models, list) or not all(isinstance(m, dict) for m in models):
        raise _foreign(host, data)
    return [_printable(str(model.get("id"))) for model in models]


def refusal(response: httpx.Response, endpoint: Endpoint) -> RemoteError:
    """Why a server gave no answer, and what to do about it."""
    code, host = response.status_code, endpoint.host
    said = _said(response)
    if endpoint.key:
        said = said.replace(endpoint.key, "***")
    about = f"{code}: {said}" if said else str(code)
    if 300 <= code < 400:
        where = _printable(response.headers.get("location", "another address"))
        return RemoteError(f"{host} points to {where} ({code}); give that as base URL if it is it")
    if code in (401, 403):
        if endpoint.key is None:
            remedy = f"put it into the variable {endpoint.key_name}"
            return RemoteError(f"{host} wants a key ({about}); {remedy}")
        return RemoteError(f"{host} refuses the key of {endpoint.key_name} ({about}); check it")
    if code == 404:
        model = f"the model {endpoint.model!r}" if endpoint.model else "what was asked for"
        return RemoteError(
            f"{host} does not have {model} ({about}); check the base URL {endpoint.url} (most end "
            "in /v1) and the model"
        )
    if code == 429:
        return RemoteError(f"{host}: too many requests ({about}); wait, or use a smaller batch")
    if code < 500:
        return RemoteError(f"{host} refused ({about})", stops=code not in _OF_THE_REQUEST)
    return RemoteError(f"{host} failed ({about})", stops=code not in _OF_THE_REQUEST)


def _said(response: httpx.Response) -> str:
    """The message in an error's body."""
    with suppress(Exception):  # the status says enough where the body breaks off
        return said_in(response.read())
    return ""


def said_in(data: bytes) -> str:
    """The message in the body of an error, one printable line; empty if there is none."""
    text = data[:100_000].decode(errors="replace")
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "" if "<html" in text.lower() else _printable(text)
    for key in ("error", "detail", "message"):
        if isinstance(values, dict) and values.get(key):
            values = values[key]
    return _printable(values if isinstance(values, str) else json.dumps(values))


def _raise_error(values: dict[str, Any], host: str) -> None:
    error = values.get("error")
    if error:
        said = error.get("message") if isinstance(error, dict) else error
        raise RemoteError(f"{host} failed ({_printable(str(said))})", stops=False)


def _object(data: bytes, host: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise _foreign(host, data) from None
    if not isinstance(values, dict):
        raise _foreign(host, data)
    return values


def _choice(values: dict[str, Any]) -> dict[str, Any] | None:
    choices = values.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def _stop(choice: dict[str, Any]) -> str:
    reason = choice.get("finish_reason")
    return _STOPS.get(reason, _printable(reason)) if isinstance(reason, str) else "end"


def _foreign(host: str, data: bytes) -> RemoteError:
    begin = _printable(data[:200].decode(errors="replace"))[:60]
    return RemoteError(
        f"{host} answers, but not as a chat completions server does (it said {begin!r}); check "
        "the base URL, most end in /v1"
    )


def _printable(text: str) -> str:
    """One line without control signs, which could drive a terminal."""
    line = " ".join(text.split())
    return "".join(sign for sign in line if sign.isprintable())[:300]


# --- waiting -----------------------------------------------------------------------------------


class Waits:
    """So many attempts, with growing pauses between them."""

    def __init__(self, tries: int, unit: float = 1.0) -> None:
        self.tries, self.unit = tries, unit

    def __iter__(self) -> Iterator[Attempt]:
        for number in range(self.tries + 1):  # one more, for a request that is written anew
            yield Attempt(number, self)


class Attempt:
    """One of :class:`Waits`."""

    def __init__(self, number: int, waits: Waits) -> None:
        self._number, self._waits = number, waits

    def wait(self, response: httpx.Response | None = None) -> bool:
        """Pause before the next attempt; false if there is to be none."""
        if response is not None and response.status_code not in _TRANSIENT:
            return False
        if self._number + 1 >= self._waits.tries:
            return False
        # Spread, so that many that were turned away together do not come back together.
        pause = self._waits.unit * 2**self._number * random.uniform(0.75, 1.25)
        asked = None if response is None else retry_after(response.headers.get("retry-after"))
        if asked is not None:
            if asked > _LONGEST:
                return False
            pause = max(pause, asked) if asked else pause
        time.sleep(pause)
        return True


def retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for: a number, or a date (RFC 9110, 10.2.3).

    >>> retry_after("2"), retry_after("soon"), retry_after(None)
    (2.0, None, None)
    """
    if not value:
        return None
    with suppress(ValueError):
        seconds = float(value)
        return seconds if seconds >= 0 else None
    with suppress(ValueError, TypeError):
        when = parsedate_to_datetime(value)
        when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
        return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
    return None
