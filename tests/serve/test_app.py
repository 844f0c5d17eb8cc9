"""The parts beside the two APIs: health, the page, the description, the command."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from cogvlm import GenerationSettings, complete, user
from cogvlm.cli import app as cli
from cogvlm.engine.service import Engine
from cogvlm.errors import ConfigError, ResourceError
from cogvlm.serve import Desk, Limits, Settings, bind, build, facts_of
from engine.toys import toy_loaded
from serve.fakes import HTTP, MODEL, WAIT, FakeEngine, image_part, make_desk, png, until

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def test_ready_follows_what_the_server_can_do(tmp_path: Path) -> None:
    desk = make_desk(FakeEngine())
    client = TestClient(build(desk, page=tmp_path))
    assert client.get("/health").json() == {"status": "ok"}
    assert (client.get("/ready").status_code, client.get("/ready").json()) == (
        503,
        {"status": "starting"},
    )
    desk.ready = True
    assert client.get("/ready").json() == {"status": "ok", "model": MODEL}
    desk.closing = True
    assert client.get("/ready").json() == {"status": "closing"}


def test_the_page_is_served_and_may_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<h1>page</h1>")
    (tmp_path / "js").mkdir()
    (tmp_path / "js" / "a.js").write_text("1")
    client = TestClient(build(make_desk(FakeEngine()), page=tmp_path))
    page = client.get("/")
    assert page.text == "<h1>page</h1>"
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert client.get("/js/a.js").headers["content-type"].startswith("text/javascript")
    about = client.get("/api/about").json()
    assert (about["backend"], about["where"], about["model"]) == ("local", None, MODEL)
    for path in ("/nothing.html", "/..%2f..%2fpyproject.toml", "/js/%2e%2e/%2e%2e/x", "/%00"):
        assert client.get(path).status_code == 404
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"


def test_without_a_page_there_is_none(tmp_path: Path) -> None:
    client = TestClient(build(make_desk(FakeEngine()), page=tmp_path))
    assert client.get("/").status_code == 404
    assert client.get("/docs").status_code == 404  # would load scripts from elsewhere


def test_the_description_names_every_field() -> None:
    api = TestClient(build(make_desk(FakeEngine()))).get("/openapi.json").json()
    fields = api["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "top_k", "regex", "tools"} <= set(fields)
    assert api["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Limits(tokens=0), "limit tokens=0 is too low; give 1 or more"),
        (lambda: Limits(seconds=float("nan")), "limit seconds=nan is too low"),
        (lambda: Settings(api_keys=("",)), "an API key is empty"),
        (lambda: Settings(grace=-1), "grace=-1 is below 0"),
    ],
)
def test_impossible_settings_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_taken_port_and_a_foreign_host_are_one_line() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} on 127.0.0.1 is taken"):
            bind("127.0.0.1", port)
        done = CliRunner().invoke(cli, ["serve", "--port", str(port)])
        assert done.exit_code == 1
        assert f"error: port {port} on 127.0.0.1 is taken; give another one" in done.output
    with pytest.raises(ResourceError, match=r"203\.0\.113\.1"):
        bind("203.0.113.1", 0)


def test_a_toy_model_answers_each_of_many_as_it_answers_one() -> None:
    """The whole way: HTTP, pictures, prompts, batches that change, answers."""
    loaded = toy_loaded()
    settings = GenerationSettings(max_new_tokens=6)
    alone = [complete(loaded, [user(png(i), f"{i}?")], settings) for i in range(12)]
    assert len({answer.text for answer in alone}) > 3
    engine = Engine(loaded, slots=4, queue=64)
    desk = Desk(engine, loaded.processor, facts_of(loaded), Settings())
    got: dict[int, Any] = {}
    try:
        with running_desk(desk) as url:

            def ask(i: int) -> None:
                content = [image_part(png(i)), {"type": "text", "text": f"{i}?"}]
                body = {
                    "model": "toy",
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": 6,
                }
                got[i] = HTTP.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            metrics = HTTP.get(f"{url}/metrics").text
    finally:
        engine.close()
    texts = [got[i]["choices"][0]["message"]["content"] for i in range(12)]
    assert texts == [answer.text for answer in alone]
    counts = [got[i]["usage"]["completion_tokens"] for i in range(12)]
    assert counts == [len(answer.ids) for answer in alone]
    assert "cogvlm_draft_tokens_total " in metrics and "cogvlm_accepted_tokens_total " in metrics
    assert "cogvlm_answers_finished_total 13" in metrics  # and the one of warming up
    assert facts_of(loaded).context == 512


def running_desk(desk: Desk) -> Any:
    from serve.fakes import running

    return running(desk)


SERVER = """
import sys
sys.path[:0] = {path!r}
from engine.toys import Bytes
from serve.fakes import FakeEngine
import cogvlm.load, cogvlm.engine.service, cogvlm.serve
from serve.fakes import Facts, toy_processor
class Loaded:
    processor = toy_processor()
class Engine(FakeEngine):
    def __init__(self, loaded, **settings):
        super().__init__(say=lambda prompt: "x" * {length}, pause=0.02)
    def close(self):
        print("closed", flush=True)
cogvlm.load.load = lambda *a, **k: Loaded()
cogvlm.engine.service.Engine = Engine
cogvlm.serve.facts_of = lambda loaded, name: Facts(name or "toy")
from cogvlm.cli import main
sys.argv = ["cogvlm", "serve", "--port", "0", *{options!r}]
main()
"""


def start(length: int, *options: str) -> tuple[subprocess.Popen[str], str]:
    code = SERVER.format(path=[p for p in sys.path if p], length=length, options=list(options))
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"is ready at (http://\S+)", line)
    assert found, line + (server.stderr.read() if server.stderr else "")
    return server, found[1]


def listens(url: str) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def load_on(url: str, count: int) -> tuple[list[threading.Thread], list[Any]]:
    """So many answers under way, each begun."""
    results: list[Any] = []
    body = {"model": "toy", "messages": [{"role": "user", "content": "Hi?"}]}

    def ask(stream: bool) -> None:
        address = f"{url}/v1/chat/completions"
        response = HTTP.post(address, json={**body, "stream": stream}, timeout=60)
        results.append((stream, response))

    threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(count)]
    for thread in threads:
        thread.start()
    until(
        lambda: re.search(rf"first_token_seconds_count {count}\n", HTTP.get(f"{url}/metrics").text)
    )
    return threads, results


def contents(results: list[Any]) -> list[tuple[str, str]]:
    """Text and reason of every answer."""
    found = []
    for stream, response in results:
        assert response.status_code == 200
        if not stream:
            choice = response.json()["choices"][0]
            found.append((choice["message"]["content"], choice["finish_reason"]))
            continue
        events = [e[6:] for e in response.text.split("\n\n") if e]
        assert events[-1] == "[DONE]"
        choices = [json.loads(e)["choices"][0] for e in events[:-1]]
        text = "".join(c["delta"].get("content", "") for c in choices)
        found.append((text, choices[-1]["finish_reason"]))
    return found


@POSIX
def test_sigterm_under_load_loses_nothing() -> None:
    server, url = start(100, "--grace", "30", "--quiet")
    threads, results = load_on(url, 8)
    server.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(WAIT)
    out, errors = server.communicate(timeout=WAIT)
    assert contents(results) == [("x" * 100, "stop")] * 8
    assert (server.returncode, out) == (0, "closed\n")
    assert "Traceback" not in errors


@POSIX
def test_a_second_signal_returns_what_is_there() -> None:
    server, url = start(100_000, "--grace", "600", "--max-tokens", "100000")
    threads, results = load_on(url, 4)
    server.send_signal(signal.SIGTERM)
    until(lambda: not listens(url))
    server.send_signal(signal.SIGINT)
    for thread in threads:
        thread.join(WAIT)
    out, errors = server.communicate(timeout=WAIT)
    found = contents(results)
    assert len(found) == 4
    assert all(text.strip("x") == "" and reason == "length" for text, reason in found)
    assert (server.returncode, out) == (0, "closed\n")
    assert "Traceback" not in errors
    assert re.search(r"INFO 127\.0\.0\.1 POST /v1/chat/completions 200 \d", errors)
