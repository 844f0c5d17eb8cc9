"""Published benchmarks, as their files lie on the disk, made into files of questions.

Knows file layouts, prompts and metrics; no model.  Nothing is fetched: give the file, or the
folder, that the benchmark's authors publish::

    docvqa infovqa    val_v1.0*.json             {"data": [{"questionId", "question", "image", ...
    textvqa           TextVQA_0.5.1_val.json     images in train_images/
    vqav2 okvqa       *questions*.json with *annotations*.json, images COCO_<split>_<12 digits>.jpg
    chartqa           test/test_human.json, test/test_augmented.json, images in test/png/
    ocrbench          OCRBench/OCRBench.json, images in OCRBench_Images/
    pope              coco_pope_random.json, ..._popular, ..._adversarial; JSON lines
    choice            a table (.tsv) with the pictures inside, as VLMEvalKit publishes MMBench,
                      MMStar, AI2D, MMMU, SEED, ScienceQA: index, image, question, A, ..., answer
    table             such a table with free answers; give the metric

The prompts are those with which CogVLM2's published table was made (VLMEvalKit's wrapper): "Short
Answer." behind questions, "Answer with the option's letter ..." behind options.
"""

from __future__ import annotations

import ast
import base64
import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

SHORT = "\nShort Answer."
LETTER = "\nAnswer with the option's letter from the given choices directly."
Line = dict[str, Any]  # of a file of questions


@dataclass(frozen=True)
class Task:
    """A benchmark: how its files become lines, and what is measured."""

    name: str
    metric: str
    read: Callable[[Path, Path], Iterator[Line]]  # source, folder for pictures that need one


def find(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder tree by pattern, or the file itself; sorted.

    Raises:
        InputError: there is none.
    """
    if folder.is_file():
        return [folder]
    if found := sorted(folder.rglob(pattern)):
        return found
    raise InputError(f"{folder}: no {pattern} in it; give the folder as the benchmark publishes it")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error


def _picture(root: Path, *names: str) -> str:
    """The first path that is there, absolute; else the first (an error when it is read)."""
    home = root if root.is_dir() else root.parent
    found = next((home / name for name in names if (home / name).is_file()), home / names[0])
    return str(found.resolve())


def _documents(source: Path, _: Path) -> Iterator[Line]:
    path = find(source, "*val*.json")[0]
    for one in _json(path)["data"]:
        name = one.get("image") or one["image_local_name"]
        yield {
            "id": one["questionId"],
            "image": _picture(path.parent, name, f"images/{name}", f"images/{Path(name).name}"),
            "question": one["question"] + SHORT,
            "truth": one["answers"],
        }


def _text(source: Path, _: Path) -> Iterator[Line]:
    path = find(source, "TextVQA*val*.json")[0]
    for one in _json(path)["data"]:
        name = f"{one['image_id']}.jpg"
        yield {
            "id": one["question_id"],
            "image": _picture(path.parent, f"train_images/{name}", name),
            "question": one["question"] + SHORT,
            "truth": one["answers"],
        }


def _coco(source: Path, _: Path) -> Iterator[Line]:
    if source.is_file():
        raise InputError(f"{source}: give the folder with the questions and the annotations")
    asked = _json(find(source, "*[qQ]uestions*.json")[0])["questions"]
    answers = _json(find(source, "*annotations*.json")[0])["annotations"]
    truths = {one["question_id"]: [a["answer"] for a in one["answers"]] for one in answers}
    for one in asked:
        number = f"{one['image_id']:012d}.jpg"
        names = [f"val2014/COCO_val2014_{number}", f"COCO_val2014_{number}", number]
        yield {
            "id": one["question_id"],
            "image": _picture(source, *names),
            "question": one["question"] + SHORT,
            "truth": truths[one["question_id"]],
        }


def _charts(source: Path, _: Path) -> Iterator[Line]:
    for path in find(source, "test_*.json"):
        kind = path.stem.removeprefix("test_")
        for number, one in enumerate(_json(path)):
            name = one["imgname"]
            yield {
                "id": f"{kind}-{number}",
                "image": _picture(path.parent, f"png/{name}", name),
                "question": one["query"] + SHORT,
                "truth": str(one["label"]),
                "kind": kind,
            }


def _ocrbench(source: Path, _: Path) -> Iterator[Line]:
    path = find(source, "OCRBench*.json")[0]
    for number, one in enumerate(_json(path)):
        truths = one["answers"] if isinstance(one["answers"], list) else [one["answers"]]
        name = one["image_path"]
        yield {
            "id": number,
            "image": _picture(path.parent, f"OCRBench_Images/{name}", name, f"../{name}"),
            "question": one["question"],
            "truth": truths,
            "kind": one["type"],
        }


def _pope(source: Path, _: Path) -> Iterator[Line]:
    for path in find(source, "*pope*.json*"):
        kind = path.stem.split("_")[-1]
        for line in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            names = (f"val2014/{one['image']}", one["image"])
            yield {
                "id": f"{kind}-{one['question_id']}",
                "image": _picture(path.parent, *names),
                "question": one["text"] + SHORT,
                "truth": one["label"],
                "kind": kind,
            }


def _rows(source: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    for path in find(source, "*.tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if missing := {"index", "question", "answer"} - set(reader.fieldnames or ()):
                raise InputError(f"{path}: no column {sorted(missing)[0]!r} in its first line")
            yield from reader


def _pictures(row: dict[str, str], known: dict[str, str], folder: Path) -> list[str]:
    """Pictures of a row, written beside the questions; a short ``image`` is another row's index."""
    text = row.get("image") or ""
    if not text:
        raise InputError(f"row {row['index']}: no picture in the column 'image'")
    if len(text) < 64:
        text = known[text]
    known[row["index"]] = text
    parts = ast.literal_eval(text) if text.startswith("[") else [text]
    names = []
    for number, part in enumerate(parts):
        path = folder / f"{row['index']}-{number}.img"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(part))
        names.append(str(path.resolve()))
    return names


def _table(source: Path, folder: Path, letters: bool = False) -> Iterator[Line]:
    known: dict[str, str] = {}
    for row in _rows(source):
        question = row["question"]
        if row.get("hint"):
            question = f"{row['hint']}\n{question}"
        options = [name for name in "ABCDEFGH" if row.get(name)] if letters else []
        for name in options:
            question += f"\n{name}. {row[name]}"
        answer = row["answer"]
        truth = ast.literal_eval(answer) if answer.startswith("[") else answer
        kind = row.get("category") or row.get("l2-category")
        yield {
            "id": row["index"],
            "images": _pictures(row, known, folder),
            "question": question + (LETTER if options else SHORT),
            "truth": truth,
            **({"kind": kind} if kind else {}),
        }


def _choices(source: Path, folder: Path) -> Iterator[Line]:
    return _table(source, folder, letters=True)


TASKS = {
    task.name: task
    for task in (
        Task("docvqa", "anls", _documents),
        Task("infovqa", "anls", _documents),
        Task("textvqa", "vqa", _text),
        Task("vqav2", "vqa", _coco),
        Task("okvqa", "vqa", _coco),
        Task("chartqa", "relaxed", _charts),
        Task("ocrbench", "contains", _ocrbench),
        Task("pope", "yes_no", _pope),
        Task("choice", "choice", _choices),
        Task("table", "anls", _table),
    )
}


def write_requests(
    task: Task, source: Path, out: Path, metric: str | None = None, limit: int | None = None
) -> Path:
    """Write the questions of a benchmark as a file for :func:`cogvlm.eval.run.score_file`.

    Args:
        task: One of :data:`TASKS`.
        source: The benchmark's file or folder.
        out: JSON lines; pictures that lie inside a table go to the folder ``OUT.pictures``.
        metric: Another metric than the task's.
        limit: So many lines, evenly from the whole, for a first look.

    Raises:
        InputError: files that are not there or not of the published layout.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    try:
        lines = list(task.read(source, out.with_suffix(".pictures")))
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{source}: not laid out as {task.name} publishes it ({why})") from error
    if limit is not None and limit < len(lines):
        lines = [lines[i * len(lines) // limit] for i in range(limit)]
    text = (
        json.dumps(one | {"metric": metric or task.metric}, ensure_ascii=False) for one in lines
    )
    out.write_text("\n".join(text) + "\n", encoding="utf-8")
    return out
