"""Lines written to a folder with their truths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cogvlm.data.render import line_stream, write_lines
from cogvlm.errors import ConfigError, ResourceError
from cogvlm.processor.image import load_image


def test_pictures_and_truths_are_a_function_of_the_seed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Some words of paragraph number {n} here." for n in range(40)))
    try:
        stream = line_stream(3, texts=[text], max_chars=12, strength=0.2)
    except ResourceError:
        pytest.skip("this machine has no fonts")
    first = write_lines(tmp_path / "a", stream, 5)
    again = write_lines(tmp_path / "b", stream, 5)
    assert first.read_text() == again.read_text()
    records = [json.loads(line) for line in first.read_text().splitlines()]
    assert len({r["id"] for r in records}) == 5
    for record in records:
        assert 1 <= len(record["truth"]) <= 12
        one = load_image(tmp_path / "a" / record["image"])
        other = Image.open(tmp_path / "b" / record["image"])
        assert one.tobytes() == other.convert("RGB").tobytes()
    with pytest.raises(ConfigError, match="count is 0"):
        write_lines(tmp_path / "c", stream, 0)
