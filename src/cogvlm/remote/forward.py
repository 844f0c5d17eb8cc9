"""Hands chat requests of others on to a server elsewhere, many at once, in an event loop.

Knows HTTP and chat completions, nothing of who asks.  Cancelling a call closes its connection, by
which the server elsewhere learns that nobody waits.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import RemoteError
from .client import MOST, Endpoint, connection
from .wire import retry_after, said_in

if TYPE_CHECKING:
    import httpx

_OURS = {401, 403, 407}  # about this server's own key, never about its caller's


class Upstream(RemoteError):
    """What a caller is told of a server elsewhere that gave no answer.

    Attributes:
        status: For the caller.  Theirs, or 502 and 504 where the fault is between us and them.
        code, param: Theirs, or a word of ours.
        retry: Seconds to wait, where they said so.
        detail: For the log alone.
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        param: str | None = None,
        retry: int | None = None,
        detail: str = "",
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry
        self.detail = detail or message


class Forwarder:
    """Hands requests on to the model of an endpoint; belongs to one event loop.

    Raises:
        ResourceError: httpx is not installed.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        options = connection(endpoint)
        import httpx

        self.endpoint = endpoint
        self._client = httpx.AsyncClient(**options)
        self._newer = False  # knows the limit of tokens as max_completion_tokens alone

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def open(self, body: Mapping[str, Any]) -> httpx.Response:
        """Send a request, its model replaced; the answer is good, its body not yet read.

        Raises:
            Upstream: there is no good answer.
        """
        sent = {**body, "model": self.endpoint.model}
        if self._newer and "max_tokens" in sent:
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        response = await self._post(sent)
        if response.status_code == 200:
            return response
        problem = await self._problem(response)
        if "max_completion_tokens" in str(problem) and "max_tokens" in sent:
            self._newer = True
            return await self.open(body)
        raise problem

    async def whole(self, response: httpx.Response) -> dict[str, Any]:
        """An answer that comes in one piece.

        Raises:
            Upstream: it breaks off, or is none.
        """
        data = bytearray()
        async for chunk in self._chunks(response):
            data += chunk
            if len(data) > MOST:
                raise self._failed(f"sent more than {MOST} bytes")
        values = self._object(data)
        choices = values.get("choices")
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise self._failed("answers, but not as a chat completions server does")
        return values

    async def events(self, response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer; of a server that does not stream, one.

        Raises:
            Upstream: it breaks off, or says that it failed.
        """
        if "event-stream" not in response.headers.get("content-type", ""):
            values = await self.whole(response)
            parts = [{**c, "delta": c.get("message")} for c in values["choices"]]
            for part in parts:
                part.pop("message", None)
            yield {**values, "object": "chat.completion.chunk", "choices": parts}
            return
        ended = False
        async for line in self._lines(response):
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                return
            values = self._object(line[5:])
            choices = values.get("choices")
            for choice in choices if isinstance(choices, list) else ():
                ended |= isinstance(choice, dict) and bool(choice.get("finish_reason"))
            yield values
        if not ended:
            raise self._failed("ended the connection inside the answer")

    # --- HTTP --------------------------------------------------------------------------------

    async def _post(self, body: dict[str, Any]) -> httpx.Response:
        import httpx

        host = self.endpoint.host
        try:
            request = self._client.build_request(
                "POST", f"{self.endpoint.url}/chat/completions", json=body
            )
            return await self._client.send(request, stream=True)
        except httpx.TimeoutException as error:
            kind = type(error).__name__
            text = f"{host} did not answer in time ({kind}); try again later"
            raise Upstream(504, "upstream_timeout", text) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            text = f"{host} cannot be reached from this server; try again later"
            detail = f"{host} cannot be reached ({type(error).__name__}: {error})"
            raise Upstream(502, "upstream_unreachable", text, detail=detail) from error

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        import httpx

        try:
            async for chunk in response.aiter_bytes():
                yield chunk
        except httpx.TimeoutException as error:
            raise self._failed("was silent for too long inside the answer", 504) from error
        except httpx.HTTPError as error:
            raise self._failed("broke the connection inside the answer") from error

    async def _lines(self, response: httpx.Response) -> AsyncIterator[bytes]:
        rest = b""
        async for chunk in self._chunks(response):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MOST:
                raise self._failed(f"sent a line of more than {MOST} bytes")
            for line in lines:
                yield line.rstrip(b"\r")
        yield rest

    # --- what went wrong ---------------------------------------------------------------------

    def _object(self, data: bytes | bytearray) -> dict[str, Any]:
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise self._failed("answers, but not as a chat completions server does")
        if values.get("error"):
            raise self._failed(f"failed ({self._masked(said_in(bytes(data)))})")
        return values

    def _failed(self, what: str, status: int = 502) -> Upstream:
        return Upstream(status, "upstream_failed", f"{self.endpoint.host} {what}; ask again")

    def _masked(self, text: str) -> str:
        return text.replace(self.endpoint.key, "***") if self.endpoint.key else text

    async def _problem(self, response: httpx.Response) -> Upstream:
        data = bytearray()
        try:
            with suppress(Upstream):  # the status says enough where the body breaks off
                async for chunk in self._chunks(response):
                    data += chunk
                    if len(data) > 100_000:
                        break
        finally:
            await response.aclose()
        host, status = self.endpoint.host, response.status_code
        said = self._masked(said_in(bytes(data)))
        about = f"{status}: {said}" if said else str(status)
        if status in _OURS:
            has = "no key" if self.endpoint.key is None else "a key that is wrong or may not do it"
            text = (
                f"{host} refuses this server, which has {has} ({status}); it is not your key: "
                "whoever runs this server has to put it right"
            )
            detail = f"{host} refuses the key of {self.endpoint.key_name} ({about})"
            return Upstream(502, "upstream_key", text, detail=detail)
        if not 400 <= status < 600:
            text = f"{host} gave status {status} in place of an answer; its base URL may be wrong"
            return Upstream(502, "upstream_failed", text, detail=f"{text} ({about})")
        seconds = retry_after(response.headers.get("retry-after"))
        retry = math.ceil(seconds) if seconds is not None and math.isfinite(seconds) else None
        code, param = (_field(data, name) for name in ("code", "param"))
        return Upstream(status, code, f"{host} refused or failed ({about})", param, retry)


def _field(data: bytes | bytearray, name: str) -> str | None:
    """A field of OpenAI's form of errors, if it is short text."""
    try:
        value = json.loads(data)["error"][name]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return value[:200] if isinstance(value, str) else None
