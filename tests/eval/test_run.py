"""Scores of a file of questions with truths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cogvlm.errors import InputError
from cogvlm.eval.run import as_line, score_file, truths
from engine.toys import scripted


def test_score_counts_edits_and_failures(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "white").save(tmp_path / "a.png")
    requests = tmp_path / "requests.jsonl"
    lines = [
        {"id": 1, "image": "a.png", "question": "Say", "truth": "abcd"},
        {"id": 2, "image": "a.png", "question": "Say", "truth": "xyz"},
        {"id": 3, "image": "gone.png", "question": "Say", "truth": "abc"},
    ]
    requests.write_text("\n".join(json.dumps(line) for line in lines))
    loaded = scripted("abcd", "xyq")
    score = score_file(requests, tmp_path / "answers.jsonl", loaded)
    assert (score.lines, score.failed, score.exact) == (3, 1, round(1 / 3, 4))
    assert score.cer == 0.4  # one wrong letter and three lost ones, of ten
    assert json.loads(as_line(score))["cer"] == 0.4


def test_lines_without_a_truth_are_named(tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"id": 1, "truth": "a"}\n{"id": 2}\n')
    with pytest.raises(InputError, match=r"requests\.jsonl:2: needs 'id' and 'truth'"):
        truths(requests)
    requests.write_text("\n")
    with pytest.raises(InputError, match="no lines to score"):
        truths(requests)
