"""The test set of nano: what is frozen of it is whole, and what is drawn never trained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvlm.data.engine import words
from cogvlm.data.engine.pdf import Layer
from cogvlm.data.engine.step import Piece, Refused
from cogvlm.eval.run import score_answers, wanted
from cogvlm.score import boxes
from data.engine_parts import setting
from engine.toys import scripted

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "examples" / name for name in ("documents", "pictures")]
AREA = 448 * 448
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        yield {
            name: import_module(name)
            for name in ("nano_answers", "nano_real", "nano_set", "reading")
        }


def lines_of(folder: Path) -> Lines:
    text = (folder / "requests.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_the_frozen_part_is_whole(folder: Path) -> None:
    lines = lines_of(folder)
    assert len(wanted(folder / "requests.jsonl")) == len({line["id"] for line in lines})
    assert all(line["kind"].startswith("real ") for line in lines)
    named = {line["image"] for line in lines}
    assert named == {p.name for p in folder.iterdir() if p.suffix in (".png", ".jpg")}
    for name in named:
        with Image.open(folder / name) as image:
            assert image.width * image.height <= AREA, name
    for line in lines:
        if line["metric"] == "box":
            assert len(boxes(line["truth"])) == 1, line
        if line["metric"] == "yes_no":
            assert line["truth"] in ("yes", "no"), line


def test_the_frozen_part_is_small_and_its_ids_are_of_one_set() -> None:
    assert sum(p.stat().st_size for folder in FOLDERS for p in folder.iterdir()) < 1_500_000
    ids = [line["id"] for folder in FOLDERS for line in lines_of(folder)]
    assert len(ids) == len(set(ids))


def test_perfect_answers_have_perfect_figures(tmp_path: Path) -> None:
    lines = [line for folder in FOLDERS for line in lines_of(folder)]
    lines = [line for line in lines if len(str(line["truth"])) < 200]  # edits take their time
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = [{"id": want.key, "prediction": want.truth[0]} for want in wanted(requests)]
    answers.write_text("".join(json.dumps(one) + "\n" for one in said))
    scores = score_answers(requests, answers).scores
    assert scores.pop("cer") == 0
    perfect = {"exact", "anls", "anls.exact", "relaxed", "accuracy", "f1", "iou", "iou_0.5"}
    assert {name for name, value in scores.items() if value == 1} >= perfect


def test_words_of_the_test_never_train(scripts: dict[str, ModuleType]) -> None:
    for name, ours in scripts["nano_set"].WORDS.items():
        if name == "UNITS":
            continue
        theirs = {w.lower() for w in getattr(words, name)}
        assert not theirs & {w.lower() for w in ours}, name
    with scripts["nano_set"].other_words():
        assert "Peanuts" in words.GOODS
    assert "Peanuts" not in words.GOODS


def test_the_same_command_draws_the_same_set(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, toy = scripts["nano_set"], setting(448)
    monkeypatch.setattr(script, "read_corpus", lambda held_out: toy.corpus)
    monkeypatch.setattr(script, "find_faces", lambda held_out: toy.faces)
    kinds = ["--kinds", "receipt", "sign", "list"]
    for name in ("a", "b"):
        assert script.main([str(tmp_path / name), "--each", "2", "--no-text", *kinds]) == 0
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("a", "b")]
    assert files[0] == files[1]
    drawn = [line for line in lines_of(tmp_path / "a") if not line["kind"].startswith("real ")]
    assert [line["kind"] for line in drawn] == ["receipt"] * 2 + ["sign"] * 2 + ["list"] * 2
    assert len(wanted(tmp_path / "a" / "requests.jsonl")) == len(lines_of(tmp_path / "a"))
    shops = {shop for shop in script.WORDS["SHOPS"]}
    asked = [line for line in drawn if re.search("shop", line["question"])]
    assert all(shops & set(line["truth"]) for line in asked)


def test_answers_are_shown_right_or_wrong(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (30, 20), "white").save(tmp_path / "a.png")
    lines = [
        {"id": i, "image": "a.png", "question": "Say\nit.", "truth": ["a|b", "c"], "kind": "real"}
        for i in range(2)
    ]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "answers.jsonl").write_text("of an earlier model\n")
    monkeypatch.setattr(scripts["nano_answers"], "open_model", lambda name: scripted("c", ""))
    assert scripts["nano_answers"].main([str(tmp_path)]) == 0
    text = (tmp_path / "answers.md").read_text(encoding="utf-8")
    assert text.count("![real](a.png)") == 1
    assert "| Say it. | `a\\|b` | `c` |\n| Say it. | `a\\|b` | (nothing) |" in text


# --- cutting ------------------------------------------------------------------------------------


def layer(*rows: tuple[float, str]) -> Layer:
    """Lines of one size at these heights; a word has six points a letter."""
    lines = []
    for top, text in rows:
        x, pieces = 50.0, []
        for word in text.split():
            pieces.append(Piece(word, (x, top, x + 6 * len(word), top + 9)))
            x += 6 * len(word) + 4
        lines.append(tuple(pieces))
    return Layer((400, 500), tuple(lines))


def test_a_part_holds_its_lines_and_no_other(scripts: dict[str, ModuleType]) -> None:
    page = layer((100, "The first line stands here"), (114, "and the second one below"))
    rng = np.random.default_rng(0)
    choose, found = scripts["nano_real"].choose, None
    for _ in range(20):
        try:
            found = choose(page, rng, 1)
        except Refused:
            continue
        line = found.lines[0]
        others = [w.box for row in page.lines for w in row if row is not line]
        assert all(b[3] <= found.box[1] or b[1] >= found.box[3] for b in others)
        assert 21 <= found.scale * 10 <= 30  # pixels an em; the line is nine tenths of one high
    assert found is not None
    with pytest.raises(Refused, match="no such lines"):
        choose(layer((100, "One line"), (300, "and one far away")), rng, 2)
    with pytest.raises(Refused, match="too large"):
        choose(layer(*((100 + 12.0 * i, "word " * 10) for i in range(30))), _First(), 30)


class _First:
    """Chance that begins with the first line."""

    def integers(self, *_: int) -> int:
        return 0

    def uniform(self, low: float, high: float) -> float:
        return high


def test_questions_about_a_paragraph_are_answered_by_it(scripts: dict[str, ModuleType]) -> None:
    lines = [["\u2022", "Green", "apples", "are"], ["some-"], ["times", "sour,", "often", "sweet."]]
    flat = ["green", "apples", "are", "some-", "times", "sour", "often", "sweet"]
    about, seen = scripts["nano_real"].about, set()
    for seed in range(60):
        for line in about(lines, ["kitchens", "sour"], np.random.default_rng(seed)):
            question, truth = line["question"], line["truth"]
            seen.add(question)
            assert "times" not in question  # the rest of a word is none
            if found := re.search(r'comes (after|before) "(\w+)"', question):
                step = 1 if found[1] == "after" else -1
                assert truth == [flat[flat.index(found[2].lower()) + step]] or truth == ["Green"]
            elif "first word" in question:
                assert truth == ["Green"]
            elif "last word" in question:
                assert truth == ["sweet.", "sweet"]
            elif found := re.search('word "(\\w+)" in', question):
                assert truth == ("yes" if found[1] in flat else "no")
    assert len(seen) > 8


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("The end of this package.", True),
        ("x = 3 * y1 + f(q) / 2", False),
        ('write "foo" . Then go on and on', False),  # a blank that the page has not
        ("Das Stra\u00dfenfest beginnt morgen", False),
    ],
)
def test_what_is_read_out(scripts: dict[str, ModuleType], text: str, fine: bool) -> None:
    assert scripts["nano_real"].is_running_text(text) == fine


def test_signs_of_print_and_of_ascii_are_right(scripts: dict[str, ModuleType]) -> None:
    says = scripts["nano_real"].says("don\u2019t\ngo")
    assert says == ["don\u2019t\ngo", "don\u2019t go", "don't\ngo", "don't go"]


# --- comparing ----------------------------------------------------------------------------------


def test_programs_are_compared_and_go_on_where_they_were(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reading, asked = scripts["reading"], []

    def program(model: str) -> Any:
        def answer(line: dict[str, Any], picture: Path) -> str:
            asked.append(line["id"])
            return "abc" if picture.name == "a.png" else "no"

        return answer

    def missing(model: str) -> Any:
        raise ImportError("not here")

    monkeypatch.setattr(
        reading, "PROGRAMS", {"nano": program, "rapidocr": program, "assembled": missing}
    )
    lines = [
        {"id": i, "image": "a.png", "question": "Say", "truth": "abd", "kind": "line"}
        for i in range(4)
    ]
    lines += [
        {
            "id": 9,
            "image": "b.png",
            "question": "?",
            "truth": "no",
            "metric": "yes_no",
            "kind": "y",
        },
        {"id": 7, "image": "a.png", "question": "?", "metric": "anls", "truth": ["x", "B"]}
        | {"kind": "q"},
        {"id": 10, "question": "Hello", "truth": "no", "kind": "text only"},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keep = tmp_path / "keep"
    keep.mkdir()
    whole = json.dumps({"id": "0", "prediction": "abd", "seconds": 1.0})
    (keep / "nano.jsonl").write_text(f'{whole}\n{{"id": "2", "pred')  # cut off
    command = [str(tmp_path / "r.jsonl"), "--keep", str(keep), "--limit", "2"]
    assert reading.main([*command, "--readers", "nano", "rapidocr", "assembled"]) == 0
    assert asked == [2, 9, 7, 0, 2]
    *rows, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)["programs"]
    assert found["nano"]["cer"] == round(1 / 6, 4)  # its answer of before was right
    assert found["rapidocr"]["cer"] == round(2 / 6, 4)
    assert (found["nano"]["lines"], found["rapidocr"]["lines"]) == (4, 2)
    assert found["assembled"] == {"missing": "not here"}
    assert [row.split() for row in rows] == [
        ["kind", "metric", "nano", "rapidocr"],
        ["line", "cer", "0.167", "0.333"],
        ["q", "anls", "0.000", "-"],
        ["q", "contains", "1.000", "-"],  # "B" stands in "abc"
        ["y", "accuracy", "1.000", "-"],
    ]
