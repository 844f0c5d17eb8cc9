"""Between the routes and the engine: prompts are made, callers watched, answers followed.

Knows neither of the two wire formats.  The engine works in its own thread; here everything but
making prompts (decoding pictures, fetching them, tokenizing) runs in the server's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.to_thread
import numpy as np
from starlette.requests import Request

from ..errors import ConfigError, MessageError
from ..processor import ImageLimits, Message, Processor, user
from ..processor.encode import Encoded
from .front import Facts, Front, Refused
from .limits import Settings

if TYPE_CHECKING:
    from ..engine.sampling import Sampling
    from ..engine.service import Answer, EngineStats
    from ..engine.transcript import Piece
    from ..load import Loaded

log = logging.getLogger("cogvlm.serve")


class Ticket(Protocol):
    """What the engine gives for a prompt."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""

    @property
    def answer(self) -> Answer:
        """The whole answer, once it is complete."""

    def on_event(self, callback: Callable[[], None]) -> None:
        """Call back, from any thread, whenever there is news."""

    def poll(self) -> list[Piece] | None:
        """What is new; none once all is given.  Raises what went wrong."""

    def cancel(self) -> None:
        """End the answer where it is."""


class Engine(Protocol):
    """What answers."""

    @property
    def stats(self) -> EngineStats:
        """Counters, see :class:`cogvlm.engine.service.EngineStats`."""

    def submit(self, prompt: Encoded, sampling: Sampling) -> Ticket:
        """Put a prompt in the queue."""


def facts_of(loaded: Loaded, name: str | None = None) -> Facts:
    """The facts of a loaded model, under another name if one is given."""
    tensors = list(loaded.model.parameters())
    return Facts(
        name=name or loaded.name,
        context=getattr(loaded.model.config, "max_position_embeddings", None),
        parameters=sum(t.numel() for t in tensors),
        size=sum(t.numel() * t.element_size() for t in tensors),
        family=str(getattr(loaded.model.config, "model_type", "cogvlm")),
        precision=str(loaded.model.dtype).removeprefix("torch."),
    )


class Desk(Front):
    """Takes requests to the engine.

    Args:
        engine: what answers.
        processor: of the engine's model; pictures over the server's limit are refused.
        facts: what is said of the model.
        settings: limits and rules.
        more: engines of the same model with adapters, and what is said of them.  An engine has
            its own batches and its own memory of prompts, so no request meets another model's.

    Raises:
        ConfigError: two of one name.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        facts: Facts,
        settings: Settings,
        more: Sequence[tuple[Engine, Facts]] = (),
    ) -> None:
        super().__init__(facts, settings)
        self.engine = engine
        self._engines = {facts.name: engine}
        for other, said in more:
            if said.name in self.models:
                raise ConfigError(f"two models are called {said.name!r}; give one another name")
            self.models[said.name], self._engines[said.name] = said, other
        pixels = min(settings.limits.pixels, processor.limits.max_pixels)
        self.processor = replace(processor, limits=ImageLimits(max_pixels=pixels))
        if processor.max_images is not None:
            self.max_images = min(self.max_images, processor.max_images)

    @property
    def stats(self) -> EngineStats:
        """The engines' counters, added up."""
        first, *rest = (engine.stats for engine in self._engines.values())
        for other in rest:
            first = type(first)(**{k: v + getattr(other, k) for k, v in vars(first).items()})
        return first

    async def warm(self) -> None:
        """Answer one token, so that the first caller does not wait for what is set up then."""
        from ..engine.sampling import Sampling

        prompt = await self.work(lambda: self.processor.encode([user("Hi")]))
        for engine in self._engines.values():
            async for _ in follow(engine.submit(prompt, Sampling(max_new_tokens=1))):
                pass
        self.ready = True

    async def ask(
        self,
        request: Request,
        make: Callable[[], Encoded],
        sampling: Sampling,
        slow: bool = False,
        model: str | None = None,
    ) -> Reply:
        """Make the prompt, queue it and wait until the answer begins.

        Args:
            request: whose caller is watched.
            make: the prompt; called in a worker thread.
            sampling: how to answer.
            slow: whether there are pictures to fetch.
            model: which of :attr:`models`; none: the first.

        Raises:
            Refused: the server is closing, or time is over before the answer began.
            CogVLMError: of the prompt, the queue or the engine.
        """
        if self.closing:
            raise self.shut()
        engine = self.engine if model is None else self._engines[model]
        reply = Reply(self, request)
        try:
            async with reply.watched():
                # A grammar is compiled when it is submitted, so that is work too.
                await self.work(lambda: reply.hold(engine.submit(make(), sampling)), slow)
                await reply.first()
        except BaseException:
            reply.close()
            raise
        return reply

    def raw(self, text: str) -> Encoded:
        """A prompt without any chat format.

        Raises:
            InputError: it has no token.
        """
        tokenizer = self.processor.tokenizer
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = np.array(start + tokenizer.encode(text), dtype=np.int64)
        if not len(ids):
            raise MessageError("the prompt is empty; give it a text")
        return Encoded(ids, np.zeros_like(ids), [])

    def chat(self, messages: Callable[[], list[Message]]) -> Callable[[], Encoded]:
        """What makes a prompt of messages, which may have pictures to fetch."""
        return lambda: self.processor.encode(messages())


class Reply:
    """One answer under way.  Its caller leaving ends it; so does time."""

    def __init__(self, desk: Desk, request: Request) -> None:
        self._desk, self._request = desk, request
        self._ticket: Ticket | None = None
        self._pieces: AsyncIterator[list[Piece]] | None = None
        self._ahead: list[Piece] = []
        self._expired = ""
        self._closed = self.gone = False
        self.started = time.monotonic()
        self.first_token: float | None = None  # seconds until the first token
        desk.running.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(
            desk.settings.limits.seconds, self.expire, "the time for this request is over"
        )
        self._watch = loop.create_task(self._until_gone())
        self._scope: anyio.CancelScope | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        assert self._ticket is not None
        return self._ticket.prompt_tokens

    @property
    def answer(self) -> Answer:
        """The whole answer, once the pieces are used up."""
        assert self._ticket is not None
        return self._ticket.answer

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Around the time until the answer begins: the caller leaving and time are errors there."""
        with anyio.CancelScope() as self._scope:
            yield
        self._scope = None
        if self.gone:
            raise Refused(499, "gone", "the caller left")
        if self._expired and not self._ahead:
            if self._desk.closing:
                raise self._desk.shut()
            raise Refused(504, "timeout", f"{self._expired}; ask for less, or try again later")

    def hold(self, ticket: Ticket) -> None:
        """The prompt is in the queue; called in a worker thread, whose caller may have left."""
        self._ticket = ticket
        if self._closed:
            ticket.cancel()

    async def first(self) -> None:
        """Wait for the first piece, so that what fails before it has a status of its own."""
        assert self._ticket is not None
        self._pieces = follow(self._ticket)
        with suppress(StopAsyncIteration):
            self._ahead = await anext(self._pieces)
        self.first_token = time.monotonic() - self.started
        self._desk.metrics.first_token.add(self.first_token)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """The answer as it comes; :attr:`answer` is complete afterwards."""
        assert self._pieces is not None
        try:
            if self._ahead:
                yield self._ahead
            async for pieces in self._pieces:
                yield pieces
            self._note()
        finally:
            self.close()

    def expire(self, why: str) -> None:
        """End the answer where it is."""
        self._expired = why
        self._stop()

    def close(self) -> None:
        """Let go of everything; an answer that nobody waits for ends."""
        self._closed = True
        self._timer.cancel()
        self._watch.cancel()
        if self._ticket is not None:
            self._ticket.cancel()
        self._desk.running.discard(self)

    def _stop(self) -> None:
        if self._ticket is not None:
            self._ticket.cancel()
        elif self._scope is not None:
            self._scope.cancel()  # still making the prompt

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._stop()
        if self._ticket is not None:
            self.close()

    def _note(self) -> None:
        seconds = time.monotonic() - self.started
        tokens = len(self.answer.ids)
        self._desk.metrics.answer.add(seconds)
        after = seconds - (self.first_token or 0.0)
        if tokens > 1 and after > 0:
            self._desk.metrics.speed.add((tokens - 1) / after)


async def follow(ticket: Ticket) -> AsyncIterator[list[Piece]]:
    """The pieces of a ticket, in the event loop.  Raises what went wrong in the engine."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(news.set)

    ticket.on_event(tell)
    while True:
        news.clear()
        pieces = ticket.poll()
        if pieces is None:
            return
        if pieces:
            yield pieces
        else:
            await news.wait()
