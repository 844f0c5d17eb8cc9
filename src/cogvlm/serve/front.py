"""What every desk has, whoever answers: limits, counts, workers, and an end.

Knows no engine, no server elsewhere and no wire format.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread

from ..errors import InputError
from .limits import Settings
from .metrics import Metrics

_WORKERS = 4  # prompts made at once: each may hold a decoded picture
_FETCHERS = 16  # of these, with pictures to fetch: they mostly wait
_Made = TypeVar("_Made")


class Under(Protocol):
    """A request under way."""

    def expire(self, why: str) -> None:
        """End it where it is."""


@dataclass(frozen=True)
class Facts:
    """What the server says of its model."""

    name: str
    context: int | None = None  # tokens of prompt and answer; none: no stated limit
    parameters: int = 0
    size: int = 0  # bytes of the weights in memory
    family: str = "cogvlm"
    precision: str = ""
    owner: str = "cogvlm"
    created: int = field(default_factory=lambda: int(time.time()))


class Refused(Exception):
    """A request that is answered with an error of HTTP; ``status`` and ``code`` say which."""

    def __init__(self, status: int, code: str, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry = status, code, retry
        self.param: str | None = None


class Front:
    """Takes requests; who answers them is for the kinds of it to say.

    Args:
        facts: what is said of the model.
        settings: limits and rules.
    """

    where: str | None = None  # the host that pictures go to; none: they stay here

    def __init__(self, facts: Facts, settings: Settings) -> None:
        self.facts, self.settings = facts, settings
        self.models = {facts.name: facts}  # all that may be asked for; the first is the server's
        self.max_images = settings.limits.images
        self.metrics = Metrics()
        self.ready = self.closing = False
        self.inflight = 0  # requests that may lead to an answer, uploads included
        self.running: set[Under] = set()
        self._limiters: dict[bool, anyio.CapacityLimiter] = {}

    @property
    def stats(self) -> Any:
        """Counters, by the names that ``metrics`` shows."""
        raise NotImplementedError

    async def warm(self) -> None:
        """Called once in the server's loop, before the first request."""
        self.ready = True

    async def close(self) -> None:
        """Called once in the server's loop, after the last request."""

    async def work(self, make: Callable[[], _Made], slow: bool = False) -> _Made:
        """Run ``make`` in a worker thread; a few at once, the others wait, the slow ones apart."""
        limiter = self._limiters.get(slow)
        if limiter is None:  # belongs to the loop it is made in
            limiter = anyio.CapacityLimiter(_FETCHERS if slow else _WORKERS)
            self._limiters[slow] = limiter
        # A caller who leaves does not wait for it.
        return await anyio.to_thread.run_sync(make, abandon_on_cancel=True, limiter=limiter)

    def check(self, texts: list[str], images: int, tokens: int | None) -> int:
        """Refuse what is over the limits, before any work; the longest answer in tokens.

        Raises:
            InputError: too much text, too many pictures, or too long an answer.
        """
        limits = self.settings.limits
        length = sum(map(len, texts))
        if length > limits.characters:
            raise InputError(
                f"the request has {length} characters of text, the limit is {limits.characters}; "
                "shorten it"
            )
        if images > limits.images:
            raise InputError(
                f"the request has {images} images, the limit is {limits.images}; leave out "
                f"{images - limits.images}"
            )
        if tokens is not None and tokens > limits.tokens:
            raise InputError(
                f"max_tokens={tokens} is over this server's limit; give {limits.tokens} or less"
            )
        return limits.tokens if tokens is None else tokens

    def shut(self) -> Refused:
        """What is said while the server closes."""
        return Refused(503, "closing", "the server is shutting down; try again soon", retry=5)

    def cut(self) -> None:
        """End every running answer; the callers get what is there."""
        self.closing = True
        for reply in list(self.running):
            reply.expire("the server is shutting down")
