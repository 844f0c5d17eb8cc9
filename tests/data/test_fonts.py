"""Fonts: only text faces, whole design families on one side of the split, fair sampling."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from cogvlm.data.fonts import SIZES, FontFile, FontSampler, _has_anatomy, find_fonts, load, split
from cogvlm.errors import ConfigError, ResourceError


def face(family: str, style: str = "Regular") -> FontFile:
    return FontFile(Path(f"{family}-{style}.ttf"), family, style)


MADE_UP = [face(f"Family{n} Sans", style) for n in range(60) for style in ("Regular", "Bold")]


@pytest.fixture(scope="module")
def fonts() -> list[FontFile]:
    found = find_fonts()
    if not found:
        pytest.skip("this machine has no fonts")
    return found


def test_found_faces_print_every_character(fonts: list[FontFile]) -> None:
    for file in fonts[:: max(1, len(fonts) // 12)]:
        font = load(file.path, 32)
        inks = {bytes(font.getmask(chr(code))) for code in range(0x21, 0x7F)}
        # A face may draw a few signs alike (monospaced quotes), never letters and digits.
        assert len(inks) >= 90, file
        assert font.getlength(" ") > 0


def test_no_symbols_and_no_small_capitals(fonts: list[FontFile]) -> None:
    names = " ".join(f"{f.family} {f.style}" for f in fonts).lower()
    for word in ("symbol", "dingbat", "smallcaps", "initials", "emoji", "d050000l", "thai"):
        assert word not in names


class Capitals:
    """A face without small letters of its own."""

    def __init__(self, font: ImageFont.FreeTypeFont) -> None:
        self.font = font

    def getmask2(self, char: str, **options: str) -> object:
        return self.font.getmask2(char.upper(), **options)


def test_anatomy_refuses_a_face_of_capitals(fonts: list[FontFile]) -> None:
    for file in fonts[:: max(1, len(fonts) // 12)]:
        font = load(file.path, 40)
        assert _has_anatomy(font)
        assert not _has_anatomy(Capitals(font))  # type: ignore[arg-type]


def test_damaged_files_are_passed_over(tmp_path: Path, fonts: list[FontFile]) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(fonts[0].path.read_bytes()[:200])
    (tmp_path / "whole.ttf").write_bytes(fonts[0].path.read_bytes())
    found = find_fonts([tmp_path])
    assert [(f.path.name, f.family) for f in found] == [("whole.ttf", fonts[0].family)]


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        find_fonts([tmp_path / "nowhere"])
    assert find_fonts([tmp_path]) == []
    with pytest.raises(ResourceError, match="cannot be opened"):
        load(tmp_path / "no.ttf", 20)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("DejaVu Sans Mono", "DejaVu Serif"),
        ("Arimo", "Liberation Sans"),
        ("FreeSans", "Nimbus Sans"),
        ("STIX", "STIXGeneral"),
        ("Noto Serif", "Open Sans"),
        ("PT Serif", "PT Mono"),
        ("Hack", "DejaVu Sans"),
    ],
)
def test_kin_share_a_group(one: str, other: str) -> None:
    assert face(one).group == face(other).group


def test_strangers_do_not() -> None:
    names = ["Roboto", "Lato", "Inter", "DejaVu Sans", "Liberation Serif", "C059", "P052", "B612"]
    assert len({face(name).group for name in names}) == len(names)


def test_split_is_by_group_and_about_the_share() -> None:
    train, held = split(MADE_UP, 0.3)
    assert not {f.group for f in train} & {f.group for f in held}
    assert sorted(train + held, key=str) == sorted(MADE_UP, key=str)
    assert 0.15 < len(held) / len(MADE_UP) < 0.45
    assert split(MADE_UP, 0.0)[1] == [] and split(MADE_UP, 1.0)[0] == []
    assert split(MADE_UP, 0.3, seed=1) != (train, held)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split(MADE_UP, 1.5)


def test_split_does_not_depend_on_the_other_fonts() -> None:
    held = set(split(MADE_UP, 0.3)[1])
    for n, font in enumerate(MADE_UP):
        assert split([font], 0.3)[font in held] == [font]
        assert (font in split(MADE_UP[n:], 0.3)[1]) == (font in held)


def test_split_is_the_same_on_every_machine() -> None:
    names = ["Roboto", "Quattrocento", "DejaVu Sans", "Libris ADF Std", "Inter"]
    held = split([face(name) for name in names])[1]
    assert [f.family for f in held] == ["Quattrocento", "Libris ADF Std"]


def test_large_families_do_not_dominate() -> None:
    many = [face("Large Sans", str(n)) for n in range(50)]
    sampler = FontSampler([*many, face("Small Sans")])
    rng = np.random.default_rng(0)
    counts = Counter(sampler.pick(rng).family for _ in range(1000))
    assert 430 < counts["Small Sans"] < 570
    with pytest.raises(ResourceError, match="no usable fonts"):
        FontSampler([])


def test_sampler_is_deterministic_and_bounded(fonts: list[FontFile]) -> None:
    def draw(keep: int, files: list[FontFile]) -> list[tuple[object, float]]:
        sampler, rng = FontSampler(files, keep=keep), np.random.default_rng(3)
        drawn = [sampler.sample(rng) for _ in range(40)]
        assert len(sampler._open) <= keep
        return [(font.path, font.size) for font in drawn]

    assert draw(4, fonts) == draw(100, fonts[::-1])  # neither the cache nor the order matters
    assert {size for _, size in draw(100, fonts)} <= set(SIZES)
    sampler = FontSampler(fonts)
    assert sampler.open(fonts[0], 20) is sampler.open(fonts[0], 20)
