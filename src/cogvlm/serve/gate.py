"""What every request passes first: who asks, how much is sent, how many ask, how it ended.

One piece of ASGI around the application.  It reads the body itself, so that the limits hold for
bodies of unknown length too, and nothing behind it meets a half upload.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import problem_of
from .front import Front, Refused

log = logging.getLogger("cogvlm.serve.access")
_GUARDED = ("/v1/", "/api/", "/metrics")
_DRAIN = 4  # so many times the limit is read of a body that is too large, to be heard afterwards
_OVERTIME = 30.0  # seconds that a slow reader has beyond the time of an answer


class Gate:
    """The application with a gate before it.

    Args:
        app: what is behind the gate.
        desk: counts and limits.
    """

    def __init__(self, app: ASGIApp, desk: Front) -> None:
        self._app, self._desk = app, desk
        self._keys = [_digest(key) for key in desk.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            limit = self._desk.settings.limits.seconds + _OVERTIME
            await asyncio.wait_for(self._pass(scope, receive, note), limit)
        except asyncio.TimeoutError:
            pass  # its reader stands still; returning early closes the connection
        except Exception as error:
            if not status:  # else the application has answered already
                problem = problem_of(error)
                status = problem.status
                if status != 499:
                    await problem.response(scope["path"])(scope, receive, note)
        finally:
            self._count(scope, status or 499, time.monotonic() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        guarded = scope["path"].startswith(_GUARDED)
        if guarded:
            self._check_origin(headers)
            self._check_key(headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._counted() if guarded else nullcontext():
            body = await self._read(headers, receive)
            # curl's -d calls JSON a form, and Ollama's own examples rely on that.
            kept = [(k, v) for k, v in scope["headers"] if k != b"content-type"]
            scope["headers"] = [*kept, (b"content-type", b"application/json")]
            await self._app(scope, _replay(body, receive), send)

    def _check_origin(self, headers: Headers) -> None:
        """A page of another server may not use this one through its visitor's browser."""
        origin, allowed = headers.get("origin"), self._desk.settings.origins
        if origin is None or "*" in allowed or origin in allowed:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise Refused(
                403, "origin", "pages of another origin may not ask here; --cors ORIGIN allows one"
            )

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All are compared, and digests of one length, so that time tells nothing.
        found = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(found):
            what = "wrong" if key else "missing"
            raise Refused(
                401, "invalid_api_key", f"the API key is {what}; send Authorization: Bearer KEY"
            )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        desk = self._desk
        if desk.closing:
            raise desk.shut()
        if desk.inflight >= desk.settings.limits.requests:
            raise Refused(
                429, "queue_full", f"{desk.inflight} requests are under way; try again soon", 2
            )
        desk.inflight += 1
        try:
            yield
        finally:
            desk.inflight -= 1

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        limits = self._desk.settings.limits
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limits.body_bytes * _DRAIN:
            raise self._too_large(int(declared))
        try:
            body, size = await asyncio.wait_for(
                _body(receive, limits.body_bytes), limits.upload_seconds
            )
        except asyncio.TimeoutError:
            message = f"the body was not there after {limits.upload_seconds:g} s; send it faster"
            raise Refused(408, "slow_upload", message) from None
        if size > limits.body_bytes:
            raise self._too_large(size)
        return body

    def _too_large(self, size: int) -> Refused:
        limit = self._desk.settings.limits.body_bytes
        return Refused(
            413, "too_large", f"the body has {size} bytes or more, the limit is {limit}; send less"
        )

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        # The route, not the path: paths are the clients' to invent.
        route: Any = getattr(scope.get("route"), "path", None) or "other"
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "other"
        self._desk.metrics.requests[method, route, status] += 1
        client = (scope.get("client") or ("-",))[0]
        log.info("%s %s %s %d %.3fs", client, method, quote(scope["path"]), status, seconds)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


async def _body(receive: Receive, limit: int) -> tuple[bytes, int]:
    """The body and its size; of one that is too large only the size, as far as it was read."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(499, "gone", "the caller left")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
        if not message.get("more_body", False) or size > limit * _DRAIN:
            return b"".join(chunks), size


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body first."""
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
