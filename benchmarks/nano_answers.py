"""Show what nano answers about the real pictures of the examples, right or wrong.

    python benchmarks/nano_answers.py            # writes examples/pictures/answers.jsonl and .md

Every question is answered anew, greedily; nothing is chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvlm import GenerationSettings, open_model
from cogvlm.eval.run import Score, as_line, score_file
from cogvlm.journal import write_whole

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
TOKENS = 256


def cell(text: str) -> str:
    """Text in a cell of a markdown table, as it is: code with its lines in one."""
    plain = " / ".join(text.split("\n")).replace("|", "\\|").replace("`", "'")
    return f"`{plain}`" if plain else "(nothing)"


def page(lines: Sequence[dict[str, Any]], answers: dict[str, str], score: Score) -> str:
    """Pictures with their questions, truths and answers, in the order of the file."""
    rows = [
        "# What nano answers",
        "",
        "Written by `python benchmarks/nano_answers.py`: every answer, right or wrong. Where the",
        "pictures are from: [examples](../README.md).",
    ]
    shown = ""
    for line in lines:
        if line["image"] != shown:
            shown = line["image"]
            rows += ["", f"![{line['kind']}]({shown})", "", "| question | truth | nano |"]
            rows.append("|---|---|---|")
        truth = line["truth"] if isinstance(line["truth"], str) else line["truth"][0]
        said = answers.get(str(line["id"]), "")
        rows.append(f"| {line['question']} | {cell(truth)} | {cell(said)} |".replace("\n", " "))
    return "\n".join([*rows, "", "```", as_line(score), "```", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=PICTURES)
    parser.add_argument("--model", default="nano")
    given = parser.parse_args(arguments)
    requests, out = given.folder / "requests.jsonl", given.folder / "answers.jsonl"
    out.unlink(missing_ok=True)
    settings = GenerationSettings(max_new_tokens=TOKENS)
    score = score_file(requests, out, open_model(given.model), settings=settings)
    rows = [json.loads(row) for row in out.read_text(encoding="utf-8").splitlines()]
    answers = {str(row["id"]): str(row.get("prediction", "")).strip() for row in rows}
    lines = [json.loads(row) for row in requests.read_text(encoding="utf-8").splitlines()]
    text = page(lines, answers, score)
    write_whole(given.folder / "answers.md", text.encode())
    print(as_line(score))
    return 0


if __name__ == "__main__":
    sys.exit(main())
