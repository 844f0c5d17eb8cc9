"""Text: printable lines of the asked length, every character, clean held-out side."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from cogvlm.data.text import PRINTABLE, LineText, clean_words, split_sources, stable_fraction
from cogvlm.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def train() -> LineText:
    return LineText(seed=5)


@pytest.fixture(scope="module")
def held() -> LineText:
    return LineText(seed=5, held_out=True)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """300 paragraphs of 6 distinct words."""
    file = tmp_path / "book.txt"
    paragraphs = [" ".join(f"{a}{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10 % 10]}{'uvw'[n // 100]}"
                           for a in ("one", "two", "six", "ten", "red", "sky"))
                  for n in range(300)]  # fmt: skip
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return file


def test_lines_are_clean_and_hold_every_character(train: LineText) -> None:
    lines = list(islice(train, 6000))
    for line in lines:
        assert 1 <= len(line) <= 24
        assert line == " ".join(line.split())
    counts = Counter("".join(lines))
    assert set(counts) == set(PRINTABLE)
    assert min(counts.values()) >= 5
    assert len(set(lines)) > 3000
    lengths = Counter(map(len, lines))
    assert all(lengths[n] > 20 for n in range(1, 25))


@pytest.mark.parametrize(("low", "high"), [(1, 1), (3, 5), (20, 24), (40, 40), (2, 120)])
def test_lengths_are_kept(low: int, high: int) -> None:
    text = LineText(min_chars=low, max_chars=high)
    for line in islice(text, 300):
        assert low <= len(line) <= high
        assert line == line.strip()


def test_a_line_depends_on_seed_and_index_only(train: LineText) -> None:
    again = LineText(seed=5)
    assert [train.at(n) for n in (70, 3, 70)] == [again.at(n) for n in (70, 3, 70)]
    assert list(islice(train, 50)) == [again.at(n) for n in range(50)]
    other = LineText(seed=6)
    assert sum(train.at(n) == other.at(n) for n in range(200)) < 30


def test_most_lines_are_running_text(book: Path) -> None:
    text = LineText([book], min_chars=5)
    known = " ".join(book.read_text(encoding="utf-8").split())
    share = sum(line in known for line in islice(text, 2000)) / 2000
    assert 0.8 < share < 0.95


def test_runs_do_not_cross_paragraphs(book: Path) -> None:
    text = LineText([book], min_chars=5, max_chars=60)
    starts = [text._words[0]] + [text._words[n] for n in text._ends[:-1] if n < len(text._words)]
    assert {word[:3] for word in starts} == {"one"}  # _ends points at the next paragraph
    paragraphs = book.read_text(encoding="utf-8").split("\n\n")
    runs = [line for line in islice(text, 500) if line.split()[0][:3] == "sky"]
    assert runs
    assert all(" " not in run for run in runs if any(p.endswith(run) for p in paragraphs))


def test_sides_share_no_paragraph(train: LineText, held: LineText) -> None:
    def paragraphs(text: LineText) -> set[tuple[str, ...]]:
        ends = sorted(set(text._ends))
        return {tuple(text._words[a:b]) for a, b in zip([0, *ends], ends, strict=False)}

    one, other = paragraphs(train), paragraphs(held)
    assert len(one) > 1000 and len(other) > 100
    assert not one & other


def test_a_file_is_split_by_paragraph(book: Path) -> None:
    one, other = LineText([book]), LineText([book], held_out=True)
    assert not set(one._words) & set(other._words)
    assert len(one._words) + len(other._words) == 1800
    assert 0.04 < len(other._words) / 1800 < 0.2


def test_shared_paragraphs_are_training_text() -> None:
    held_name = next(f"m{n}" for n in range(99) if stable_fraction(f"m{n}") < 0.1)
    train_name = next(f"m{n}" for n in range(99) if stable_fraction(f"m{n}") >= 0.1)
    train, held = split_sources(
        [(held_name, ("both  here", "only held")), (train_name, ("both here",))]
    )
    assert train == [["both", "here"]]
    assert held == [["only", "held"]]


def test_stable_fraction_is_the_same_on_every_machine() -> None:
    assert stable_fraction("asyncio.events") == pytest.approx(0.5505509761185748, abs=1e-12)
    values = [stable_fraction(str(n), 1) for n in range(2000)]
    assert min(values) >= 0 and max(values) < 1
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)


def test_clean_words() -> None:
    text = "See :class:`Foo` \u2014 ``bar`` \u201cquoted\u201d ===== na\u00efve \u4e2d x = 1..."
    assert clean_words(text) == ["See", "`Foo`", "-", "bar", '"quoted"', "x", "=", "1..."]


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_chars"):
        LineText(min_chars=0)
    with pytest.raises(ConfigError, match="min_chars"):
        LineText(min_chars=9, max_chars=8)
    with pytest.raises(InputError, match="cannot be read"):
        LineText([tmp_path / "none.txt"])
    empty = tmp_path / "empty.txt"
    empty.write_text("\u4e2d\u6587 ===\n", encoding="utf-8")
    with pytest.raises(InputError, match="no words"):
        LineText([empty])
