"""A server in place of a model: what is sent, what comes back, and what may go wrong."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner, Result

from answering import Act, Server, answer, serving, status, stream
from cogvlm.cli import app
from cogvlm.engine import run_file
from cogvlm.errors import (
    CogVLMError,
    ConfigError,
    ImageError,
    InputError,
    MessageError,
    RemoteError,
)
from cogvlm.processor import Image, Video, assistant, system, user
from cogvlm.remote import Endpoint, RemoteBackend
from cogvlm.remote.wire import Waits, data_url, retry_after
from cogvlm.settings import GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=9)


@pytest.fixture(autouse=True)
def _no_real_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("COGVLM_BASE_URL", raising=False)


@contextmanager
def asking(server: Server, **more: Any) -> Iterator[RemoteBackend]:
    with closing(RemoteBackend(Endpoint(server.url, **more))) as backend:
        backend._waits = Waits(backend.endpoint.tries, unit=0.01)
        yield backend


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a photo.jpg"
    PILImage.effect_noise((300, 200), 50).convert("RGB").save(path)
    return path


def one(backend: RemoteBackend, question: str = "What?") -> Any:
    (outcome,) = backend.answer_batch([backend.prepare([user(question)])], SETTINGS)
    return outcome


def test_a_stream_comes_in_pieces(photo: Path) -> None:
    with serving() as server, asking(server, key="secret") as backend:
        messages = [system("Brief."), user(photo, "One?"), assistant("Yes."), user("Two?")]
        pieces = backend.stream(messages, SETTINGS)
        with pytest.raises(InputError, match="not at its end"):
            _ = pieces.reply
        assert list(pieces) == ["Two", "? (", "0 pictures)"]
        assert (pieces.reply.text, pieces.reply.tokens) == ("Two? (0 pictures)", 7)
        path, headers, body = server.seen[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    assert url == data_url(Image(photo), 0)
    assert {k: v for k, v in body.items() if k != "messages"} == {
        "model": "big",
        "stream": True,
        "temperature": 0.0,
        "max_tokens": 9,
    }


def test_a_batch_is_asked_at_once_and_answered_in_order(photo: Path) -> None:
    together = threading.Barrier(6, timeout=30)

    def wait(handler: Any, body: dict[str, Any]) -> None:
        together.wait()  # six requests are under way, or the test fails
        answer(handler, body)

    with serving(wait) as server, asking(server, model="m") as backend:
        prepared = [backend.prepare([user(photo, f"Q{i}")]) for i in range(6)]
        replies = backend.answer_batch(prepared, GenerationSettings(5, 0.5, 0.9, 7, 3))
        assert [r.text for r in replies] == [f"Q{i} (1 pictures)" for i in range(6)]  # type: ignore[union-attr]
        body = server.seen[0][2]
    assert {k: body[k] for k in ("model", "temperature", "top_p", "top_k", "seed")} == {
        "model": "m",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": 3,
    }


@pytest.mark.parametrize("code", [429, 500, 503])
def test_passing_faults_are_tried_again(code: int) -> None:
    with serving(status(code), status(code), answer) as server, asking(server) as backend:
        assert one(backend).text == "What? (0 pictures)"
        assert len(server.seen) == 3


def test_a_server_may_say_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("cogvlm.remote.wire.time.sleep", slept.append)
    with serving(status(429, Retry_After="7"), answer) as server, asking(server) as backend:
        assert one(backend).text
    assert slept == [7.0]
    with serving(status(429, Retry_After="9999")) as server, asking(server) as backend:
        assert "too many requests" in str(one(backend))
        assert len(server.seen) == 1
    soon = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert 20 < (retry_after(format_datetime(soon)) or 0) <= 30
    assert [retry_after(v) for v in ("-1", "", "soon", "nan")][:3] == [None, None, None]


HTML = b"<html><body>Hello</body></html>"


@pytest.mark.parametrize(
    ("act", "said", "stops"),
    [
        (
            status(401),
            "wants a key (401: reason 401); put it into the variable OPENAI_API_KEY",
            True,
        ),
        (status(404), "does not have what was asked for (404: reason 404)", True),
        (status(404, HTML), "(404); check the base URL", True),
        (status(429), "too many requests (429: reason 429)", True),
        (status(400), "refused (400: reason 400)", False),
        (status(413, {"detail": "large"}), "refused (413: large)", False),
        (status(500, {"error": "a\x1b[31m\nb"}), "failed (500: a[31m b)", False),
        (status(502, HTML), "failed (502)", True),
        (status(302, b"", Location="http://other/v1"), "points to http://other/v1 (302)", True),
        (status(200, HTML), "not as a chat completions server does (it said '<html>", True),
        (status(200, b""), "not as a chat completions server", True),
        (status(200, [1]), "not as a chat completions server", True),
        (status(200, {"choices": []}), "not as a chat completions server", True),
        (status(200, {"choices": [{"message": {"content": 3}}]}), "not as a chat", True),
        (status(200, {"error": {"message": "no"}}), "failed (no)", False),
    ],
)
def test_refusals_are_one_line_with_a_remedy(act: Act, said: str, stops: bool) -> None:
    with serving(act) as server, asking(server, tries=2) as backend:
        error = one(backend)
    assert isinstance(error, RemoteError) and said in str(error)
    assert error.stops is stops and "\n" not in str(error)


def test_the_key_is_never_shown() -> None:
    act = status(401, {"error": {"message": "bad key sk-123 given"}})
    with serving(act) as server, asking(server, key="sk-123", key_name="MY_KEY") as backend:
        error = str(one(backend))
        assert "sk-123" not in repr(backend.endpoint)
    assert "refuses the key of MY_KEY (401: bad key *** given)" in error


def test_who_does_not_answer_is_told_at_once_or_after_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with (  # tries with pauses would take seconds
        closing(RemoteBackend(Endpoint(url))) as backend,
        pytest.raises(RemoteError, match=r"127.0.0.1:\d+ cannot be reached .*check the base"),
    ):
        _ = backend.name

    gate = threading.Event()
    with serving(lambda handler, body: gate.wait(60) and None) as server:
        with asking(server, timeout=0.2, tries=2, model="m") as backend:
            backend._met = True
            assert "did not answer in time (ReadTimeout)" in str(one(backend))
        assert len(server.seen) == 2
        gate.set()


def cut(handler: Any, body: dict[str, Any]) -> None:
    stream(handler, {"choices": [{"delta": {"content": "Half"}}]})


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (cut, "ended inside the answer"),
        (lambda h, b: stream(h, "{not json"), "not as a chat completions server"),
        (lambda h, b: stream(h, {"error": {"message": "overloaded"}}), "failed (overloaded)"),
        (lambda h, b: stream(h), "ended inside the answer"),
        (status(200, HTML), "not as a chat completions server"),
        (status(401), "wants a key"),
    ],
)
def test_a_broken_stream_is_an_error(act: Act, said: str) -> None:
    with (
        serving(act) as server,
        asking(server, tries=1) as backend,
        pytest.raises(RemoteError) as caught,
    ):
        list(backend.stream([user("What?")], SETTINGS))
    assert said in str(caught.value)


def test_a_server_that_does_not_stream_is_read_whole() -> None:
    body = {"choices": [{"message": {"content": "All."}, "finish_reason": "length"}]}
    with serving(status(200, body)) as server, asking(server) as backend:
        pieces = backend.stream([user("What?")], SETTINGS)
        assert (list(pieces), pieces.reply.stop) == (["All."], "length")


def test_leaving_a_stream_closes_the_connection() -> None:
    gone = threading.Event()

    def endless(handler: Any, body: dict[str, Any]) -> None:
        try:
            while True:
                stream(handler, *[{"choices": [{"delta": {"content": "x" * 1000}}]}] * 100)
        except OSError:
            gone.set()

    with serving(endless) as server, asking(server) as backend:
        pieces = backend.stream([user("What?")], SETTINGS)
        assert next(pieces)
        pieces.close()
        assert gone.wait(30)


def test_the_newer_name_of_the_limit_is_found() -> None:
    act = status(400, {"error": {"message": "use max_completion_tokens instead"}})
    with serving(act, answer) as server, asking(server) as backend:
        assert one(backend).text
        assert one(backend).text
        bodies = [body for _, _, body in server.seen]
    assert ["max_tokens" in body for body in bodies] == [True, False, False]
    assert [body.get("max_completion_tokens") for body in bodies] == [None, 9, 9]
    with serving(act) as server, asking(server, tries=3) as backend:
        assert "max_completion_tokens" in str(one(backend))


def test_the_only_model_is_taken() -> None:
    for models, said in [((), "names no model"), (("a", "b"), "has a, b; say which")]:
        with (
            serving(models=models) as server,
            asking(server) as backend,
            pytest.raises(RemoteError, match=said),
        ):
            _ = backend.name


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host/v1",
        "ftp://host",
        "http://",
        "http://me:pw@host/v1",
        "http://h/v1?key=1",
        "http://h:x",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(url)
    assert "pw" not in str(caught.value)


def test_an_address_is_cut_to_its_base_and_says_where_pictures_go() -> None:
    endpoint = Endpoint("https://api.example.com:8443/v1/chat/completions/")
    assert endpoint.url == "https://api.example.com:8443/v1"
    assert (endpoint.host, endpoint.encrypted) == ("api.example.com:8443", True)
    with pytest.raises(ConfigError, match="line break"):
        Endpoint("https://h/v1", key="a\nb")


# --- pictures ---


def sent(image: Image, max_side: int = 100) -> tuple[str, PILImage.Image]:
    head, _, data = data_url(image, max_side).partition(",")
    return head, PILImage.open(io.BytesIO(base64.b64decode(data)))


GPS = PILImage.Exif()
GPS[0x8825] = {1: "N", 2: (31.0, 14.0, 3.0)}
GPS[0x0110] = "SECRET camera"


def test_only_pixels_leave(photo: Path, tmp_path: Path) -> None:
    pixels = PILImage.open(io.BytesIO(photo.read_bytes())).convert("RGB")
    written: list[tuple[str, dict[str, Any]]] = [
        ("a.jpg", {"comment": b"SECRET", "quality": 60}),
        ("b.jpg", {"quality": 90, "subsampling": 0, "progressive": True}),
        ("c.png", {}),
        ("d.webp", {"xmp": b"<x>SECRET</x>", "quality": 80}),
    ]
    for name, options in written:
        path = tmp_path / name
        text = PngInfo()
        text.add_text("Author", "SECRET")
        more = {"pnginfo": text} if name == "c.png" else {}
        pixels.save(path, exif=GPS, icc_profile=b"SECRET profile", **options, **more)
        stored = path.read_bytes() + b"SECRET tail"
        path.write_bytes(stored)
        data = base64.b64decode(data_url(Image(path), 0).partition(",")[2])
        assert b"SECRET" not in data
        image: Any = PILImage.open(io.BytesIO(data))
        assert not image.getexif()
        assert not {"exif", "xmp", "icc_profile", "comment", "Author"} & set(image.info)
        # Rounding, where the format is lossy, of noise with a standard deviation of 50.
        before = np.asarray(PILImage.open(io.BytesIO(stored)).convert("RGB"), dtype=float)
        after = np.asarray(image, dtype=float)
        assert np.abs(after - before).mean() <= (0.0 if name == "c.png" else 2.0)
        if name.endswith(".jpg"):
            assert image.quantization == PILImage.open(io.BytesIO(stored)).quantization


def test_pictures_are_scaled_turned_and_of_a_common_format(photo: Path, tmp_path: Path) -> None:
    head, image = sent(Image(photo), 300)
    assert (head, image.size) == ("data:image/jpeg;base64", (300, 200))
    assert sent(Image(photo.read_bytes()), 0)[1].size == (300, 200)
    head, image = sent(Image(photo), 150)
    assert (head, image.size) == ("data:image/jpeg;base64", (150, 100))
    for name in ("a.bmp", "a.tiff", "a.gif"):
        PILImage.new("RGB", (20, 10), "red").save(tmp_path / name)
        head, image = sent(Image(tmp_path / name))
        assert (head, image.convert("RGB").getpixel((3, 3))) == (
            "data:image/png;base64",
            (255, 0, 0),
        )
    frames = [PILImage.new("RGB", (20, 10), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    assert getattr(sent(Image(tmp_path / "moving.webp"))[1], "n_frames", 1) == 1
    turned = PILImage.Exif()
    turned[0x0112] = 6
    PILImage.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=turned)
    assert sent(Image(tmp_path / "turned.jpg"))[1].size == (20, 40)
    assert sent(Image(PILImage.new("RGB", (40, 20))))[1].size == (40, 20)
    with photo.open("rb") as file:
        assert sent(Image(file), 300)[1].size == (300, 200)


def test_what_is_no_picture_does_not_leave(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_text("password")
    with serving() as server, asking(server, model="m") as backend:
        with pytest.raises(ImageError, match="not a picture"):
            backend.prepare([user(tmp_path / "secret.png", "What?")])
        with pytest.raises(MessageError, match="a video is not sent to a server"):
            backend.stream([user(Video(tmp_path / "clip.mp4"), "What?")], SETTINGS)
        assert server.seen == []


# --- commands ---


def cogvlm_(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_ask_goes_to_the_server(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        result = cogvlm_("ask", "--base-url", server.url, photo, "What?")
        host = server.url[7:-3]
        assert (result.exit_code, result.stdout) == (0, "What? (1 pictures)\n")
        assert result.stderr == f"pictures go to {host}\n"
        monkeypatch.setenv("COGVLM_BASE_URL", server.url)
        monkeypatch.setenv("MY_KEY", "k1")
        told = cogvlm_("ask", "--json", "What?", "--api-key-env", "MY_KEY", "-m", "chosen")
        values = json.loads(told.stdout)
        assert (values["model"], values["tokens"], values["stop"]) == ("chosen", 7, "end")
        assert server.seen[-1][1]["Authorization"] == "Bearer k1"
        clip = photo.with_suffix(".mp4")
        clip.write_bytes(b"x")
        refused = cogvlm_("ask", clip, "What?")
        assert refused.exit_code == 2 and "a video is not sent" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base-url", "http://h/v1", "--device", "cpu"], "--device is for local models"),
        (["--base-url", "http://h/v1", "--precision", "int8"], "--precision is for local"),
        (["--base-url", "h/v1"], "base URL 'h/v1' is not usable"),
        (["--max-side", "100"], "--max-side is for a server"),
        (["--base-url", "http://h/v1", "--api-key-env", "NONE_SUCH"], "NONE_SUCH is not set"),
    ],
)
def test_options_of_the_other_kind_are_refused(arguments: list[str], said: str) -> None:
    result = cogvlm_("ask", "What?", *arguments)
    assert result.exit_code == 2 and said in result.stderr


def test_run_stops_at_what_every_request_meets_and_goes_on_later(
    photo: Path, tmp_path: Path
) -> None:
    requests, answers = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    lines = [{"id": i, "image": photo.name, "question": f"Q{i}"} for i in range(6)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving(answer, status(400), answer, status(401)) as server:
        result = cogvlm_(
            "run", requests, "-o", answers, "--base-url", server.url, "--batch-size", 1
        )
        assert result.exit_code == 1 and "wants a key" in result.stderr
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [("prediction" in a, a["id"]) for a in found] == [(True, 0), (False, 1), (True, 2)]
    with serving() as server, asking(server) as backend:
        summary = run_file(requests, answers, backend)
    assert (summary.answered, summary.skipped) == (3, 3)
    with (
        serving(status(403)) as server,
        asking(server) as backend,
        pytest.raises(CogVLMError, match="wants a key"),
    ):
        run_file(requests, tmp_path / "b.jsonl", backend)
    assert (tmp_path / "b.jsonl").read_text() == ""
