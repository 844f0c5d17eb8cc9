"""A file of requests: answers, errors, resuming, and what a kill may not do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image as PILImage

import cogvlm.engine.local as local_module
from cogvlm.engine import GenerationSettings, complete, generate, run_file
from cogvlm.errors import InputError, ResourceError
from cogvlm.processor import user
from engine.toys import scripted, toy_loaded

SHORT = GenerationSettings(max_new_tokens=6)


def write(path: Path, *lines: Any) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pictures(folder: Path, count: int) -> list[str]:
    (folder / "pictures").mkdir(exist_ok=True)
    names = [f"pictures/{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        PILImage.new("RGB", (30 + i, 20), (40 * i % 255, 90, 7 * i % 255)).save(folder / name)
    return names


def test_every_request_gets_the_answer_that_it_gets_alone(tmp_path: Path) -> None:
    loaded = toy_loaded()
    one, two, three = pictures(tmp_path, 3)
    requests = write(
        tmp_path / "requests.jsonl",
        {"id": 1, "image": one, "question": "What is this?"},
        "",
        {"id": "1", "images": [two, three], "question": "Which is brighter?"},
        {"id": "文", "question": "No picture"},
        {"id": 4, "images": [], "question": "None either"},
        {"id": 5, "image": str(tmp_path / two), "question": "By its full path?"},
    )
    seen: list[tuple[int, int]] = []
    summary = run_file(
        requests, tmp_path / "out" / "a.jsonl", loaded, SHORT, 2, lambda *at: seen.append(at)
    )
    answers = read(tmp_path / "out" / "a.jsonl")
    assert [a["id"] for a in answers] == [1, "1", "文", 4, 5]
    assert all(set(a) == {"id", "prediction", "seconds"} for a in answers)
    assert all(a["seconds"] > 0 for a in answers)
    alone = [
        user(tmp_path / one, "What is this?"),
        user(tmp_path / two, tmp_path / three, "Which is brighter?"),
        user("No picture"),
        user("None either"),
        user(tmp_path / two, "By its full path?"),
    ]
    assert [a["prediction"] for a in answers] == [complete(loaded, [m], SHORT).text for m in alone]
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert (summary.requests, summary.answered, summary.failed, summary.skipped) == (5, 5, 0, 0)


def test_what_is_broken_is_recorded_and_the_rest_done(tmp_path: Path) -> None:
    (good,) = pictures(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes((tmp_path / good).read_bytes()[:40])
    requests = write(
        tmp_path / "r.jsonl",
        {"id": 1, "image": "missing.png", "question": "a?"},
        {"id": 2, "image": "broken.png", "question": "a?"},
        "{not json",
        '["a", "list"]',
        {"id": None, "question": "a?"},
        {"id": True, "question": "a?"},
        {"id": 3},
        {"id": 4, "question": " "},
        {"id": 5, "image": good, "images": [good], "question": "a?"},
        {"id": 6, "image": [good], "question": "a?"},
        {"id": 7, "imgae": good, "question": "a?"},
        {"id": 8, "question": "x" * 600},
        {"id": 9, "image": good, "question": "a?"},
        '{"id": "\\ud800", "question": "a?"}',
        {"id": 10, "question": "still here?"},
    )
    summary = run_file(requests, tmp_path / "a.jsonl", toy_loaded(), SHORT, 4)
    answers = read(tmp_path / "a.jsonl")
    errors = {a.get("line") or a["id"]: a["error"] for a in answers if "error" in a}
    assert [a["id"] for a in answers] == [1, 2, *[None] * 4, *range(3, 10), "\ud800", 10]
    assert [a["id"] for a in answers if "prediction" in a] == [9, "\ud800", 10]
    assert (summary.answered, summary.failed) == (3, 12)
    assert all("\n" not in error for error in errors.values())
    expected = {
        1: "missing.png",
        2: "broken.png",
        3: "'question' is null",  # id 3, and line 3 below has no id
        4: "'question' is \" \"",
        5: "both 'image' and 'images'",
        6: "'image' is one path",
        7: "unknown key 'imgae'; did you mean 'image'?",
        8: "positions, the model has 512",
    }
    by_id = {a["id"]: a["error"] for a in answers if "error" in a and a["id"] is not None}
    for name, part in expected.items():
        assert part in by_id[name]
    by_line = {a["line"]: a["error"] for a in answers if a["id"] is None}
    assert list(by_line) == [3, 4, 5, 6]
    assert "r.jsonl:3: not JSON" in by_line[3]
    assert "r.jsonl:4: list where a JSON object is expected" in by_line[4]
    assert "'id' is null" in by_line[5]
    assert "'id' is true" in by_line[6]
    again = run_file(requests, tmp_path / "a.jsonl", toy_loaded(), SHORT, 4)
    assert (again.answered, again.failed, again.skipped) == (0, 0, 15)
    assert read(tmp_path / "a.jsonl") == answers


@pytest.mark.parametrize("cut", [0, 1, 10, 45, -30, -1])
def test_a_file_cut_anywhere_is_completed_without_loss_or_repeats(tmp_path: Path, cut: int) -> None:
    loaded = toy_loaded()
    requests = write(
        tmp_path / "r.jsonl", *({"id": i, "question": f"number {i}?"} for i in range(7))
    )
    run_file(requests, tmp_path / "whole.jsonl", loaded, SHORT, 3)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
    run_file(requests, tmp_path / "cut.jsonl", loaded, SHORT, 3)
    got, want = read(tmp_path / "cut.jsonl"), read(tmp_path / "whole.jsonl")
    assert [(a["id"], a["prediction"]) for a in got] == [(a["id"], a["prediction"]) for a in want]


KILLED = """
import sys
sys.path[:0] = {path!r}
from engine.toys import scripted
from cogvlm.engine import run_file
loaded = scripted("one", "two", pause=0.02)
run_file({requests!r}, {answers!r}, loaded, batch_size=2)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_kill_9_loses_and_repeats_nothing(tmp_path: Path) -> None:
    requests = write(tmp_path / "r.jsonl", *({"id": i, "question": "?"} for i in range(400)))
    answers = tmp_path / "a.jsonl"
    path = [p for p in sys.path if p]
    code = KILLED.format(path=path, requests=str(requests), answers=str(answers))
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 120
        while not (answers.exists() and answers.read_bytes().count(b"\n") >= 4):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    kept = answers.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    before = kept.count(b"\n")
    assert 4 <= before < 400
    summary = run_file(requests, answers, toy_loaded(), GenerationSettings(1), 64)
    assert summary.skipped == before
    assert answers.read_bytes().startswith(kept)
    assert [a["id"] for a in read(answers)] == list(range(400))


def test_an_id_given_twice_names_both_lines(tmp_path: Path) -> None:
    requests = write(
        tmp_path / "r.jsonl",
        {"id": "a", "question": "1?"},
        {"id": "b", "question": "2?"},
        {"id": "a", "question": "3?"},
    )
    with pytest.raises(InputError, match=r"id 'a' is on line 1 and on line 3"):
        run_file(requests, tmp_path / "a.jsonl", toy_loaded())
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("line", ["{}", '{"id": 1}', "nonsense", '{"prediction": "x"}'])
def test_a_file_that_holds_no_answers_is_not_touched(tmp_path: Path, line: str) -> None:
    requests = write(tmp_path / "r.jsonl", {"id": 1, "question": "?"})
    other = tmp_path / "notes.txt"
    other.write_text(f"{line}\ntorn")
    with pytest.raises(InputError, match=r"notes.txt:1: not an answer"):
        run_file(requests, other, toy_loaded())
    assert other.read_text() == f"{line}\ntorn"
    with pytest.raises(InputError, match="into the requests"):
        run_file(requests, requests, toy_loaded())


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    requests = write(tmp_path / "r.jsonl", {"id": 1, "question": "?"})
    with (
        FileLock(tmp_path / ".a.jsonl.lock"),
        pytest.raises(InputError, match="another run is writing it"),
    ):
        run_file(requests, tmp_path / "a.jsonl", toy_loaded())
    assert run_file(requests, tmp_path / "a.jsonl", toy_loaded(), SHORT).answered == 1


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.jsonl: cannot be read"):
        run_file(tmp_path / "none.jsonl", tmp_path / "a.jsonl", toy_loaded())
    (tmp_path / "latin.jsonl").write_bytes('{"id": 1, "question": "Öl?"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.jsonl: not UTF-8"):
        run_file(tmp_path / "latin.jsonl", tmp_path / "a.jsonl", toy_loaded())
    requests = write(tmp_path / "r.jsonl", {"id": 1, "question": "?"})
    with pytest.raises(InputError, match="cannot be written"):
        run_file(requests, tmp_path, toy_loaded())
    with pytest.raises(InputError, match="batch_size=0"):
        run_file(requests, tmp_path / "a.jsonl", toy_loaded(), batch_size=0)


def test_a_batch_too_large_for_the_memory_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def small(loaded: Any, batch: Any, settings: Any) -> Any:
        sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > 2:
            raise ResourceError("out of memory")
        return generate(loaded, batch, settings)

    monkeypatch.setattr(local_module, "generate", small)
    requests = write(tmp_path / "r.jsonl", *({"id": i, "question": f"{i}?"} for i in range(5)))
    run_file(requests, tmp_path / "a.jsonl", toy_loaded(), SHORT, 5)
    assert sizes == [5, 2, 3, 1, 2]
    assert [a["id"] for a in read(tmp_path / "a.jsonl")] == list(range(5))
    assert all("prediction" in a for a in read(tmp_path / "a.jsonl"))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    requests = tmp_path / "r.jsonl"
    requests.write_bytes(b'\xef\xbb\xbf{"id": 1, "question": "a?"}\r\n{"id": 2, "question": "b?"}')
    run_file(requests, tmp_path / "a.jsonl", scripted("yes", "no"))
    assert [(a["id"], a["prediction"]) for a in read(tmp_path / "a.jsonl")] == [
        (1, "yes"),
        (2, "no"),
    ]
