"""Scores of a file of questions with truths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cogvlm.errors import InputError
from cogvlm.eval.run import as_line, score_answers, score_file, wanted
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
    assert (score.lines, score.failed, score.scores["exact"]) == (3, 1, round(1 / 3, 4))
    assert score.scores["cer"] == 0.4  # one wrong letter and three lost ones, of ten
    assert json.loads(as_line(score))["cer"] == 0.4


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_each_line_is_scored_by_its_metric_and_kinds_apart(tmp_path: Path) -> None:
    questions: list[dict[str, object]] = [
        {"id": 1, "truth": ["Paris", "paris, france"], "metric": "anls", "kind": "doc"},
        {"id": 2, "truth": 100, "metric": "relaxed", "kind": "chart"},
        {"id": 3, "truth": "200", "metric": "relaxed", "kind": "chart"},
        {"id": 4, "truth": "abcd"},
    ]
    said = ("PARIS", "103", "210.1", "abcx")
    given: list[dict[str, object]] = [
        {"id": i, "prediction": text} for i, text in enumerate(said, 1)
    ]
    requests = write(tmp_path / "q.jsonl", questions)
    score = score_answers(requests, write(tmp_path / "a.jsonl", given))
    assert score.scores == {"anls": 1.0, "exact": 0.0, "relaxed": 0.5, "cer": 0.25, "cer.exact": 0}
    assert score.kinds == {
        "chart": {"lines": 2, "relaxed": 0.5},
        "doc": {"lines": 1, "anls": 1.0, "exact": 0.0},
    }
    assert (score.lines, score.failed) == (4, 0)
    write(tmp_path / "a.jsonl", given[1:])
    assert score_answers(requests, tmp_path / "a.jsonl").failed == 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"id": 2}', r"q\.jsonl:2: needs 'id' and 'truth'"),
        ("[1]", r"q\.jsonl:2: needs 'id' and 'truth'"),
        ("{", r"q\.jsonl:2: needs 'id' and 'truth'"),
        ('{"id": 2, "truth": []}', "'truth' is a text, or a list of texts"),
        ('{"id": 2, "truth": {"a": 1}}', "'truth' is a text, or a list of texts"),
        ('{"id": 2, "truth": "a", "metric": "bleu"}', "no metric 'bleu'; there are cer, anls"),
    ],
)
def test_lines_that_cannot_be_scored_are_named(tmp_path: Path, second: str, message: str) -> None:
    requests = tmp_path / "q.jsonl"
    requests.write_text('{"id": 1, "truth": "a"}\n' + second)
    with pytest.raises(InputError, match=message):
        wanted(requests)


def test_files_with_nothing_to_score(tmp_path: Path) -> None:
    requests = tmp_path / "q.jsonl"
    requests.write_text("\n")
    with pytest.raises(InputError, match="no lines to score"):
        wanted(requests)
    requests.write_text('{"id": 1, "truth": "a"}')
    (tmp_path / "a.jsonl").write_text('{"id": 1, "prediction": "a"}\n{"prediction": "b"}')
    with pytest.raises(InputError, match=r"a\.jsonl:2: no answer of 'cogvlm run'"):
        score_answers(requests, tmp_path / "a.jsonl")
