"""Backends without a model, and a server that speaks OpenAI's protocol as a test tells it to."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cogvlm.backend import Reply
from cogvlm.errors import CogVLMError, InputError
from cogvlm.processor import Message, check_order, load_image
from cogvlm.settings import GenerationSettings


class Echo:
    """Says what it was asked and how large the pictures are."""

    name = "echo"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.heard: list[tuple[Message, ...]] = []

    def prepare(self, messages: Sequence[Message]) -> str:
        check_order(messages)
        sizes = [load_image(image.source).size for m in messages for image in m.images]
        return f"{messages[-1].text} {' '.join(f'{w}x{h}' for w, h in sizes)}".strip()

    def answer_batch(
        self, prepared: Sequence[str], settings: GenerationSettings
    ) -> list[Reply | CogVLMError]:
        self.batches.append(len(prepared))
        return [Reply(text, len(text), "end") for text in prepared]

    def stream(self, messages: Sequence[Message], settings: GenerationSettings) -> EchoPieces:
        self.heard.append(tuple(messages))
        return EchoPieces(self.prepare(messages), settings)


class EchoPieces:
    def __init__(self, text: str, settings: GenerationSettings) -> None:
        self._text = text[: settings.max_new_tokens]
        self._left = iter(self._text)
        self._stop = "end" if self._text == text else "length"

    def __iter__(self) -> EchoPieces:
        return self

    def __next__(self) -> str:
        return next(self._left)

    @property
    def reply(self) -> Reply:
        return Reply(self._text, len(self._text), self._stop)

    def close(self) -> None:
        raise InputError("not used")


def open_echo(device: str, count: int) -> Echo:
    """For processes: a device named "dies" is killed at once, "breaks" cannot be opened."""
    if device == "dies":
        os._exit(9)
    if device == "breaks":
        raise InputError("no such device")
    return Echo()


Act = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Does the acts of its server in turn, the last one for ever."""

    server: Server

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            acts = self.server.acts
            act = acts.pop(0) if len(acts) > 1 else acts[0]
        act(self, body)

    def reply(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(body, bytes) else "application/json"
        values = {"Content-Type": kind, "Content-Length": str(len(data)), **headers}
        for name, value in values.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, acts: list[Act], models: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.acts, self.models = acts, models
        self.lock = threading.Lock()
        self.seen: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that left is no error here."""


def answer(handler: Handler, body: dict[str, Any]) -> None:
    """What was asked, in one piece or in three."""
    last = body["messages"][-1]["content"]
    parts = last if isinstance(last, list) else [{"type": "text", "text": last}]
    images = sum(part["type"] == "image_url" for part in parts)
    text = f"{parts[-1].get('text')} ({images} pictures)"
    if not body["stream"]:
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        handler.reply(200, {"choices": [choice], "usage": {"completion_tokens": 5}})
        return
    deltas: list[dict[str, Any]] = [{"role": "assistant"}]
    deltas += [{"content": text[:3]}, {"content": text[3:6]}, {"content": text[6:]}]
    events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    events.append({"choices": [], "usage": {"completion_tokens": 7}})
    stream(handler, *events, "[DONE]")


def stream(handler: Handler, *events: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
    handler.end_headers()
    handler.wfile.write(b": a comment\n\n")
    for event in events:
        text = event if isinstance(event, str) else json.dumps(event)
        handler.wfile.write(f"data: {text}\n\n".encode())
        handler.wfile.flush()


def status(code: int, body: Any = None, **headers: str) -> Act:
    said = {"error": {"message": f"reason {code}"}} if body is None else body
    return lambda handler, _: handler.reply(code, said, **headers)


@contextmanager
def serving(*acts: Act, models: Sequence[str] = ("big",)) -> Iterator[Server]:
    server = Server(list(acts) or [answer], list(models))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
