"""The server in front of a server elsewhere: what goes on, what comes back, what may go wrong."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

from answering import Act, Handler, answer, serving, status, stream
from answering import Server as Elsewhere
from cogvlm.cli import app as cli
from cogvlm.remote import Endpoint, Forwarder
from cogvlm.serve import Limits, Relay, Settings, media
from cogvlm.serve.protocol import ChatRequest
from cogvlm.serve.relay import REFUSED, SENT
from serve.fakes import HTTP, WAIT, data_url, image_part, png, running, until
from serve.test_app import POSIX
from serve.test_faults import bomb, head, send

CHAT = "/v1/chat/completions"


def body(content: Any = "Hi?", **more: Any) -> dict[str, Any]:
    return {"model": "ours", "messages": [{"role": "user", "content": content}], **more}


@contextmanager
def relayed(
    *acts: Act, settings: Settings | None = None, slots: int = 8, **more: Any
) -> Iterator[tuple[str, Elsewhere, Relay]]:
    """A server whose model is elsewhere, where every request is met by an act."""
    with serving(*acts) as there:
        endpoint = Endpoint(there.url, "theirs", "secret", **more)
        relay = Relay(Forwarder(endpoint), "ours", settings or Settings(), slots)
        with running(relay) as url:
            yield url, there, relay


def works(url: str) -> None:
    done = HTTP.post(url + CHAT, json=body())
    assert done.json()["choices"][0]["message"]["content"] == "Hi? (0 pictures)"


def events(response: Any) -> list[Any]:
    found = [e[6:] for e in response.text.split("\n\n") if e]
    return [e if e == "[DONE]" else json.loads(e) for e in found]


# --- what goes on, what comes back ---


def test_openais_client_is_answered_from_elsewhere() -> None:
    with relayed() as (url, there, relay):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=None)
        with closing(client):
            assert [m.id for m in client.models.list()] == ["ours"]
            content: Any = [image_part(png(1)), {"type": "text", "text": "What?"}]
            messages: Any = [{"role": "user", "content": content}]
            done = client.chat.completions.create(model="ours", messages=messages, temperature=0.5)
            assert (done.model, done.choices[0].message.content) == ("ours", "What? (1 pictures)")
            chunks = list(
                client.chat.completions.create(
                    model="ours",
                    messages=messages,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "What? (1 pictures)"
        assert {c.model for c in chunks} == {"ours"}
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 7
        path, headers, sent = there.seen[0]
        assert (path, headers["Authorization"]) == (CHAT, "Bearer secret")
        assert sent == {
            "model": "theirs",
            "messages": messages,
            "temperature": 0.5,
            "stream": False,
            "max_tokens": 1024,
        }
        assert there.seen[1][2]["stream_options"] == {"include_usage": True}
        metrics = HTTP.get(f"{url}/metrics").text
        assert "cogvlm_answers_finished_total 2\n" in metrics
        assert "cogvlm_generated_tokens_total 12\n" in metrics
        assert "time_to_first_token_seconds_count 1\n" in metrics
        assert "steps_total" not in metrics  # not known of a server elsewhere
        assert (relay.inflight, relay.running, relay.stats.running) == (0, set(), 0)


def test_what_is_said_of_it() -> None:
    with relayed() as (url, there, _):
        about = HTTP.get(f"{url}/api/about").json()
        assert (about["backend"], about["model"]) == ("remote", "ours")
        assert about["where"] == there.url[7:-3]
        assert HTTP.get(f"{url}/ready").json() == {"status": "ok", "model": "ours"}
        assert HTTP.get(f"{url}/health").status_code == 200
        (model,) = HTTP.get(f"{url}/v1/models").json()["data"]
        assert (model["id"], model["owned_by"], model["max_images"]) == ("ours", about["where"], 16)
        assert HTTP.get(f"{url}/v1/models/other").status_code == 404
        assert there.seen == []  # nothing of this asks elsewhere
        page = HTTP.get(f"{url}/")
        assert "<title>CogVLM</title>" in page.text
        policy = page.headers["content-security-policy"]
        assert policy == "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
        for file in re.findall(r'(?:src|href)="([^#"]+)"', page.text):
            found = HTTP.get(f"{url}/{file}")
            assert (found.status_code, found.headers["content-security-policy"]) == (200, policy)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/api/chat"),
        ("POST", "/api/generate"),
        ("POST", "/api/show"),
        ("GET", "/api/tags"),
        ("GET", "/api/version"),
    ],
)
def test_what_is_not_offered_says_so(method: str, path: str) -> None:
    with relayed() as (url, there, _):
        refused = HTTP.request(method, url + path, json={})
        error = refused.json()["error"]
        said = error if path.startswith("/api") else error["message"]
        assert refused.status_code == 501 and f"{path} is not offered here" in said
        assert there.seen == []


def test_every_field_is_sent_or_refused_or_asks_for_nothing() -> None:
    fields = set(ChatRequest.model_fields) - {"model", "messages"}
    assert {*SENT, *REFUSED} <= fields
    for name in fields - {*SENT, *REFUSED}:
        assert ChatRequest.model_fields[name].annotation is Any, name  # only() its neutral values
    given = {
        "temperature": 0.1,
        "top_p": 0.2,
        "max_completion_tokens": 3,
        "stop": ["x"],
        "seed": 4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.6,
        "logit_bias": {"7": 1.0},
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "user": "me",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "top_k": 8,
        "min_p": 0.9,
        "repetition_penalty": 1.1,
    }
    nothing = {"n": 1, "tools": [], "store": False, "repetition_stop": False}
    with relayed() as (url, there, _):
        assert HTTP.post(url + CHAT, json=body(**given, **nothing)).status_code == 200
        sent = there.seen[-1][2]
        assert {k: v for k, v in sent.items() if k not in ("model", "messages", "stream")} == given
        neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        assert HTTP.post(url + CHAT, json=body(**neutral)).status_code == 200
        assert not set(neutral) & set(there.seen[-1][2])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"regex": "a+"}, "regex: only models of this server's own"),
        ({"repetition_stop": True}, "repetition_stop: only models"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"guided_regex": "a"}, "guided_regex: no such field"),
        ({"stream_options": {"include_usage": True}}, "stream_options: needs stream=true"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs=true"),
        ({"max_tokens": 5000}, "max_tokens=5000 is over this server's limit"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "give one of them"),
        ({"model": "theirs"}, "no model 'theirs' here"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, "30000 characters"),
        ({"messages": [{"role": "user", "content": [image_part(png(i)) for i in range(3)]}]}, "3"),
    ],
)
def test_our_own_limits_hold_and_nothing_leaves(more: dict[str, Any], says: str) -> None:
    settings = Settings(Limits(images=2, characters=20_000))
    with relayed(settings=settings) as (url, there, _):
        refused = HTTP.post(url + CHAT, json={**body(), **more})
        assert refused.status_code in (400, 404)
        assert says in refused.json()["error"]["message"]
        assert there.seen == []


def test_our_own_keys_are_asked_for_and_stay_here() -> None:
    with relayed(settings=Settings(api_keys=("ours-alone",))) as (url, there, _):
        assert HTTP.post(url + CHAT, json=body()).status_code == 401
        ours = {"Authorization": "Bearer ours-alone"}
        assert HTTP.post(url + CHAT, json=body(), headers=ours).status_code == 200
        assert "ours-alone" not in str(there.seen)


# --- pictures ---


def test_pictures_are_read_here_and_go_on_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    large = png(3, (400, 100))
    monkeypatch.setattr(media, "read", _reading(media.read, {"https://pictures.example/a": large}))
    detail: Any = {"url": "https://pictures.example/a", "detail": "high"}
    parts = [{"type": "image_url", "image_url": detail}, image_part(png(1))]
    with relayed(max_side=200) as (url, there, _):
        assert HTTP.post(url + CHAT, json=body([*parts])).status_code == 200
        first, second = there.seen[0][2]["messages"][0]["content"]
        assert second == image_part(png(1))
        assert first["image_url"]["detail"] == "high"
        data = base64.b64decode(first["image_url"]["url"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (200, 50)


def _reading(real: Any, known: dict[str, bytes]) -> Any:
    return lambda url, rules, where: known[url] if url in known else real(url, rules, where)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("https://127.0.0.1/a.png", "https URLs are not fetched here"),
        ("file:///etc/passwd", "scheme 'file' is not supported"),
        ("/etc/passwd", "scheme '' is not supported"),
        (data_url(b"a secret that is no picture"), "not a picture"),
        (data_url(bomb(50_000, 50_000)), "limit"),
        (data_url(png(1, (400, 300))), "over the limit of 100000"),
    ],
    ids=["http", "file", "path", "text", "bomb", "large"],
)
def test_what_is_no_picture_does_not_leave(part: str, says: str) -> None:
    with relayed(settings=Settings(Limits(pixels=100_000))) as (url, there, _):
        content = [{"type": "image_url", "image_url": {"url": part}}]
        refused = HTTP.post(url + CHAT, json=body(content))
        assert refused.status_code == 400
        assert says in refused.json()["error"]["message"]
        assert there.seen == []
        works(url)


# --- what may go wrong there ---


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("act", "gives", "says"),
    [
        (status(400), 400, "refused or failed (400: reason 400)"),
        (status(404), 404, "reason 404"),
        (status(401, {"error": {"message": "bad key secret"}}), 502, "it is not your key"),
        (status(403), 502, "refuses this server, which has a key that is wrong"),
        (status(429, Retry_After="7"), 429, "reason 429"),
        (status(500), 500, "reason 500"),
        (status(503, b"<html>busy</html>", Retry_After="2.5"), 503, "(503)"),
        (status(302, Location="http://127.0.0.1:1/"), 502, "gave status 302"),
        (status(204), 502, "gave status 204"),
        (status(200, b"<html>hello</html>"), 502, "not as a chat completions server"),
        (status(200, {"choices": "none"}), 502, "not as a chat completions server"),
        (status(200, {"error": {"message": "too hot"}}), 502, "failed (too hot)"),
        (status(422, {"error": {"message": "the key secret", "param": "x"}}), 422, "the key ***"),
    ],
)
def test_errors_come_back_in_our_form(
    act: Act, gives: int, says: str, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "cogvlm.serve")
    with relayed(act, answer) as (url, there, relay):
        failed = HTTP.post(url + CHAT, json=body(stream=streamed))
        error = failed.json()["error"]
        assert (failed.status_code, set(error)) == (gives, {"message", "type", "param", "code"})
        assert there.url[7:-3] in error["message"] and says in error["message"]
        assert "secret" not in failed.text and "secret" not in caplog.text
        assert bool(caplog.records) == (gives >= 500)
        assert failed.headers.get("retry-after") == {429: "7", 503: "3"}.get(gives)
        assert error["param"] == ("x" if gives == 422 else None)
        assert (len(there.seen), relay.stats.failed, relay.stats.running) == (1, 1, 0)
        works(url)


def test_where_nobody_answers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "cogvlm.serve")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # taken, and nobody listens
        endpoint = Endpoint(f"http://127.0.0.1:{sock.getsockname()[1]}/v1", "theirs")
        with running(Relay(Forwarder(endpoint), "ours", Settings())) as url:
            failed = HTTP.post(url + CHAT, json=body())
    assert (failed.status_code, failed.json()["error"]["code"]) == (502, "upstream_unreachable")
    assert "ConnectError" in caplog.text and "ConnectError" not in failed.text


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "x", "model": "theirs", "choices": [choice]}


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (["{"], "not as a chat completions server"),
        ([{"error": {"message": "out of memory"}}], "failed (out of memory)"),
        ([], "ended the connection inside the answer"),
    ],
)
def test_a_stream_that_breaks_off_ends_with_an_error(sent: list[Any], says: str) -> None:
    with relayed(lambda handler, _: stream(handler, piece("ab"), *sent), answer) as (url, _, relay):
        cut = events(HTTP.post(url + CHAT, json=body(stream=True)))
        assert cut[0] == {**piece("ab"), "model": "ours"}
        assert says in cut[-1]["error"]["message"] and len(cut) == 2
        assert relay.stats.failed == 1
        works(url)


def test_an_answer_cut_in_the_middle() -> None:
    def half(handler: Handler, _: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')

    with relayed(half, answer) as (url, _, _relay):
        failed = HTTP.post(url + CHAT, json=body())
        assert failed.status_code == 502
        assert "broke the connection inside the answer" in failed.json()["error"]["message"]
        works(url)


def test_streams_of_other_habits() -> None:
    no_done: Act = lambda handler, _: stream(handler, piece("ab"), piece("", "stop"))  # noqa: E731
    with relayed(no_done) as (url, _, _relay):
        assert events(HTTP.post(url + CHAT, json=body(stream=True)))[-1] == "[DONE]"
    never: Act = lambda handler, b: answer(handler, {**b, "stream": False})  # noqa: E731
    with relayed(never) as (url, _, _relay):
        one, done = events(HTTP.post(url + CHAT, json=body(stream=True)))
        assert one["choices"][0]["delta"]["content"] == "Hi? (0 pictures)"
        assert done == "[DONE]"
    newer = status(400, {"error": {"message": "use max_completion_tokens instead"}})
    with relayed(newer, answer) as (url, there, _relay):
        works(url)
        works(url)
        limits = [{k for k in seen[2] if k.startswith("max")} for seen in there.seen]
        assert limits == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]


# --- time, and callers who leave ---


class Slow:
    """An act that goes on until its reader leaves, and then says so."""

    def __init__(self, begins: bool) -> None:
        self.begins = begins
        self.asked, self.left = threading.Event(), threading.Event()

    def __call__(self, handler: Handler, _: Any) -> None:
        self.asked.set()
        if self.begins:
            stream(handler, piece("ab"))
        handler.connection.settimeout(WAIT)
        if handler.connection.recv(1) == b"":  # closed there
            self.left.set()


@pytest.mark.parametrize(("streamed", "begins"), [(False, False), (True, False), (True, True)])
def test_a_caller_who_leaves_closes_the_connection_elsewhere(streamed: bool, begins: bool) -> None:
    slow = Slow(begins)
    with relayed(slow, answer) as (url, _, relay):
        data = json.dumps(body(stream=streamed)).encode()
        sock = send(url, head(len(data)) + data)
        assert slow.asked.wait(WAIT)
        if begins:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        assert not slow.left.is_set()
        sock.close()
        assert slow.left.wait(WAIT)
        until(lambda: relay.inflight == 0 and not relay.running)
        assert (relay.stats.cancelled, relay.stats.running, relay.stats.queued) == (1, 0, 0)
        works(url)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_slow_server_elsewhere_is_given_up_in_time(streamed: bool) -> None:
    slow = Slow(begins=False)
    with relayed(slow, answer, settings=Settings(Limits(seconds=0.5))) as (url, _, _relay):
        late = HTTP.post(url + CHAT, json=body(stream=streamed))
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert slow.left.wait(WAIT)
        works(url)


def test_time_ends_a_stream_where_it_is() -> None:
    slow = Slow(begins=True)
    with relayed(slow, answer, settings=Settings(Limits(seconds=0.5))) as (url, _, _relay):
        first, last, done = events(HTTP.post(url + CHAT, json=body(stream=True)))
        assert (first["choices"][0]["delta"], last["id"]) == ({"content": "ab"}, "x")
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        assert slow.left.wait(WAIT)


def test_silence_elsewhere_is_told() -> None:
    with relayed(Slow(begins=False), Slow(begins=True), timeout=0.3) as (url, _, _relay):
        failed = HTTP.post(url + CHAT, json=body())
        assert (failed.status_code, failed.json()["error"]["code"]) == (504, "upstream_timeout")
        cut = events(HTTP.post(url + CHAT, json=body(stream=True)))
        assert "silent for too long" in cut[-1]["error"]["message"]


def test_so_many_are_asked_at_once_and_a_shutdown_ends_them() -> None:
    slow, settings = Slow(begins=True), Settings(grace=0.0)
    results: list[Any] = []
    with relayed(slow, settings=settings, slots=1) as (url, there, relay):
        threads = [
            threading.Thread(
                target=lambda: results.append(HTTP.post(url + CHAT, json=body(stream=True)))
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: (relay.stats.running, relay.stats.queued) == (1, 1))
        assert slow.asked.wait(WAIT) and relay.inflight == 2
        until(lambda: "token_seconds_count 1\n" in HTTP.get(f"{url}/metrics").text)
    for thread in threads:
        thread.join(WAIT)
    cut, refused = sorted(results, key=lambda r: int(r.status_code))
    assert events(cut)[-2]["choices"][0]["finish_reason"] == "length"
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closing")
    assert len(there.seen) == 1


# --- the command ---


@POSIX
def test_the_command_loads_no_model_and_says_where_pictures_go(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from cogvlm.cli import main; main()"
    )
    with serving() as there:
        arguments = ["serve", "--port", "0", "--base-url", there.url, "--quiet"]
        server = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(p for p in sys.path if p), "HOME": str(tmp_path)},
        )
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        found = re.match(r"big at 127\.0\.0\.1:\d+ is ready at (http://\S+)  \(OpenAI: ", line)
        assert found, line + server.stderr.read()
        asked = HTTP.post(found[1] + CHAT, json={**body([image_part(png())]), "model": "big"})
        assert asked.json()["choices"][0]["message"]["content"] == "None (1 pictures)"
        bad = HTTP.post(found[1] + CHAT, json={**body(), "model": "big", "top_p": 5})
        assert bad.status_code == 400
        server.send_signal(signal.SIGTERM)
        out, errors = server.communicate(timeout=WAIT)
        assert (server.returncode, out) == (0, "")
        assert errors == f"pictures go to {there.url[7:-3]}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--base-url", "http://h/v1", "--precision", "int8"], "--precision is for local models"),
        (["--base-url", "h/v1"], "base URL 'h/v1' is not usable"),
        (["--base-url", "http://h/v1", "--api-key-env", "NONE_SUCH"], "NONE_SUCH is not set"),
        (["--api-key-env", "MY_KEY"], "--api-key-env is for a server: give --base-url too"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], says: str) -> None:
    refused = CliRunner().invoke(cli, ["serve", "--port", "0", *arguments])
    assert refused.exit_code == 2 and says in refused.stderr
