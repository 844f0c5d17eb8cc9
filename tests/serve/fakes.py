"""An engine that answers at once with what a test wants, and a server in a thread."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from PIL import Image

from cogvlm.engine.sampling import Sampling, TokenLogprob
from cogvlm.engine.service import Answer, Busy, EngineStats
from cogvlm.engine.ticket import Ticket
from cogvlm.engine.transcript import Piece
from cogvlm.processor import Processor, SquarePixels, get_template
from cogvlm.processor.encode import Encoded
from cogvlm.serve import Desk, Facts, Server, Settings, bind, build
from engine.toys import Bytes

MODEL = "toy"
# Making a client takes longer than most of what is asked of one; every request has a connection of
# its own, so that no test sees another one's.
HTTP = httpx.Client(
    verify=False, trust_env=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0)
)
WAIT = 60.0  # seconds until a test gives up; nothing here takes a tenth of it


def toy_processor() -> Processor:
    return Processor(Bytes(), get_template("chat"), SquarePixels(56), image_token_id=4)


def fingerprint(prompt: Encoded) -> str:
    """Says of a prompt what its pictures are."""
    pixels = b"".join(image.tobytes() for image in prompt.pixel_values)
    return hashlib.sha256(pixels).hexdigest()[:8] if pixels else "none"


def echo(prompt: Encoded) -> str:
    """The prompt's text and its pictures."""
    return f"{Bytes().decode(prompt.input_ids.tolist())}|{fingerprint(prompt)}"


class FakeEngine:
    """Says ``say(prompt)``, one character a piece, each after ``pause`` seconds."""

    def __init__(
        self,
        say: Callable[[Encoded], str] = echo,
        pause: float = 0.0,
        error: BaseException | None = None,
        error_at: int = 0,
        full: bool = False,
    ) -> None:
        self.say, self.pause, self.error, self.error_at, self.full = (
            say,
            pause,
            error,
            error_at,
            full,
        )
        self.asked: list[tuple[Encoded, Sampling]] = []
        self.tickets: list[Ticket] = []
        self.stops: list[str] = []
        self.ended = threading.Semaphore(0)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(8, 1, 2, 3, 4, 5, 60, 70, 8, 9, 10, 20, 50, 12, 7)

    def submit(self, prompt: Encoded, sampling: Sampling) -> Ticket:
        if self.full:
            raise Busy("the queue is full")
        self.asked.append((prompt, sampling))
        ticket = Ticket(len(prompt.input_ids), lambda ticket: None)
        self.tickets.append(ticket)
        threading.Thread(target=self._work, args=(ticket, prompt, sampling), daemon=True).start()
        return ticket

    def _work(self, ticket: Ticket, prompt: Encoded, sampling: Sampling) -> None:
        warm = sampling.max_new_tokens == 1
        text = "w" if warm else self.say(prompt)[: sampling.max_new_tokens]
        shown = ""
        stop: Any = "length" if len(text) == sampling.max_new_tokens else "end"
        for i, sign in enumerate(text):
            if not warm:
                if self.error is not None and i == self.error_at:
                    ticket.close(None, self.error)
                    return
                time.sleep(self.pause)
            if ticket.cancelled:
                stop = "cancelled"
                break
            shown += sign
            ticket.give(Piece(sign, (ord(sign) % 256,), self._logprobs(sign, sampling)))
        self.stops.append(stop)
        ticket.close(Answer(shown, tuple(map(ord, shown)), stop, cached_tokens=3))
        self.ended.release()

    def _logprobs(self, sign: str, sampling: Sampling) -> tuple[TokenLogprob, ...]:
        if sampling.logprobs is None:
            return ()
        top = tuple((i, chr(97 + i), -1.0 - i) for i in range(sampling.logprobs))
        return (TokenLogprob(ord(sign), sign, -0.5, top),)


def make_desk(engine: Any, settings: Settings | None = None) -> Desk:
    facts = Facts(MODEL, context=512, parameters=1_000_000, size=4_000_000, precision="float32")
    return Desk(engine, toy_processor(), facts, settings or Settings())


@contextmanager
def running(desk: Desk) -> Iterator[str]:
    """A server of ``desk`` on a free port; its URL."""
    ready, urls = threading.Event(), []

    def announce(url: str) -> None:
        urls.append(url)
        ready.set()

    server = Server(build(desk), desk, bind("127.0.0.1", 0), announce)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(WAIT)
    try:
        yield urls[0]
    finally:
        server.stop()
        thread.join(WAIT)
        assert not thread.is_alive()


def png(seed: int = 0, size: tuple[int, int] = (56, 56)) -> bytes:
    """A picture of one colour, another one for every seed."""
    colour = (seed * 37 % 256, seed * 91 % 256, seed * 153 % 256)
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def seen(*pictures: bytes) -> str:
    """What :func:`fingerprint` says of these pictures."""
    from cogvlm.processor import user

    return fingerprint(toy_processor().encode([user(*pictures, "x")]))


def until(what: Callable[[], Any]) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + WAIT
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
