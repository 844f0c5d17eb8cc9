"""Benchmarks in the layout of their authors become files of questions."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cogvlm.cli import app
from cogvlm.errors import InputError
from cogvlm.eval.run import score_file
from cogvlm.eval.tasks import LETTER, SHORT, TASKS, write_requests
from engine.toys import scripted


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), "white").save(path)
    return path


def dump(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def encoded() -> str:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "white").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def docvqa(at: Path) -> None:
    picture(at / "documents" / "x_1.png")
    one = {"questionId": 49153, "question": "Year?", "image": "documents/x_1.png"}
    dump(at / "val_v1.0_withQT.json", {"data": [one | {"answers": ["1998", "in 1998"]}]})


def infovqa(at: Path) -> None:
    picture(at / "images" / "7.jpeg")
    one = {"questionId": 1, "question": "Year?", "image_local_name": "7.jpeg"}
    dump(at / "infographicsVQA_val_v1.0.json", {"data": [one | {"answers": ["1998", "in 1998"]}]})


def textvqa(at: Path) -> None:
    picture(at / "train_images" / "ab12.jpg")
    one = {"question_id": 3, "image_id": "ab12", "question": "Year?", "answers": ["1998"] * 10}
    dump(at / "TextVQA_0.5.1_val.json", {"data": [one]})


def vqav2(at: Path) -> None:
    picture(at / "val2014" / "COCO_val2014_000000000042.jpg")
    asked = {"question_id": 42000, "image_id": 42, "question": "Year?"}
    dump(at / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [asked]})
    answers = [{"answer": "1998", "answer_id": i} for i in range(10)]
    truth = {"question_id": 42000, "answers": answers}
    dump(at / "v2_mscoco_val2014_annotations.json", {"annotations": [truth]})


def chartqa(at: Path) -> None:
    picture(at / "test" / "png" / "1.png")
    for kind in ("human", "augmented"):
        one = {"imgname": "1.png", "query": "Year?", "label": "1998"}
        dump(at / "test" / f"test_{kind}.json", [one])


def ocrbench(at: Path) -> None:
    picture(at / "OCRBench_Images" / "a" / "1.jpg")
    one = {"dataset_name": "a", "type": "Regular Text Recognition", "question": "Year?"}
    dump(at / "OCRBench" / "OCRBench.json", [one | {"image_path": "a/1.jpg", "answers": ["1998"]}])
    (at / "OCRBench_Images").rename(at / "OCRBench" / "OCRBench_Images")


def pope(at: Path) -> None:
    picture(at / "COCO_val2014_1.jpg")
    one = {
        "question_id": 1,
        "image": "COCO_val2014_1.jpg",
        "text": "Is there a dog?",
        "label": "no",
    }
    for kind in ("random", "adversarial"):
        (at / f"coco_pope_{kind}.json").write_text(json.dumps(one) + "\n")


def choice(at: Path) -> None:
    lines = [
        "index\timage\tquestion\thint\tA\tB\tC\tanswer\tcategory",
        f"10\t{encoded()}\tYear?\tLook.\t1997\t1998\t\tB\tdate",
        "1000010\t10\tYear?\t\t1998\t1997\t\tA\tdate",
    ]
    (at / "MMBench_DEV_EN.tsv").write_text("\n".join(lines))


def table(at: Path) -> None:
    pair = f"['{encoded()}', '{encoded()}']"
    lines = ["index\timage\tquestion\tanswer", f"1\t{pair}\tYear?\t['1998', 'in 1998']"]
    (at / "DocVQA_VAL.tsv").write_text("\n".join(lines))


MAKERS = (docvqa, infovqa, textvqa, vqav2, chartqa, ocrbench, pope, choice, table)
RIGHT = {"pope": "No.", "choice": "B"}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_the_published_layout_is_answered_and_scored(make: Any, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    make(source)
    name = make.__name__
    requests = write_requests(TASKS[name], source, tmp_path / "q.jsonl")
    lines = [json.loads(line) for line in requests.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) > 0
    assert {line["metric"] for line in lines} == {TASKS[name].metric}
    for line in lines:
        for path in line.get("images", [line.get("image")]):
            assert Path(path).is_file() and Path(path).is_absolute()
    said = [RIGHT.get(name, "1998")] * len(lines)
    score = score_file(requests, tmp_path / "a.jsonl", scripted(*said))
    first = next(iter(score.scores.values()))
    assert score.failed == 0 and first == (0.5 if name == "choice" else 1.0)  # one B, one A
    if name in ("chartqa", "pope"):
        assert len(score.kinds) == 2


def test_options_are_listed_as_the_published_prompt_has_them(tmp_path: Path) -> None:
    choice(tmp_path)
    out = write_requests(TASKS["choice"], tmp_path, tmp_path / "q.jsonl")
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first["question"] == f"Look.\nYear?\nA. 1997\nB. 1998{LETTER}"
    assert second["images"] != first["images"]  # its own copy of the same picture
    table(tmp_path)
    (tmp_path / "MMBench_DEV_EN.tsv").unlink()
    out = write_requests(TASKS["table"], tmp_path, tmp_path / "q.jsonl", "contains")
    line = json.loads(out.read_text())
    assert line["question"] == f"Year?{SHORT}" and line["metric"] == "contains"
    assert len(line["images"]) == 2 and line["truth"] == ["1998", "in 1998"]


def test_a_limit_takes_lines_evenly(tmp_path: Path) -> None:
    charts = [{"imgname": "1.png", "query": f"{i}?", "label": "1"} for i in range(100)]
    dump(tmp_path / "test_human.json", charts)
    out = write_requests(TASKS["chartqa"], tmp_path, tmp_path / "q.jsonl", limit=4)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [
        "human-0",
        "human-25",
        "human-50",
        "human-75",
    ]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_other_layouts_are_refused_by_name(make: Any, tmp_path: Path) -> None:
    name = make.__name__
    with pytest.raises(InputError, match="no such file or folder"):
        write_requests(TASKS[name], tmp_path / "gone", tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="give the folder as the benchmark publishes it"):
        write_requests(TASKS[name], tmp_path, tmp_path / "q.jsonl")
    (source := tmp_path / "source").mkdir()
    make(source)
    for path in [*source.rglob("*.json"), *source.rglob("*.tsv")]:
        path.write_text('{"other": 1}')
    with pytest.raises(InputError, match=r"not laid out as|no column"):
        write_requests(TASKS[name], source, tmp_path / "q.jsonl")


def test_the_command_names_what_it_does_not_know(tmp_path: Path) -> None:
    for arguments, message in (
        (["--task", "docqa"], "--task docqa: not known; there are docvqa"),
        (["--metric", "bleu"], "--metric bleu: not known; there are cer"),
        (["--limit", "3"], "--limit goes with --task"),
        (["--answered"], "--answered: name the file of answers with -o"),
    ):
        result = CliRunner().invoke(app, ["eval", str(tmp_path), *arguments])
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())


def test_answers_given_elsewhere_are_scored_without_a_model(tmp_path: Path) -> None:
    docvqa(tmp_path)
    answers = tmp_path / "theirs.jsonl"
    answers.write_text('{"id": 49153, "prediction": "In 1998"}\n')
    arguments = [str(tmp_path), "--task", "docvqa", "-o", str(answers), "--answered"]
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["anls"] == 1.0
