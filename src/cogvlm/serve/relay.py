"""A desk without a model: chat requests are checked as ever, and a server elsewhere answers them.

Limits, keys, the rules for pictures and the forms of errors are those of a local model; what goes
on is written anew from what was checked, so that nothing unknown does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..errors import InputError
from ..processor import Image, ImageLimits
from ..remote import Forwarder
from ..remote.wire import data_url
from . import media
from .errors import problem_of
from .front import Facts, Front, Refused
from .limits import Settings
from .openai import asked_tokens, check_model, event, fetches, model_routes, texts
from .protocol import ChatRequest, ImagePart, TextPart

if TYPE_CHECKING:
    import httpx

_CHAT = "/v1/chat/completions"
_NOT_HERE = ["/v1/completions"] + [
    f"/api/{name}" for name in ("chat", "generate", "tags", "show", "version")
]
# Fields that other servers know; the last three are not OpenAI's, but widely understood.
SENT = (
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "stream"),
    *("stream_options", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
    *("top_logprobs", "response_format", "user", "prompt_cache_key", "safety_identifier"),
    *("top_k", "min_p", "repetition_penalty"),
)
REFUSED = ("regex", "repetition_stop")  # ours alone: many servers would drop them without a word
_NEUTRAL = {"top_k": 0, "min_p": 0, "repetition_penalty": 1}
_T = TypeVar("_T")


@dataclass
class RelayStats:
    """Counters, named as an engine's; tokens are what the server elsewhere says."""

    slots: int
    queued: int = 0
    running: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Relay(Front):
    """Hands requests on.

    Args:
        forwarder: to the server elsewhere; closed with the relay.
        name: of the model, for clients.
        settings: limits and rules.
        slots: requests under way there at once; the others wait here.
    """

    def __init__(self, forwarder: Forwarder, name: str, settings: Settings, slots: int = 8) -> None:
        super().__init__(Facts(name, owner=forwarder.endpoint.host, family="remote"), settings)
        self.forwarder = forwarder
        self.where = forwarder.endpoint.host
        self.slots = anyio.Semaphore(slots)
        self._stats = RelayStats(slots)

    @property
    def stats(self) -> RelayStats:
        """Counters."""
        return self._stats

    async def close(self) -> None:
        """Close the connections."""
        await self.forwarder.close()

    async def ask(self, request: Request, wanted: ChatRequest) -> Response:
        """Hand a request on and answer with what comes back.

        Raises:
            Refused: the server is closing, or time is over before the answer began.
            InputError: a limit, a picture, or a field that is not handed on.
            Upstream: the server elsewhere gave no answer.
        """
        if self.closing:
            raise self.shut()
        words, images = texts(wanted)
        tokens = self.check(words, images, asked_tokens(wanted))
        _check_fields(wanted)
        call = Call(self, request)
        try:
            make = lambda: self._body(wanted, tokens)  # noqa: E731
            body = await call.step(lambda: self.work(make, fetches(wanted)))
            await call.open(body)
            if wanted.stream:
                await call.first()
                return StreamingResponse(self._stream(call), media_type="text/event-stream")
            values = await call.whole()
        except BaseException as error:
            await call.fail(error)
            raise
        await call.done()
        return JSONResponse(self._ours(values))

    def _body(self, wanted: ChatRequest, tokens: int) -> dict[str, Any]:
        """What is sent; reads pictures, so it is called in a worker thread."""
        given = wanted.model_dump(by_alias=True, exclude_none=True, include=set(SENT))
        body = {k: v for k, v in given.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
        body["stream"] = bool(wanted.stream)
        if asked_tokens(wanted) is None:
            body["max_tokens"] = tokens
        body["messages"] = [
            {"role": m.role, "content": self._content(m.content, f"messages[{i}].content")}
            for i, m in enumerate(wanted.messages)
        ]
        return body

    def _content(self, content: Any, where: str) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return content
        return [self._part(part, f"{where}[{i}]") for i, part in enumerate(content)]

    def _part(self, part: TextPart | ImagePart, where: str) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        image = Image(media.read(part.image_url.url, self.settings.urls, f"{where}.image_url"))
        side = self.forwarder.endpoint.max_side
        url = {"url": data_url(image, side, ImageLimits(self.settings.limits.pixels))}
        if part.image_url.detail is not None:
            url["detail"] = part.image_url.detail
        return {"type": "image_url", "image_url": url}

    def _ours(self, values: dict[str, Any]) -> dict[str, Any]:
        """An answer or a piece of one under our name of the model; its usage is counted."""
        usage = values.get("usage")
        if isinstance(usage, dict):
            self._stats.prompt_tokens += _count(usage, "prompt_tokens")
            self._stats.generated_tokens += _count(usage, "completion_tokens")
        return {**values, "model": self.facts.name}

    async def _stream(self, call: Call) -> AsyncIterator[str]:
        head: dict[str, Any] = {}
        try:
            async for values in call.pieces():
                head = {k: v for k, v in values.items() if k not in ("choices", "usage")}
                yield event(self._ours(values))
            await call.done()
        except Exception as error:
            await call.fail(error)
            if isinstance(error, Refused):  # time or a shutdown: there would have been more
                cut = {"index": 0, "delta": {}, "finish_reason": "length"}
                yield event(self._ours({**head, "choices": [cut]}))
            else:  # the status is sent: what is left is to say so in the stream
                yield event(problem_of(error).body(_CHAT))
                return
        finally:
            await call.close()
        yield "data: [DONE]\n\n"


class Call:
    """One request under way.  Its caller leaving ends it, and with it the connection; so does time.

    Whatever waits does so in :meth:`step`, which is what can be cut off.
    """

    def __init__(self, relay: Relay, request: Request) -> None:
        self._relay, self._request = relay, request
        self._why: Refused | None = None
        self._scope: anyio.CancelScope | None = None
        self._response: httpx.Response | None = None
        self._events: AsyncGenerator[dict[str, Any], None] | None = None
        self._ahead: dict[str, Any] | None = None
        self._held = self._over = False
        self._started = time.monotonic()
        self._closing: asyncio.Task[None] | None = None
        relay.running.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(
            relay.settings.limits.seconds, self.expire, "the time for this request is over"
        )
        self._watch = loop.create_task(self._until_gone())

    async def step(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do what takes time, unless the caller leaves or time ends it: then that is raised."""
        if self._why is None:
            try:
                with anyio.CancelScope() as self._scope:
                    return await work()
            finally:
                self._scope = None
        assert self._why is not None  # nothing else cancels the scope
        raise self._why

    async def open(self, body: dict[str, Any]) -> None:
        """Wait for a place, send the request, wait until the answer begins."""
        stats = self._relay.stats
        stats.queued += 1
        try:
            await self.step(self._hold)
        finally:
            stats.queued -= 1
        await self.step(lambda: self._open(body))

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        response = self._response
        assert response is not None
        return await self.step(lambda: self._relay.forwarder.whole(response))

    async def first(self) -> None:
        """Wait for the first piece, so that what fails before it has a status of its own."""
        assert self._response is not None
        self._events = self._relay.forwarder.events(self._response)
        self._ahead = await self.step(self._next)
        self._relay.metrics.first_token.add(time.monotonic() - self._started)

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes."""
        while self._ahead is not None:
            yield self._ahead
            self._ahead = await self.step(self._next)

    async def done(self) -> None:
        """All is there."""
        self._relay.metrics.answer.add(time.monotonic() - self._started)
        await self._end("finished")

    async def fail(self, error: BaseException) -> None:
        """There will be no more."""
        given_up = isinstance(error, (Refused, asyncio.CancelledError))
        await self._end("cancelled" if given_up else "failed")

    def expire(self, why: str) -> None:
        """End it where it is."""
        shut = self._relay.shut() if self._relay.closing else None
        self._stop(shut or Refused(504, "timeout", f"{why}; ask for less, or try again later"))

    async def close(self) -> None:
        """Let go of everything, the connection before all."""
        await self._end("cancelled")

    async def _end(self, how: str) -> None:
        if self._over:
            return
        self._over = True
        self._timer.cancel()
        self._watch.cancel()
        relay, stats = self._relay, self._relay.stats
        relay.running.discard(self)
        setattr(stats, how, getattr(stats, how) + 1)
        if self._held:
            stats.running -= 1
            relay.slots.release()
        with anyio.CancelScope(shield=True):
            if self._events is not None:
                await self._events.aclose()
            if self._response is not None:
                await self._response.aclose()

    async def _hold(self) -> None:
        await self._relay.slots.acquire()
        self._held = True
        self._relay.stats.running += 1

    async def _open(self, body: dict[str, Any]) -> None:
        self._response = await self._relay.forwarder.open(body)

    async def _next(self) -> dict[str, Any] | None:
        assert self._events is not None
        return await anext(self._events, None)

    def _stop(self, why: Refused) -> None:
        self._why = self._why or why
        if self._scope is not None:
            self._scope.cancel()
        elif self._response is not None:  # its reader stands still: nothing waits that could end it
            self._closing = asyncio.get_running_loop().create_task(self.close())

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._stop(Refused(499, "gone", "the caller left"))


def routes(relay: Relay) -> APIRouter:
    """The routes of one relay."""
    router = APIRouter()

    @router.post(_CHAT)
    async def chat(wanted: ChatRequest, request: Request) -> Response:
        check_model(relay, wanted.model)
        return await relay.ask(request, wanted)

    async def not_here(request: Request) -> Response:
        raise Refused(
            501,
            "not_offered",
            f"{request.url.path} is not offered here: {relay.where} answers, through {_CHAT} only",
        )

    for path in _NOT_HERE:
        router.add_api_route(path, not_here, methods=["GET", "POST"], include_in_schema=False)
    router.include_router(model_routes(relay))
    return router


def _check_fields(wanted: ChatRequest) -> None:
    """Refuse by name what a server elsewhere would leave out without a word."""
    for name in REFUSED:
        if getattr(wanted, name):
            raise InputError(f"{name}: only models of this server's own know it; leave it out")
    if wanted.stream_options is not None and not wanted.stream:
        raise InputError("stream_options: needs stream=true; give both or neither")
    if wanted.top_logprobs and not wanted.logprobs:
        raise InputError("top_logprobs: needs logprobs=true; give both or neither")


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if type(value) is int and value > 0 else 0
