"""A server that looks like ours from the page's side: canned answers, chosen by the question.

It serves the page's folder under the strict policy the page must live with, and keeps every
request it sees. Knows nothing of models.
"""

from __future__ import annotations

import json
import mimetypes
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEB = Path(__file__).parents[2] / "src" / "cogvlm" / "web"
POLICY = "default-src 'self'; img-src 'self' data: blob:"

ANSWERS = {
    "boxes": "A cat [[100,200,500,600]] and two birds [[000,000,250,250;750,500,999,999]].",
    "script": '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
    " [go](javascript:window.hit=1) ![x](http://elsewhere.example/x.png) <b>bold</b>",
    "markdown": "# Title\n\nOne **bold** and *slanted* and `code`, 2 * 3 * 4.\n\n- first\n"
    "- second\n  1. inner\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    "```\n<i>raw</i>\n  kept\n```\n> said",
}


class Fake(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []  # bodies of /v1/chat/completions
        self.headers: list[dict[str, str]] = []  # their headers
        self.models = ["nano", "other"]
        self.about: dict[str, str] | None = None  # None: 404
        self.key: str | None = None
        self.busy = 0  # how many more times to say 429
        self.gone = threading.Event()  # a client left while it was answered
        self.go_on = threading.Event()  # lets "held" finish

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves is no fault."""


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, body: Any, status: int = 200, **headers: str) -> None:
        self.send(status, json.dumps(body).encode(), "application/json", **headers)

    def error(self, status: int, message: str = "as asked", **headers: str) -> None:
        self.json({"error": {"message": message, "type": "x", "code": None}}, status, **headers)

    def locked(self) -> bool:
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.error(401, "no such key")
        return True

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/v1/models":
            if not self.locked():
                self.json({"object": "list", "data": [{"id": m} for m in self.server.models]})
        elif path == "/api/about":
            if self.server.about is None:
                self.error(404)
            else:
                self.json(self.server.about)
        else:
            file = WEB / ("index.html" if path == "/" else path[1:])
            if not file.is_file():
                self.error(404)
                return
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            self.send(200, file.read_bytes(), kind)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.locked():
            return
        self.server.asked.append(body)
        self.server.headers.append(dict(self.headers))
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[-1]["text"]
        word, _, rest = question.partition(" ")
        if word == "fail":
            status, _, message = rest.partition(" ")
            self.error(int(status), message or "as asked")
        elif word == "busy" and self.server.busy:
            self.server.busy -= 1
            self.error(429, "full", Retry_After="1")
        else:
            self.stream(word, rest, body["model"])

    def stream(self, word: str, rest: str, model: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces = list(self.pieces(word, rest))
        try:
            count = 0
            for piece in pieces if word != "endless" else self.pieces("forever", ""):
                if word == "held" and count == 2:
                    self.server.go_on.wait(120)
                count += 1
                self.chunk(model, {"choices": [{"index": 0, "delta": {"content": piece}}]})
            if word == "cut":
                return
            if word == "inside":
                self.event(json.dumps({"error": {"message": "the model failed", "code": 500}}))
                return
            finish = "length" if word == "long" else "stop"
            self.chunk(model, {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
            usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
            self.chunk(model, {"choices": [], "usage": usage})
            self.event("[DONE]")
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()

    def pieces(self, word: str, rest: str) -> Iterator[str]:
        if word == "forever":
            while True:
                yield "on and on. "
                time.sleep(0.02)
        text = ANSWERS.get(word, rest or f"You said: {word}")
        for start in range(0, len(text), 5):
            yield text[start : start + 5]
            time.sleep(0.002)

    def chunk(self, model: str, what: dict[str, Any]) -> None:
        self.event(json.dumps({"object": "chat.completion.chunk", "model": model, **what}))

    def event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()
