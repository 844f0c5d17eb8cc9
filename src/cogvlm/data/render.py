"""Write rendered lines to a folder: pictures and a file of questions with their truths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from .fonts import FontSampler, find_fonts, split
from .lines import LineStream
from .text import LineText

QUESTION = "What does the picture say?"
HELD_OUT_SEED = 7_000_003  # far from any recipe's seed: held-out lines are never a training run's


def line_stream(
    seed: int = 0,
    *,
    held_out: bool = False,
    min_chars: int = 1,
    max_chars: int = 24,
    strength: float = 1.0,
    fonts: Sequence[Path | str] = (),
    texts: Sequence[Path | str] = (),
) -> LineStream:
    """Lines for training, or lines in fonts and from texts that never train (``held_out``).

    Raises:
        ResourceError: no usable fonts or texts on this machine.
    """
    found = split(find_fonts([Path(f) for f in fonts] or None))
    text = LineText([Path(t) for t in texts] or None, seed, min_chars, max_chars, held_out=held_out)
    return LineStream(FontSampler(found[held_out], seed), text, seed, strength)


def write_lines(folder: Path, stream: LineStream, count: int) -> Path:
    """Write ``count`` pictures and ``requests.jsonl`` into ``folder``; returns that file.

    Raises:
        ConfigError: ``count`` below 1.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; give 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        line = stream.line_at(index)
        name = f"{index:05d}.png"
        line.image.save(folder / name)
        record = {"id": name, "image": name, "question": QUESTION, "truth": line.text}
        lines.append(json.dumps(record))
    target = folder / "requests.jsonl"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target
