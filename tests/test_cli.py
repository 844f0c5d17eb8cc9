"""The command line: output, exit codes, one-line errors. The model is a toy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from typer.testing import CliRunner, Result

import cogvlm.load
from cogvlm import __version__, doctor
from cogvlm.cli import app
from cogvlm.errors import CheckpointError, ConfigError
from cogvlm.processor import Processor, load_image
from engine.toys import scripted


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a scripted toy in the place of every model; says how it was asked for."""
    seen: dict[str, Any] = {}

    def load(name: str, dtype: str, device: str, tokenizer: str | None, allow_pickle: bool) -> Any:
        seen.update(name=name, dtype=dtype, device=device)
        if allow_pickle:
            seen.update(allow_pickle=True)
        if tokenizer is not None:
            seen.update(tokenizer=tokenizer)
        return replace(scripted("It says: 你好.", "Second row."), name=name)

    monkeypatch.setattr(cogvlm.load, "load", load)
    return seen


def cogvlm_(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    PILImage.new("RGB", (40, 30), "white").save(path)
    return path


def test_version_and_help() -> None:
    assert cogvlm_("--version").stdout == f"cogvlm {__version__}\n"
    for command in ("ask", "run", "train", "doctor"):
        assert cogvlm_(command, "--help").exit_code == 0
        assert f" {command} " in cogvlm_("--help").stdout


def test_read_writes_out_pictures(
    asked: dict[str, Any], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = cogvlm_("read", picture)  # a model without a head for that
    assert refused.exit_code == 2 and "no head that reads" in refused.stderr
    missing = cogvlm_("read", picture, tmp_path / "none.png")
    assert missing.exit_code == 2 and "none.png: no such picture" in missing.stderr
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")

    def transcribe(self: Processor, source: Path) -> str:
        load_image(source)
        return "Milk\t1.20"

    monkeypatch.setattr(Processor, "transcribe", transcribe)
    assert cogvlm_("read", picture).stdout == "Milk\t1.20\n"
    assert json.loads(cogvlm_("read", picture, "--json").stdout)["text"] == "Milk\t1.20"
    some = cogvlm_("read", picture, broken, picture, "--device", "cpu")
    assert some.exit_code == 1 and some.stdout.count("Milk") == 2
    assert "broken.png" in some.stderr and "1 of 3 pictures" in some.stderr


def test_ask_prints_the_answer_and_nothing_else(asked: dict[str, Any], picture: Path) -> None:
    result = cogvlm_("ask", picture, picture, "What does it say?", "--precision", "bfloat16")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "It says: 你好.\n", "")
    assert asked == {"name": "nano", "dtype": "bfloat16", "device": "auto"}


def test_ask_without_a_picture(asked: dict[str, Any]) -> None:
    result = cogvlm_("ask", "--model", "owner/name", "Who are you?", "--max-new-tokens", "2")
    assert (result.exit_code, result.stdout) == (0, "It\n")
    assert asked["name"] == "owner/name"


def test_ask_as_json(asked: dict[str, Any], picture: Path) -> None:
    result = cogvlm_("ask", "--json", picture, "What does it say?", "--system", "Be brief.")
    values = json.loads(result.stdout)
    assert values.pop("seconds") >= 0
    assert values == {
        "answer": "It says: 你好.",
        "model": "nano",
        "images": [str(picture)],
        "question": "What does it say?",
        "tokens": len("It says: 你好.".encode()),
        "stop": "end",
    }
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.png", "What?"], "no.png: no such picture"),
        ([" "], "the question is empty"),
        ([__file__], "is a file; the last argument is the question"),
        (["What?", "--temperature", "-1"], "temperature=-1.0 is out of range"),
        (["What?", "--max-new-tokens", "0"], "max_new_tokens=0 is out of range"),
        ([__file__, "What?"], "test_cli.py"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    asked: dict[str, Any], arguments: list[str], said: str
) -> None:
    result = cogvlm_("ask", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_usage_errors_are_exit_2() -> None:
    assert cogvlm_("ask").exit_code == 2
    assert cogvlm_("ask", "What?", "--precision", "float12").exit_code == 2
    assert cogvlm_("no-such-command").exit_code == 2
    assert cogvlm_("run", "requests.jsonl").exit_code == 2


def test_other_errors_are_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise CheckpointError("model.safetensors: cut short;\nfetch it again")

    monkeypatch.setattr(cogvlm.load, "load", load)
    result = cogvlm_("ask", "What?")
    assert result.exit_code == 1
    assert result.stderr == "error: model.safetensors: cut short; fetch it again\n"


def test_ctrl_c_is_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cogvlm.load, "load", load)
    result = cogvlm_("ask", "What?")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


INTERRUPTED = """
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
sys.argv = ["cogvlm", "ask", "What?", "--max-new-tokens", "400", "--no-repetition-stop"]
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGINT to a process is POSIX")
def test_a_real_ctrl_c_stops_an_answer() -> None:
    code = INTERRUPTED.format(path=[p for p in sys.path if p])
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.read(1) == b"!"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=30)
    assert (child.returncode, error) == (130, b"stopped\n")


def test_run_answers_a_file(asked: dict[str, Any], picture: Path, tmp_path: Path) -> None:
    requests = tmp_path / "r.jsonl"
    lines = [
        {"id": 1, "image": picture.name, "question": "What?"},
        {"id": 2, "image": "none.png", "question": "What?"},
        {"id": 3, "question": "What?"},
    ]
    requests.write_text("\n".join(map(json.dumps, lines)))
    result = cogvlm_("run", requests, "-o", tmp_path / "a.jsonl", "--batch-size", 4, "--json")
    summary = json.loads(result.stdout)
    assert result.exit_code == 0 and summary.pop("seconds") > 0
    assert summary == {"requests": 3, "answered": 2, "failed": 1, "skipped": 0}
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [a.get("prediction") for a in answers] == ["It says: 你好.", None, "Second row."]
    again = cogvlm_("run", requests, "-o", tmp_path / "a.jsonl")
    assert "0 answered, 0 failed, 3 there before, of 3" in again.stderr
    assert again.stdout == ""


def test_run_names_what_is_missing(asked: dict[str, Any], tmp_path: Path) -> None:
    result = cogvlm_("run", tmp_path / "none.jsonl", "-o", tmp_path / "a.jsonl")
    assert result.exit_code == 2 and "none.jsonl: no such file" in result.stderr
    assert asked == {}


def test_train_hands_over_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvlm.train import run as training

    calls: list[tuple[Any, ...]] = []

    def run(*arguments: Any) -> Path:
        calls.append(arguments)
        return tmp_path / "out"

    monkeypatch.setattr(training, "run", run)
    file = tmp_path / "r.yaml"
    file.write_text("stage: read\n")
    result = cogvlm_("train", file, "--set", "seed=3", "--set", "data.workers=2", "--fresh")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n")
    cogvlm_("train", file, "--out", tmp_path)
    assert calls == [
        (file, ["seed=3", "data.workers=2"], None, False),
        (file, [], tmp_path, True),
    ]
    result = cogvlm_("train", tmp_path / "none.yaml")
    assert result.exit_code == 2 and "no such recipe" in result.stderr

    def refuse(*_: Any) -> None:
        raise ConfigError("r.yaml: unknown key 'sed'; did you mean 'seed'?")

    monkeypatch.setattr(training, "run", refuse)
    assert cogvlm_("train", file).exit_code == 2


def test_doctor_says_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGVLM_CACHE", str(tmp_path / "cache"))
    found = json.loads(cogvlm_("doctor", "--json").stdout)
    assert found["versions"]["cogvlm"] == __version__
    assert "missing" not in found["versions"].values()
    assert found["devices"][-1]["kind"] == "cpu"
    assert 0.5 < found["devices"][-1]["memory_gb"] < 10_000
    assert found["cache"] == str(tmp_path / "cache")
    assert found["language_model"] is None
    text = cogvlm_("doctor").stdout
    assert all(word in text for word in ("torch", "cpu", "CogVLM2 19B", str(tmp_path), "93 MB"))
    monkeypatch.setenv("COGVLM_LANGUAGE_MODEL", str(tmp_path / "my.gguf"))
    assert str(tmp_path / "my.gguf") in cogvlm_("doctor").stdout


@pytest.mark.parametrize(
    ("devices", "where"),
    [
        ([doctor.Device("cpu", "cpu", 0.1)], [None, None]),
        ([doctor.Device("cpu", "cpu", None)], [None, None]),
        ([doctor.Device("cpu", "cpu", 99.0)], ["float32 cpu", "float32 cpu"]),
        # What is free counts, not what there is.
        ([doctor.Device("cpu", "cpu", 99.0, free_gb=20.0)], ["float32 cpu", "int4 cpu"]),
        ([doctor.Device("mps", "mps", 16.0)], ["bfloat16 mps", None]),
        (
            [doctor.Device("cuda:0", "cuda", 24.0), doctor.Device("cpu", "cpu", 64.0)],
            ["bfloat16 cuda:0", "int8 cuda:0"],
        ),
        (
            [doctor.Device("cuda:0", "cuda", 8.0), doctor.Device("cpu", "cpu", 64.0)],
            ["bfloat16 cuda:0", "bfloat16 cpu"],
        ),
    ],
)
def test_doctor_says_what_would_run(devices: list[doctor.Device], where: list[str | None]) -> None:
    found = [
        f"{fit.precision} {fit.device}" if fit.device else None for fit in doctor.fits(devices)
    ]
    assert found == where
