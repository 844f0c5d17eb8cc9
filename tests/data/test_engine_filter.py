"""The rules of filtering, each with what it refuses and what it lets through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cogvlm.cli import app
from cogvlm.data.engine.filter import Rules, Seen, language_of, noise, picture_hash
from cogvlm.errors import ConfigError


def photo(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Something with large shapes, as photographs have."""
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return grid.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """One good record and one for every rule."""
    folder = tmp_path / "in"
    folder.mkdir()
    photo(1).save(folder / "good.png")
    photo(1).resize((200, 170)).save(folder / "double.jpg", quality=60)
    photo(2, (40, 80)).save(folder / "small.png")
    photo(3, (700, 80)).save(folder / "wide.png")
    names = ("russian", "french", "address", "name", "repeat", "short", "unsafe", "own", "digits",
             "buy", "chinese", "broken")  # fmt: skip
    for number, name in enumerate(names, 10):
        photo(number).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    texts = {
        "good": "A small boat on the river.",
        "double": "The same boat again.",
        "small": "A small picture of a boat.",
        "wide": "A wide picture of a boat.",
        "russian": "Лодка на реке вечером",
        "french": "Une journée d'été à la plage près de l'océan",
        "address": "see www.boats.com for more",
        "name": "IMG_0042",
        "repeat": "boat boat boat boat boat",
        "short": "boat",
        "unsafe": "an nsfw picture",
        "own": "a forbidden thing",
        "digits": "42 17 9 8 1200 44 7 x",
        "buy": "Boat, stock photo of the sea",
        "chinese": "河上的一条小船",
        "broken": "A picture that is cut off.",
    }
    with (folder / "labels.jsonl").open("w") as file:
        for name, text in texts.items():
            suffix = "jpg" if name == "double" else "png"
            file.write(
                json.dumps({"id": name, "image": f"{name}.{suffix}", "caption": text}) + "\n"
            )
    return folder


def test_every_rule_refuses_its_own_and_is_counted(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("forbidden\n\n")
    out = tmp_path / "out"
    arguments = ["data", "filter", str(out), str(pictures), "--unsafe", str(tmp_path / "words.txt")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "rejects/00000.jsonl").read_text().splitlines()]
    why = {row["id"].rpartition("/")[2]: (row["step"], row["reason"]) for row in rows}
    broken = next(key for key in why if "labels.jsonl" in key)
    assert why.pop(broken) == ("read", "unusable")
    assert why == {
        "double": ("duplicate", "like another picture"),
        "small": ("size", "too small"),
        "wide": ("aspect", "beyond 6:1"),
        "russian": ("language", "language other"),
        "french": ("language", "language other"),
        "address": ("noise", "an address or a file"),
        "name": ("noise", "too short"),
        "repeat": ("noise", "repeats itself"),
        "short": ("noise", "too short"),
        "unsafe": ("unsafe", "unsafe word"),
        "own": ("unsafe", "unsafe word"),
        "digits": ("noise", "mostly digits and signs"),
        "buy": ("noise", "boilerplate"),
    }
    index = json.loads((out / "index.json").read_text())
    assert index["samples"] == 2
    assert sum(sum(r.values()) for r in index["rejects"].values()) == len(rows)


def test_rules_can_be_loosened(pictures: Path, tmp_path: Path) -> None:
    arguments = ["data", "filter", str(tmp_path / "o"), str(pictures), "--least-side", "8",
                 "--aspect", "20", "--languages", "", "--distance", "-1"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "duplicate" not in result.output and "size" not in result.output
    assert "language" not in result.output


def test_nothing_left_is_an_error_that_says_where_the_reasons_are(
    pictures: Path, tmp_path: Path
) -> None:
    arguments = ["data", "filter", str(tmp_path / "o"), str(pictures), "--least-side", "4000"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "nothing came through" in result.output


def test_impossible_rules_are_refused() -> None:
    for wrong in ({"languages": ("de",)}, {"aspect": 0.5}, {"distance": 9}):
        with pytest.raises(ConfigError):
            Rules(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Two dogs and a cat", "en"),
        ("Kittens", "en"),
        ("Der Hund liegt auf dem Sofa und schläft für eine Weile", "other"),
        (
            "el perro corre por la playa con su dueno mientras las olas rompen cerca del muelle",
            "other",
        ),
        ("红色的 Toyota 汽车", "zh"),
        ("これは猫です", "other"),
        ("12:30", "none"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language


def test_plain_captions_are_no_noise() -> None:
    for text in (
        "A dog in the snow",
        "Bus 42 at the stop",
        "A sign that says STOP",
        "一只猫在桌子上",
    ):
        assert noise(text) == ""


def test_hashes_of_copies_are_near_and_of_others_far() -> None:
    base = picture_hash(photo(1, (300, 240)))
    near = picture_hash(photo(1, (300, 240)).resize((123, 77)).point(lambda v: v * 0.8))
    assert (base ^ near).bit_count() <= 3
    others = [(base ^ picture_hash(photo(seed, (300, 240)))).bit_count() for seed in range(2, 30)]
    assert min(others) > 7


def test_seen_finds_all_within_the_distance_and_no_others() -> None:
    rng = np.random.default_rng(0)
    for distance in (0, 1, 3, 5):
        seen = Seen(distance)
        value = int(rng.integers(2**63))
        assert not seen.add(value)
        for _ in range(50):
            bits = rng.permutation(64)[: int(rng.integers(0, 9))]
            other = value
            for bit in bits:
                other ^= 1 << int(bit)
            found = seen.add(other)
            if len(bits) <= distance:
                assert found
            elif not found:
                seen = Seen(distance)
                seen.add(value)
