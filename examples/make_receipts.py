"""Two hundred small pictures of totals, as cut from till receipts, with their labels.

    python examples/make_receipts.py receipts
    cogvlm train recipes/lora-nano-receipts.yaml

Stands in for a folder of your own: ``labels.jsonl`` holds a picture's name, a question and the
answer a line.  The label and the currency are to be left out of the answer, and a decimal comma
becomes a point, which no model can know without being shown.  The same on every run with the same
fonts installed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from cogvlm.data.fonts import FontSampler, find_fonts, split
from cogvlm.data.lines import LineStyle, render_line

QUESTION = "What is the total?"
LABELS = ("TOTAL", "Total", "Total:", "SUM", "Amount due", "To pay", "BALANCE", "Grand total")
CURRENCIES = ("{} EUR", "EUR {}", "{}", "$ {}", "${}", "USD {}")
SIZES = (24, 28, 32)


def total(chance: np.random.Generator) -> tuple[str, str]:
    """What is printed, and the answer."""
    whole = int(10 ** chance.uniform(0, 3))
    cents = int(chance.integers(100))
    comma = "," if chance.random() < 0.4 else "."
    money = CURRENCIES[chance.integers(len(CURRENCIES))].format(f"{whole}{comma}{cents:02d}")
    return f"{LABELS[chance.integers(len(LABELS))]} {money}", f"{whole}.{cents:02d}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write pictures of totals and labels.jsonl.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=11)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    fonts = FontSampler(split(find_fonts(None))[False], given.seed)
    lines = []
    for number in range(given.count):
        chance = np.random.default_rng((given.seed, number))
        text, answer = total(chance)
        line = render_line(text, fonts.sample(chance, SIZES), chance, LineStyle(strength=0.2))
        name = f"{number:03d}.png"
        line.image.save(given.folder / name)
        lines.append(json.dumps({"image": name, "question": QUESTION, "answer": answer}))
    (given.folder / "labels.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{given.folder}: {given.count} pictures and labels.jsonl")


if __name__ == "__main__":
    main()
