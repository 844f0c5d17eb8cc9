"""Programs compared on one file of questions: nano, Tesseract, RapidOCR, RapidOCR with SmolLM2.

    python benchmarks/reading.py examples/lines/requests.jsonl --lines
    python benchmarks/nano_set.py OUT && python benchmarks/reading.py OUT/requests.jsonl --keep KEPT

Every answer is scored by the metric of its line, as `cogvlm eval` does.  Tesseract (the program)
and RapidOCR (the Python package, with the models in its wheel) answer what is to be read: lines
whose metric is ``cer``.  ``assembled`` answers the other questions: what RapidOCR reads goes with
the question into nano without a picture, which is SmolLM2-135M.  What is not installed is left out
and named.  With ``--keep`` a run that was ended goes on where it was.  Ends with a table of kinds
and one JSON line: figures and seconds an answer (the median; one after another, models loaded
before).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogvlm import GenerationSettings, Loaded, complete, open_model, user
from cogvlm.eval.run import score_answers
from cogvlm.journal import write_whole
from cogvlm.score import contains
from common import commit, machine

Line = dict[str, Any]  # of a file of questions
Program = Callable[[Line, Path], str]  # with the path of its picture
TOKENS = 256  # of a text that is read
ANSWER_TOKENS = 64  # of another answer: what is longer is no short answer
ASSEMBLED = "This is written in a picture:\n{text}\n\n{question}"


def is_line(asked: Line) -> bool:
    """Whether the picture is one line of print, as its kind says."""
    return str(asked.get("kind", "")).split(" ")[-1] == "line"


def reads(asked: Line) -> bool:
    """Whether the whole text is asked for."""
    return str(asked.get("metric", "cer")) == "cer"


def settings(asked: Line) -> GenerationSettings:
    """Greedy, and as long as the question asks for."""
    return GenerationSettings(max_new_tokens=TOKENS if reads(asked) else ANSWER_TOKENS)


@lru_cache(maxsize=1)
def loaded(model: str) -> Loaded:
    """A model of this package."""
    return open_model(model, device="cpu")


def nano(model: str) -> Program:
    """This package's own model, which is told nothing."""
    ready = loaded(model)

    def answer(asked: Line, picture: Path) -> str:
        return complete(ready, [user(picture, asked["question"])], settings(asked)).text

    return answer


def tesseract(model: str) -> Program:
    """The program; it is told whether it sees a line or a block of text."""
    if not shutil.which("tesseract"):
        raise ImportError("no program 'tesseract'")

    def read(asked: Line, picture: Path) -> str:
        command = ["tesseract", str(picture), "-", "--psm", "7" if is_line(asked) else "6"]
        done = subprocess.run([*command, "-l", "eng"], capture_output=True, text=True, check=True)
        return " ".join(done.stdout.split())

    return read


def rapidocr(model: str) -> Program:
    """PP-OCR's models through onnxruntime; its detector off where the picture is one line."""
    from rapidocr import RapidOCR

    engine = RapidOCR()

    def read(asked: Line, picture: Path) -> str:
        with Image.open(picture) as opened:  # it takes the colours of a palette for greys
            pixels = np.asarray(opened.convert("RGB"))[..., ::-1]
        # All three each time: what one call leaves out is as in the call before.
        steps = {"use_rec": True, "use_cls": False, "use_det": not is_line(asked)}
        found: Any = engine(np.ascontiguousarray(pixels), **steps)
        return " ".join(found.txts or ())

    return read


def assembled(model: str) -> Program:
    """What a person could put together instead: RapidOCR's text in SmolLM2's prompt."""
    reader = rapidocr(model)
    ready = loaded("nano")

    def answer(asked: Line, picture: Path) -> str:
        prompt = ASSEMBLED.format(text=reader(asked, picture), question=asked["question"])
        return complete(ready, [user(prompt)], settings(asked)).text

    return answer


PROGRAMS: dict[str, Callable[[str], Program]] = {
    "nano": nano, "tesseract": tesseract, "rapidocr": rapidocr, "assembled": assembled,
}  # fmt: skip
_READERS = ("tesseract", "rapidocr")
_SHOWN = ("cer", "anls", "relaxed", "accuracy", "iou_0.5", "jaccard", "contains")  # in the table


def theirs(program: str, lines: Sequence[Line]) -> list[Line]:
    """The lines that a program answers; all of them are about a picture."""
    seen = [line for line in lines if "image" in line]
    if program == "nano":
        return seen
    return [line for line in seen if reads(line) == (program in _READERS)]


def limited(lines: Sequence[Line], most: int | None) -> list[Line]:
    """Of each kind so many lines, evenly from all."""
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        kinds.setdefault(str(line.get("kind", "")), []).append(line)
    return [
        some[i * len(some) // count]
        for some in kinds.values()
        for count in [min(most or len(some), len(some))]
        for i in range(count)
    ]


def answer_all(program: Program, lines: Sequence[Line], root: Path, out: Path) -> list[float]:
    """Append to ``out`` an answer to every line that has none; returns all their seconds."""
    text = out.read_text(encoding="utf-8") if out.exists() else ""
    whole = [row + "\n" for row in text.splitlines() if row.endswith("}")]
    out.write_text("".join(whole), encoding="utf-8")  # without what was cut off
    done = {one["id"]: one["seconds"] for one in map(json.loads, whole)}
    with out.open("a", encoding="utf-8") as file:
        for asked in lines:
            key = str(asked["id"])
            if key in done:
                continue
            start = time.perf_counter()
            said = program(asked, root / asked["image"]).strip()
            done[key] = time.perf_counter() - start
            one = {"id": key, "prediction": said, "seconds": done[key]}
            file.write(json.dumps(one) + "\n")
            file.flush()
    return [done[str(asked["id"])] for asked in lines]


def contained(lines: Sequence[Line], folder: Path, name: str) -> dict[str, float]:
    """Share of short answers that stand in what was said, also where it is a sentence.

    ANLS and relaxed accuracy have 0 for the right number in a sentence, which chatty models say.
    """
    rows = map(json.loads, (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    said = {row["id"]: row["prediction"] for row in rows}
    some = [line for line in lines if line.get("metric") in ("anls", "relaxed")]
    right = [line["truth"] if isinstance(line["truth"], list) else [line["truth"]] for line in some]
    found = [contains(said[str(x["id"])], tuple(t)) for x, t in zip(some, right, strict=True)]
    return {"contains": round(sum(found) / len(found), 4)} if found else {}


def measure(name: str, lines: Sequence[Line], root: Path, folder: Path, model: str) -> Line:
    """Figures of one program."""
    mine = theirs(name, lines)
    if not mine:
        return {"lines": 0}
    try:
        program = PROGRAMS[name](model)
    except ImportError as error:
        return {"missing": str(error)}
    times = sorted(answer_all(program, mine, root, folder / f"{name}.jsonl"))
    asked = folder / f"{name}.requests.jsonl"
    write_whole(asked, "".join(json.dumps(line) + "\n" for line in mine).encode())
    score = score_answers(asked, folder / f"{name}.jsonl")
    for kind, its in score.kinds.items():
        its.update(contained([x for x in mine if str(x.get("kind")) == kind], folder, name))
    all_of_it = {"lines": len(mine), **score.scores, **contained(mine, folder, name)}
    return {**all_of_it, "kinds": score.kinds, "seconds": round(times[len(times) // 2], 4)}


def table(found: Mapping[str, Line]) -> str:
    """A row for each kind and its metric, a column for each program."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name, figures in found.items():
        for kind, values in figures.get("kinds", {}).items():
            for metric, value in values.items():
                if metric in _SHOWN:
                    rows.setdefault((kind, metric), {})[name] = value
    names = [name for name in found if "missing" not in found[name]]
    head = f"{'kind':18} {'metric':9}" + "".join(f"{name:>11}" for name in names)
    return "\n".join([head, *(
        f"{kind:18} {metric:9}" + "".join(
            f"{values[name]:11.3f}" if name in values else f"{'-':>11}" for name in names
        )
        for (kind, metric), values in sorted(rows.items())
    )])  # fmt: skip


def read_lines(path: Path, one_line: bool) -> list[Line]:
    """The file of questions; ``one_line`` says that every picture is one line of print."""
    rows = path.read_text(encoding="utf-8").splitlines()
    lines = [json.loads(row) for row in rows if row.strip()]
    return [{"kind": "line", **line} for line in lines] if one_line else lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("requests", type=Path, help="a file for 'cogvlm eval'")
    parser.add_argument("--lines", action="store_true", help="every picture is one line of text")
    parser.add_argument("--readers", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--model", default="nano", help="another model in the place of nano")
    parser.add_argument("--limit", type=int, help="so many lines of each kind, evenly taken")
    parser.add_argument("--kinds", nargs="+", help="only these kinds")
    parser.add_argument("--keep", type=Path, help="a folder for the answers; goes on from them")
    given = parser.parse_args(arguments)
    lines = read_lines(given.requests, given.lines)
    lines = [line for line in lines if not given.kinds or line.get("kind") in given.kinds]
    lines = limited(lines, given.limit)
    found: dict[str, Line] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.readers:
            print(name, file=sys.stderr, flush=True)
            found[name] = measure(name, lines, given.requests.parent, folder, given.model)
    print(table(found))
    head = {"name": "reading", "commit": commit(), "machine": machine(), "model": given.model}
    kinds = Counter(str(line.get("kind", "")) for line in lines)
    counts = {"file": given.requests.name, "lines": len(lines), "kinds": kinds}
    print(json.dumps({**head, **counts, "programs": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
