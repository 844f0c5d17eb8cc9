"""A conversation: what is typed, kept and asked; through a pipe and in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from typer.testing import CliRunner, Result

import cogvlm.load
from answering import Echo, answer, serving, status
from cogvlm.chat import COMMANDS, Ask, Said, Session, load_messages
from cogvlm.chat.pictures import fetch, leading_pictures, typed_path
from cogvlm.cli import app
from cogvlm.errors import CogVLMError, DownloadError, ImageError, InputError
from engine.toys import scripted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "it's a photo.png"
    PILImage.new("RGB", (40, 30), "white").save(path)
    return path


def say(session: Session, line: str) -> str:
    taken = session.take(line)
    if isinstance(taken, Said):
        return taken.text
    text = f"answer to {taken.messages[-1].text}"
    session.answered(text)
    return text


# --- what is typed ---


def test_paths_in_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a b.png"
    path.touch()
    quoted = str(path).replace(" ", "%20")
    spellings = [str(path), f"'{path}'", f'"{path}" ', str(path).replace(" ", "\\ ")]
    spellings += [f"file://{quoted}", f"'file://{quoted}'", f"  {path}  "]
    assert {typed_path(spelling) for spelling in spellings} == {path}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed_path("~/a b.png") == path
    assert typed_path("~nobody_at_all/x.png").name == "x.png"
    for spelling in spellings:
        assert leading_pictures(spelling) == ([path], "")
    assert leading_pictures(f"'{path}' '{path}' What's this?") == ([path, path], "What's this?")
    for text in (
        "'tis nothing",
        "What's 1/2?",
        "/none/such.png what?",
        "~5 apples",
        '"',
        "x" * 9999,
    ):
        assert leading_pictures(text) == ([], text)


def test_a_path_alone_is_a_picture_and_before_a_question_too(photo: Path) -> None:
    session = Session()
    assert session.take(f'"{photo}"') == Said(f"added {photo}")
    asked = session.take(f'"{photo}" What is it?')
    assert isinstance(asked, Ask)
    assert (len(asked.messages[-1].images), asked.messages[-1].text) == (2, "What is it?")


def test_questions_and_answers_make_the_history(photo: Path) -> None:
    session = Session(system_text="Be brief.")
    session.add(str(photo))
    say(session, "One?")
    say(session, "Two?")
    assert [m.role for m in session.messages] == ["system", *["user", "assistant"] * 2]
    assert [len(m.images) for m in session.messages] == [0, 1, 0, 0, 0]
    assert say(session, "/images") == f"asked   {photo}"
    assert say(session, "/undo") == "took back: Two?"
    asked = session.take("/retry")
    assert isinstance(asked, Ask) and asked.messages[-1].text == "One?"
    session.answered("")  # stopped before a word: the old answer stays
    assert session.messages[-1].text == "answer to One?"
    assert say(session, "/system Be long.") == "noted"
    assert session.messages[0].text == "Be long."
    say(session, "/system")
    say(session, "/reset")
    assert session.messages == () and "no picture" in say(session, "/images")


def test_a_question_without_an_answer_leaves_no_trace(photo: Path) -> None:
    session = Session()
    session.add(str(photo))
    assert isinstance(session.take("Why?"), Ask)
    session.answered(" ")
    assert session.messages == () and say(session, "/images") == f"next    {photo}"
    assert say(session, "/undo") == f"took back {photo}"


def test_settings_are_set_by_name() -> None:
    session = Session()
    assert say(session, "/set temperature 0.5") == "temperature 0.5"
    assert say(session, "/set seed=7") == "seed 7" and say(session, "/set seed none") == "seed none"
    assert say(session, "/set repetition_stop off") == "repetition_stop off"
    assert (session.settings.temperature, session.settings.repetition_stop) == (0.5, False)
    assert "temperature 0.5\n" in say(session, "/set")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set heat 1", "no setting 'heat'; there are: max_new_tokens"),
        ("/set temperature warm", "'warm' is no number"),
        ("/set temperature", "'' is no number"),
        ("/set temperature -1", "out of range"),
        ("/set temperature on", "not a number"),
        ("/imge x", "/imge: no such command or file; did you mean /image"),
        ("/nothing", "/help lists them"),
        ("/undo now", "/undo takes nothing behind it, got 'now'"),
        ("/undo", "nothing was asked yet"),
        ("/retry", "nothing was asked yet"),
        ("/save x.md", "nothing was asked yet"),
        ("/save", "which file?"),
        ("/load none.jsonl", "cannot be read"),
        ("/image", "which picture?"),
        ("/image none.png", "does not exist"),
        ("/image http://", "only http and https"),
    ],
)
def test_what_cannot_be_done_changes_nothing(line: str, said: str) -> None:
    session = Session()
    with pytest.raises(CogVLMError) as caught:
        session.take(line)
    assert said in str(caught.value)
    assert session.messages == () and "no picture" in say(session, "/images")


def test_every_command_is_in_the_help() -> None:
    text = say(Session(), "/help")
    assert all(command in text for command in COMMANDS)
    assert Session().take("/quit") == Said(end=True)
    assert Session().take("  ") == Said()


# --- what is kept ---


def test_a_conversation_is_saved_and_loaded(photo: Path, tmp_path: Path) -> None:
    session = Session(system_text="Brief.")
    session.add(str(photo))
    say(session, "What is 文?")
    file = tmp_path / "a talk.jsonl"
    assert say(session, f"/save '{file}'") == f"saved as {file}"
    other = Session()
    other.add(str(photo))
    assert say(other, f"/load {file}") == "loaded 1 questions with their answers"
    assert [m.text for m in other.messages] == [m.text for m in session.messages]
    assert [Path(str(i.source)) for i in other.messages[1].images] == [photo]
    assert "next" not in say(other, "/images")
    assert say(session, f"/save {tmp_path / 'talk.md'}")
    text = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert f"![{photo}](<{photo}>)\n\nWhat is 文?" in text and "## assistant" in text
    with pytest.raises(InputError, match="end the name in"):
        session.take("/save talk.docx")
    with pytest.raises(InputError, match="for reading"):
        session.take(f"/load {tmp_path / 'talk.md'}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no message"),
        ("{bad", "talk.jsonl:1: not JSON"),
        ('{"role": "user", "content": 3}', "talk.jsonl:1: message 1: content is a int"),
        ('{"role": "user", "content": "a"}', "not in turn"),
        ('{"role": "assistant", "content": "a"}\n{"role": "user", "content": "a"}', "not in turn"),
    ],
)
def test_files_that_hold_no_conversation(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "talk.jsonl").write_text(text)
    session = Session()
    say(session, "Here?")
    with pytest.raises(InputError, match=said):
        session.take(f"/load {tmp_path / 'talk.jsonl'}")
    assert len(session.messages) == 2


# --- addresses ---


def test_a_picture_is_fetched_checked_and_saved_with_the_talk(photo: Path, tmp_path: Path) -> None:
    data = photo.read_bytes()
    with serving() as server:
        base = server.url.removesuffix("/v1")
        bodies = {
            "/a.png": (200, data),
            "/page": (200, b"<html>"),
            "/away": (302, b""),
            "/file": (302, b""),
            "/none": (404, b""),
        }
        places = {"/away": f"{base}/a.png", "/file": f"file://{photo}"}

        def get(handler: Any) -> None:
            code, body = bodies[handler.path]
            more = {"Location": places[handler.path]} if handler.path in places else {}
            handler.reply(code, body, **more)

        server.RequestHandlerClass = type("Get", (server.RequestHandlerClass,), {"do_GET": get})
        assert fetch(f"{base}/a.png") == fetch(f"{base}/away") == data
        for path, said in [("/page", "no picture came"), ("/file", "says 302"), ("/none", "404")]:
            with pytest.raises(DownloadError, match=said):
                fetch(base + path)
        session = Session()
        session.take(f"/image {base}/a.png")
        say(session, "What?")
        say(session, f"/save {tmp_path / 't.jsonl'}")
    assert load_messages(tmp_path / "t.jsonl")[0].images[0].source == data
    with pytest.raises(DownloadError, match="cannot be fetched"):
        fetch(f"{base}/a.png")  # nobody listens there any more
    with pytest.raises(DownloadError, match="only http"):
        fetch("ftp://host/a.png")


def test_too_much_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvlm.chat.pictures.MAX_BYTES", 10)
    with serving() as server, pytest.raises(DownloadError, match="over 0 MB"):
        fetch(f"{server.url}/models")


# --- the command ---


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGVLM_BASE_URL", raising=False)
    monkeypatch.setattr(cogvlm.load, "load", lambda *a, **k: scripted("It says: 你好."))


def chat(lines: str, *arguments: Any) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=lines)


def test_a_pipe_gets_answers_alone(photo: Path) -> None:
    result = chat("/images\nWhat does\\\nit say?\n\n/help\n/quit\nNever asked\n", photo)
    assert (result.exit_code, result.stdout) == (0, "It says: 你好.\n")
    assert f"next    {photo}" in result.stderr and "> " not in result.stderr


def test_a_pipe_goes_on_after_errors_and_says_so_at_the_end(photo: Path) -> None:
    result = chat("/image none.png\n/bad\n/set max_new_tokens 2\nWhat?")
    assert result.exit_code == 1
    assert result.stdout == "It\n"
    assert result.stderr.count("error: ") == 2 and "cut off" in result.stderr
    assert chat("", "none.png").exit_code == 2


def test_a_server_is_talked_to_and_its_faults_survived(photo: Path, tmp_path: Path) -> None:
    with serving(answer, status(400), answer) as server:
        file = tmp_path / "t.jsonl"
        lines = f"One?\nTwo?\nThree?\n/save {file}\n"
        result = chat(lines, photo, "--base-url", server.url, "--system", "Brief.")
        last = server.seen[-1][2]["messages"]
    assert result.stdout == "One? (1 pictures)\nThree? (0 pictures)\n"
    assert "error: 127.0.0.1" in result.stderr and result.exit_code == 1
    assert [m["role"] for m in last] == ["system", "user", "assistant", "user"]
    assert [json.loads(line)["role"] for line in file.read_text().splitlines()][1:] == [
        "user",
        "assistant",
    ] * 2
    with serving() as server:
        again = chat("Four?\n", "--load", file, "--base-url", server.url)
        assert again.stdout == "Four? (0 pictures)\n" and len(server.seen[0][2]["messages"]) == 6


TERMINAL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.path[:0] = {path!r}
from cogvlm.cli import main
from cogvlm.cli.shared import quiet_libraries
quiet_libraries()  # as the command does, before what is noisy is imported
import cogvlm.load
from engine.toys import scripted
text = "".join(chr(33 + i * i % 90) for i in range(400))
cogvlm.load.load = lambda *a, **k: scripted(text, pause=0.02)
sys.argv = ["cogvlm", "chat", "--max-new-tokens", "400", "--no-repetition-stop"]
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
def test_ctrl_c_stops_the_answer_and_ctrl_d_the_talk(tmp_path: Path) -> None:
    import pty

    here, there = pty.openpty()
    code = TERMINAL.format(path=[p for p in sys.path if p])
    # setsid and the controlling terminal, so that the sign for Ctrl-C becomes the signal.
    starter = "import os,sys,fcntl,termios;os.setsid();fcntl.ioctl(0,termios.TIOCSCTTY,0);" + (
        "os.execv(sys.executable,[sys.executable,'-c',sys.argv[1]])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", starter, code],
        stdin=there,
        stdout=there,
        stderr=there,
        env={**os.environ, "COGVLM_CACHE": str(tmp_path), "TERM": "dumb"},
    )
    os.close(there)
    seen = b""

    def until(mark: bytes, again: bytes = b"") -> None:
        nonlocal seen
        deadline = time.monotonic() + 240
        while mark not in seen:
            assert time.monotonic() < deadline, seen
            if not select.select([here], [], [], 5)[0]:
                os.write(here, again)
                continue
            try:
                seen += os.read(here, 4096)
            except OSError as error:
                raise AssertionError(seen.decode(errors="replace")) from error

    try:
        until(b"Ctrl-D ends")
        seen = seen.split(b"Ctrl-D ends")[1]
        until(b"> ")
        seen = b""
        # At the prompt: nothing but a new one. Python's input() misses the signal where it comes
        # between the prompt and the wait for a key; a person presses again.
        os.write(here, b"\x03")
        until(b"> ", again=b"\x03")
        os.write(here, b"What?\n")
        until(b'!"%*1')
        os.write(here, b"\x03")
        until(b"(stopped)")
        seen = b""
        os.write(here, b"/images\n")
        until(b"no picture yet")
        seen = seen.split(b"no picture yet")[1]
        until(b"> ")
        # Missed, as above, where it comes before the wait for a key; a person presses again.
        for _ in range(12):
            os.write(here, b"\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
                break
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(here)
    assert (tmp_path / "chat_history").stat().st_mode & 0o077 == 0
    assert "What?" in (tmp_path / "chat_history").read_text()


def test_a_conversation_of_an_echo_is_streamed_in_full() -> None:
    backend, session = Echo(), Session()
    asked = session.take("Hello?")
    assert isinstance(asked, Ask)
    session.answered("".join(backend.stream(asked.messages, session.settings)))
    assert session.messages[-1].text == "Hello?"
    with pytest.raises(ImageError):
        session.add(__file__)
