"""Reading compared: nano, Tesseract and RapidOCR on the same pictures, scored alike.

    python benchmarks/reading.py examples/lines/requests.jsonl --lines
    python benchmarks/reading.py pages/requests.jsonl --readers tesseract rapidocr

Each reader answers the whole file, a picture at a time, and every answer is scored by the metric of
its line (`cogvlm eval`).  Tesseract is the program (`tesseract` on the path), RapidOCR the Python
package with the models in its wheel; what is not installed is left out and named.  Ends with one
JSON line: figures and seconds a picture of each reader.  Times are of one picture after another,
with models loaded before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cogvlm import GenerationSettings, complete, open_model, user
from cogvlm.eval.run import score_answers, wanted
from common import commit, machine

Reader = Callable[[Path, str], str]


def nano(lines: bool) -> Reader:
    """This package's own model, which is told nothing."""
    loaded = open_model("nano", device="cpu")
    settings = GenerationSettings(max_new_tokens=96)
    return lambda picture, question: complete(loaded, [user(picture, question)], settings).text


def tesseract(lines: bool) -> Reader:
    """The program; page segmentation off where every picture is one line."""
    if not shutil.which("tesseract"):
        raise ImportError("no program 'tesseract'")

    def read(picture: Path, question: str) -> str:
        command = ["tesseract", str(picture), "-", "--psm", "7" if lines else "3", "-l", "eng"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return " ".join(done.stdout.split())

    return read


def rapidocr(lines: bool) -> Reader:
    """PP-OCR's models through onnxruntime; its detector off where every picture is one line."""
    from rapidocr import RapidOCR

    engine = RapidOCR()
    steps = {"use_det": False, "use_cls": False, "use_rec": True} if lines else {}

    def read(picture: Path, question: str) -> str:
        found: Any = engine(str(picture), **steps)
        return " ".join(found.txts or ())

    return read


READERS = {"nano": nano, "tesseract": tesseract, "rapidocr": rapidocr}


def answers(requests: Path, read: Reader) -> Iterator[dict[str, Any]]:
    """An answer to every line."""
    for line in requests.read_text(encoding="utf-8").splitlines():
        if line.strip():
            asked = json.loads(line)
            start = time.perf_counter()
            said = read(requests.parent / asked["image"], asked["question"])
            seconds = time.perf_counter() - start
            yield {"id": asked["id"], "prediction": said.strip(), "seconds": seconds}


def measure(requests: Path, reader: str, lines: bool, folder: Path) -> dict[str, Any]:
    """Figures of one reader."""
    try:
        read = READERS[reader](lines)
    except ImportError as error:
        return {"missing": str(error)}
    given = list(answers(requests, read))
    out = folder / f"{reader}.jsonl"
    out.write_text("".join(json.dumps(one) + "\n" for one in given), encoding="utf-8")
    score = score_answers(requests, out)
    times = sorted(one["seconds"] for one in given)
    return {**score.scores, "kinds": score.kinds, "seconds": round(times[len(times) // 2], 4)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("requests", type=Path, help="a file for 'cogvlm eval', a picture a line")
    parser.add_argument("--lines", action="store_true", help="every picture is one line of text")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--keep", type=Path, help="a folder for the answers")
    given = parser.parse_args()
    count = len(wanted(given.requests))
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for reader in given.readers:
            print(reader, file=sys.stderr, flush=True)
            found[reader] = measure(given.requests, reader, given.lines, folder)
    head = {"name": "reading", "commit": commit(), "machine": machine()}
    print(json.dumps({**head, "file": str(given.requests), "lines": count, "readers": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
