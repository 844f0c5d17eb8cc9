"""Everything that goes wrong between a client and a model; the server answers the next one."""

from __future__ import annotations

import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from cogvlm.errors import ResourceError
from cogvlm.processor.encode import Encoded
from cogvlm.serve import Desk, Limits, Settings
from serve.fakes import (
    HTTP,
    MODEL,
    FakeEngine,
    echo,
    image_part,
    make_desk,
    png,
    running,
    seen,
    until,
)

CHAT = "/v1/chat/completions"


def body(text: str = "Hi?", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def works(url: str) -> None:
    response = HTTP.post(url + CHAT, json=body())
    assert response.json()["choices"][0]["message"]["content"] == "Question: Hi? Answer:|none"


def send(url: str, data: bytes) -> socket.socket:
    parts = urlsplit(url)
    sock = socket.create_connection((str(parts.hostname), int(parts.port or 0)), 20)
    sock.sendall(data)
    return sock


def head(length: int | None, path: str = CHAT) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{size}\r\n\r\n".encode()


LIMITS = Limits(body_bytes=50_000, characters=20_000, pixels=100_000, images=2, upload_seconds=0.5)


@pytest.fixture(scope="module")
def desk() -> Desk:
    return make_desk(FakeEngine(), Settings(LIMITS))


@pytest.fixture(scope="module")
def url(desk: Desk) -> Iterator[str]:
    with running(desk) as url:
        yield url


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "the body is missing"),
        (b"{", "not valid JSON"),
        (b"[]", "Input should be"),
        (b"null", "the body"),
        (b"5", "the body"),
        (b"\xff\xfe", "not valid JSON"),
        (b"\x80", "parsing the body"),
        (b"[" * 20_000, "the body"),
        (b'{"model": ' + b"9" * 5000 + b"}", "the body"),
        (b'{"model": "\\ud800"}', "model: holds half of a surrogate pair"),
        (b'{"model": "toy", "messages": [{"role": "user", "content": "\\udc00"}]}', "surrogate"),
        (b'{"\\ud800": 1, "messages": []}', "unicode"),
        (b'{"model": "toy", "temperature": NaN, "messages": []}', "temperature"),
        (b'{"model": "toy", "temperature": 1e999, "messages": []}', "temperature"),
        (b'{"a\\u0000": 1, "model": "toy", "messages": []}', "a"),
    ],
    ids=lambda v: repr(v)[:40],
)
def test_bodies_that_are_no_requests(url: str, raw: bytes, says: str) -> None:
    response = HTTP.post(url + CHAT, content=raw)
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error["message"] or says == error["param"]
    assert "Traceback" not in response.text


def test_bodies_over_the_limit_are_refused_however_they_come(url: str) -> None:
    declared = HTTP.post(url + CHAT, content=b"x" * 60_000)
    assert (declared.status_code, declared.json()["error"]["code"]) == (413, "too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(60):
            yield b"x" * 1000

    assert HTTP.post(url + CHAT, content=chunks()).status_code == 413
    # So large that it is not even read; whether the answer is seen is up to the system.
    with send(url, head(10**9)) as sock:
        assert sock.recv(100).startswith(b"HTTP/1.1 413")
    works(url)


def test_ten_megabytes_of_prompt_are_refused_before_they_are_tokenized() -> None:
    engine = FakeEngine()
    with running(make_desk(engine)) as url:
        response = HTTP.post(url + CHAT, json=body("word " * 2_000_000), timeout=60)
        assert response.status_code == 400
        assert "10000000 characters of text, the limit is 1000000" in response.text
        assert len(engine.asked) == 1  # warming up
        works(url)


def test_too_many_and_too_large_pictures_are_refused(url: str) -> None:
    three = [image_part(png(i)) for i in range(3)]
    response = HTTP.post(url + CHAT, json=body(three))  # type: ignore[arg-type]
    assert response.status_code == 400
    assert "3 images, the limit is 2" in response.text
    large = HTTP.post(url + CHAT, json=body([image_part(png(1, (400, 300)))]))  # type: ignore[arg-type]
    assert large.status_code == 400
    assert "over the limit of 100000" in large.text


def bomb(width: int, height: int) -> bytes:
    """A small file of many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    pixels = zlib.compress(b"\x00" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize("size", [(9000, 9000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused(url: str, size: tuple[int, int]) -> None:
    response = HTTP.post(url + CHAT, json=body([image_part(bomb(*size))]))  # type: ignore[arg-type]
    assert response.status_code == 400
    assert "limit" in response.json()["error"]["message"]
    works(url)


def test_half_an_upload_is_not_waited_for_for_ever(url: str, desk: Desk) -> None:
    with send(url, head(1000) + b'{"model"') as sock:
        assert b" 408 " in sock.recv(100)
    # One that leaves in the middle.
    send(url, head(None) + b'3\r\n{"m\r\n').close()
    until(lambda: desk.inflight == 0)
    works(url)


def test_what_is_no_http_is_refused(url: str) -> None:
    with send(url, b"\x16\x03\x01\x02\x00 hello\r\n\r\n") as sock:
        assert b" 400 " in sock.recv(100)
    works(url)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(stream: bool) -> None:
    engine = FakeEngine(say=lambda prompt: "x" * 500, pause=0.02)
    desk = make_desk(engine)
    with running(desk) as url:
        data = json.dumps(body(stream=stream)).encode()
        sock = send(url, head(len(data)) + data)
        if stream:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        else:
            until(lambda: len(engine.tickets) == 2)
        sock.close()
        until(lambda: engine.tickets[-1].complete)
        assert engine.stops == ["length", "cancelled"]
        until(lambda: desk.inflight == 0 and not desk.running)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (RuntimeError("secret of the house"), 500, "the server failed on this request"),
        (ResourceError("out of memory with 1 prompts; use smaller pictures"), 503, "out of memory"),
        (KeyError(5), 500, "the server failed on this request"),
    ],
)
def test_a_failing_model_fails_one_request(
    stream: bool, error: Exception, status: int, says: str
) -> None:
    engine = FakeEngine(error=error)
    with running(make_desk(engine)) as url:
        response = HTTP.post(url + CHAT, json=body(stream=stream))
        assert response.status_code == status
        assert says in response.json()["error"]["message"]
        assert "secret" not in response.text
        engine.error = None
        works(url)


def test_an_error_in_mid_stream_is_an_event() -> None:
    engine = FakeEngine(error=RuntimeError("secret of the house"), error_at=2)
    with running(make_desk(engine)) as url:
        response = HTTP.post(url + CHAT, json=body(stream=True))
        events = [e[6:] for e in response.text.split("\n\n") if e]
        assert response.status_code == 200
        assert json.loads(events[-1])["error"]["type"] == "server_error"
        assert "[DONE]" not in response.text
        assert "secret" not in response.text


def test_a_prompt_that_breaks_the_processor_breaks_nothing_else() -> None:
    engine = FakeEngine()

    def fail(prompt: Encoded) -> str:
        raise AssertionError("not reached")

    desk = make_desk(engine)
    with running(desk) as url:
        good, desk.chat = desk.chat, lambda make: fail  # type: ignore[assignment, method-assign, return-value]
        assert HTTP.post(url + CHAT, json=body()).status_code == 500
        desk.chat = good  # type: ignore[method-assign]
        works(url)


def test_more_requests_than_allowed_are_told_to_come_back() -> None:
    engine = FakeEngine(say=lambda prompt: "x" * 100_000, pause=0.01)
    limits = Limits(requests=2, tokens=100_000)
    with (
        running(make_desk(engine, Settings(limits))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        with client.stream("POST", CHAT, json=body(stream=True)) as one:
            kept = [one.iter_lines()]  # one that is let go closes its connection
            next(kept[0])
            with client.stream("POST", CHAT, json=body(stream=True)) as two:
                kept.append(two.iter_lines())
                next(kept[1])
                third = client.post(CHAT, json=body())
                assert (third.status_code, third.headers["retry-after"]) == (429, "2")
                assert client.get("/health").status_code == 200
        until(lambda: client.post(CHAT, json=body(max_tokens=2)).status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_time_ends_an_answer_where_it_is(stream: bool) -> None:
    engine = FakeEngine(say=lambda prompt: "x" * 1000, pause=0.02)
    limits = Limits(seconds=1.0)
    with running(make_desk(engine, Settings(limits))) as url:
        response = HTTP.post(url + CHAT, json=body(stream=stream), timeout=20)
        assert response.status_code == 200
        assert '"finish_reason": "length"' in response.text.replace('":"', '": "')
        assert 0 < response.text.count("x") < 1000


def test_time_that_is_over_before_the_answer_is_an_error() -> None:
    engine = FakeEngine(pause=60.0)
    with running(make_desk(engine, Settings(Limits(seconds=1.0)))) as url:
        # The fake looks at its ticket between two signs; the real one at every step.
        engine.tickets.clear()
        done = threading.Event()

        def finish() -> None:
            until(lambda: engine.tickets and engine.tickets[0].cancelled)
            from cogvlm.engine.service import Answer

            engine.tickets[0].close(Answer("", (), "cancelled"))
            done.set()

        threading.Thread(target=finish, daemon=True).start()
        response = HTTP.post(url + CHAT, json=body(), timeout=20)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert done.wait(5)


def test_closing_finishes_what_runs_and_takes_nothing_new() -> None:
    engine = FakeEngine(say=lambda prompt: "x" * 40, pause=0.02)
    desk = make_desk(engine)
    answers: list[httpx.Response] = []
    with running(desk) as url:
        ask = threading.Thread(
            target=lambda: answers.append(HTTP.post(url + CHAT, json=body(), timeout=30))
        )
        ask.start()
        until(lambda: len(engine.tickets) == 2)
    ask.join(20)
    assert answers[0].json()["choices"][0]["message"]["content"] == "x" * 40
    assert answers[0].json()["choices"][0]["finish_reason"] == "stop"
    with pytest.raises(httpx.ConnectError):
        HTTP.get(url + "/health")


def test_closing_returns_what_is_there_when_the_grace_is_over() -> None:
    engine = FakeEngine(say=lambda prompt: "x" * 1000, pause=0.02)
    desk = make_desk(engine, Settings(grace=0.2))
    answers: list[httpx.Response] = []
    with running(desk) as url, httpx.Client(base_url=url, timeout=30) as kept:
        assert kept.get("/ready").status_code == 200
        ask = threading.Thread(
            target=lambda: answers.append(HTTP.post(url + CHAT, json=body(), timeout=30))
        )
        ask.start()
        until(lambda: len(engine.tickets) == 2)
        time.sleep(0.2)
        desk.closing = True
        assert kept.get("/ready").status_code == 503
        assert kept.get("/health").status_code == 200
        refused = kept.post(CHAT, json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closing")
    ask.join(20)
    choice = answers[0].json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert 0 < len(choice["message"]["content"]) < 1000


def test_pages_of_other_origins_may_not_ask(url: str) -> None:
    def status(origin: str, at: str = url) -> int:
        return HTTP.post(at + CHAT, json=body(), headers={"origin": origin}).status_code

    assert status("https://evil.example") == 403
    assert status("null") == 403
    assert status(url) == 200
    answer = HTTP.get(url + "/v1/models")
    assert "access-control-allow-origin" not in answer.headers
    settings = Settings(origins=("https://page.example",), api_keys=("k",))
    with running(make_desk(FakeEngine(), settings)) as allowed:
        headers = {
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        before = HTTP.options(allowed + CHAT, headers=headers)
        assert before.headers["access-control-allow-origin"] == "https://page.example"
        refused = HTTP.post(allowed + CHAT, json=body(), headers=headers)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
        assert status("https://evil.example", allowed) == 403


def test_two_hundred_at_once_each_get_the_answer_to_their_picture() -> None:
    engine = FakeEngine(say=echo, pause=0.001)
    limits = httpx.Limits(max_connections=200)
    answers: dict[int, str] = {}
    with (
        running(make_desk(engine)) as url,
        httpx.Client(limits=limits, timeout=60) as client,
    ):

        def ask(i: int) -> None:
            parts = [image_part(png(i)), {"type": "text", "text": f"Picture {i}?"}]
            response = client.post(url + CHAT, json=body(parts, stream=False))  # type: ignore[arg-type]
            answers[i] = response.json()["choices"][0]["message"]["content"]

        in_threads(ask, 200)
    assert len({seen(png(i)) for i in range(200)}) == 200
    assert answers == {i: f"Question: Picture {i}? Answer:|{seen(png(i))}" for i in range(200)}


def in_threads(ask: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_metrics_are_prometheus_text_and_count(url: str) -> None:
    works(url)
    HTTP.post(url + CHAT, json={})
    HTTP.get(url + "/nothing/here")
    response = HTTP.get(url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in response.text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    chat = 'cogvlm_requests_total{method="POST",route="/v1/chat/completions",status="%d"}'
    assert values[chat % 200] >= 1
    assert values[chat % 400] >= 1
    assert values['cogvlm_requests_total{method="GET",route="other",status="404"}'] >= 1
    assert values["cogvlm_time_to_first_token_seconds_count"] >= 1
    assert values["cogvlm_answer_tokens_per_second_count"] >= 1
    buckets = [v for n, v in values.items() if n.startswith("cogvlm_answer_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == values["cogvlm_answer_seconds_count"]
    assert values["cogvlm_queue_length"] == 1
    assert values["cogvlm_batch_size"] == 2.5
    assert values["cogvlm_image_cache_hits_total"] == 9
    assert values["cogvlm_requests_in_flight"] == 0
