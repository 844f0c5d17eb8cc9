"""Running text to put on pages: from the user's files, or from what every machine has.

English and what else is printable ASCII, and Chinese; a paragraph is the one or the other.  Knows
nothing about fonts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import InputError, ResourceError
from ..text import HELD_OUT, clean_words, library_paragraphs, stable_fraction
from .step import Random
from .words import listed

KEYS = ("text", "content", "caption", "body")
"""Where the text of a record of JSON lines or parquet stands; the first that is there."""

_HAN = re.compile("[\u4e00-\u9fff]")
_NOT_HAN = re.compile("[^\u4e00-\u9fff\u3000-\u3011\uff01-\uff1f\u2014\u2026\x20-\x7e]+")
_NEVER_LAST = frozenset(
    [
        "a",
        "an",
        "and",
        "as",
        "at",
        "by",
        "for",
        "from",
        "if",
        "in",
        "is",
        "of",
        "on",
        "or",
        "that",
        "the",
        "to",
        "with",
    ]
)
_LEAST = 4  # words of a paragraph
_MOST = 200_000  # paragraphs that are kept in memory

# Our own sentences, for machines without Chinese texts: subject, when, what.
_ZH_WHO = listed(
    """
    我们, 老师, 学生, 医生, 朋友, 孩子, 爸爸, 妈妈,
    司机, 客人, 邻居, 工程师, 记者, 作家, 老板, 同事
    """
)
_ZH_WHEN = listed(
    """
    今天, 昨天, 明天早上, 下午三点, 星期六, 每天晚上, 春天,
    去年冬天, 下个月, 周末, 刚才, 中午, 八月二日
    """
)
_ZH_WHERE = listed(
    """
    在学校, 在家里, 在北京, 在图书馆, 在火车站,
    在公园, 在商店, 在海边, 在办公室, 在医院
    """
)
_ZH_WHAT = listed(
    """
    看了一本新书, 买了三斤苹果, 写完了报告, 等一位老朋友, 喝了一杯绿茶, 学习开车,
    打扫房间, 唱歌跳舞, 修理自行车, 准备晚饭, 寄出两封信, 拍了很多照片,
    开会讨论计划, 参观博物馆,
    测量水的温度, 画一幅山水画
    """
)


@dataclass(frozen=True)
class Corpus:
    """Paragraphs of text.

    Attributes:
        latin: Paragraphs of printable ASCII.
        han: Paragraphs of Chinese.
        source: Where they are from.
        licence: Under which terms.
    """

    latin: tuple[str, ...]
    han: tuple[str, ...]
    source: str
    licence: str

    @cached_property
    def key(self) -> str:
        """A hash of all of it."""
        sha = hashlib.sha256()
        for text in (*self.latin, "", *self.han):
            sha.update(text.encode() + b"\n")
        return sha.hexdigest()[:16]

    def paragraph(self, rng: Random, most: int = 400, han: bool = False) -> str:
        """A paragraph of at most about ``most`` characters, cut between words."""
        if han:
            return _cut_han(self.han[int(rng.integers(len(self.han)))], most)
        words = self.latin[int(rng.integers(len(self.latin)))].split(" ")
        length = -1
        for number, word in enumerate(words):
            length += 1 + len(word)
            if length > most:
                return " ".join(words[:number]) or word[:most]
        return " ".join(words)

    def text(self, rng: Random, most: int, han: bool = False) -> str:
        """Paragraphs joined up to about ``most`` characters."""
        found = self.paragraph(rng, most, han)
        while len(found) < 0.6 * most:
            found += ("" if han else " ") + self.paragraph(rng, most - len(found), han)
        return found

    def phrase(self, rng: Random, words: int, han: bool = False) -> str:
        """A few consecutive words, as a heading or label; without stops at its ends."""
        if han:
            return self.paragraph(rng, 3 * words + 2, True).rstrip("。，；：、？！,. ")
        found = self.latin[int(rng.integers(len(self.latin)))].split(" ")
        # Where a sentence begins a phrase makes more sense than elsewhere.
        start = int(rng.integers(max(1, len(found) - words + 1))) if rng.random() < 0.4 else 0
        part = found[start : start + words]
        while len(part) > 1 and part[-1].lower() in _NEVER_LAST:
            part.pop()
        return " ".join(part).strip(".,;:!?\"'()[]{}*`-= ") or "Notes"


def _cut_han(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    stop = max(text.rfind(sign, 0, most) for sign in "。，；")
    return text[: stop + 1] if stop > 0 else text[:most]


def read_corpus(files: Sequence[Path] = (), *, held_out: bool = False, licence: str = "") -> Corpus:
    """Text from files (``.txt``, ``.jsonl``, ``.parquet``), or the standard library of Python.

    Args:
        files: UTF-8; JSON lines and parquet have their text under one of :data:`KEYS`.
        held_out: paragraphs that training never sees, one in ten, instead of the others.
        licence: of the files, for the record.

    Raises:
        InputError: a file cannot be read, or there is no text in them.
        ResourceError: parquet without its library, or a Python without its sources.
    """
    if not files:
        english = tuple(" ".join(w) for w in library_paragraphs(held_out) if len(w) >= _LEAST)
        return Corpus(english, _made_up_han(held_out), "python-stdlib", "PSF-2.0")
    latin: dict[str, None] = {}
    han: dict[str, None] = {}
    for text in (t for file in files for t in _texts(Path(file))):
        for paragraph in re.split(r"\n\s*\n", text):
            if (stable_fraction(" ".join(paragraph.split())) < HELD_OUT) != held_out:
                continue
            if len(_HAN.findall(paragraph)) * 3 > len(paragraph):
                if len(kept := _NOT_HAN.sub("", "".join(paragraph.split()))) >= _LEAST:
                    han[kept] = None
            elif len(words := clean_words(paragraph)) >= _LEAST:
                latin[" ".join(words)] = None
        if len(latin) + len(han) > _MOST:
            break
    if not latin and not han:
        side = "held-out" if held_out else "training"
        raise InputError(f"{len(files)} text files: no paragraph on the {side} side; name more")
    names = "+".join(sorted({file.stem for file in files}))[:80]
    # A set of one language alone still has pages of the other, from what every machine has.
    if not latin:
        latin = dict.fromkeys(" ".join(w) for w in library_paragraphs(held_out))
    return Corpus(
        tuple(latin), tuple(han) or _made_up_han(held_out), names, licence or "as the text files"
    )


def _made_up_han(held_out: bool) -> tuple[str, ...]:
    made = []
    for number in range(400):
        one = []
        for k in range(1 + number % 4):
            n = number * 7919 + k * 104729
            one.append(
                _ZH_WHO[n % 16] + _ZH_WHEN[n // 16 % 13] + _ZH_WHERE[n // 208 % 10]
                + _ZH_WHAT[n // 2080 % 16] + "，。；"[k % 3 if k < number % 4 else 1]
            )  # fmt: skip
        made.append("".join(one))
    return tuple(t for t in made if (stable_fraction(t) < HELD_OUT) == held_out)


def _texts(path: Path) -> Iterator[str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _field(json.loads(line), f"{path}:{number}")
        elif suffix in (".txt", ".md", ".rst", ""):
            yield path.read_text(encoding="utf-8-sig")
        else:
            raise InputError(f"{path}: {suffix} is not known; give .txt, .jsonl or .parquet")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON ({error.msg})") from None


def _field(values: Any, where: str) -> str:
    if isinstance(values, dict):
        for key in KEYS:
            if isinstance(values.get(key), str):
                return str(values[key])
    raise InputError(f"{where}: no text under any of {', '.join(map(repr, KEYS))}")


def _parquet(path: Path) -> Iterator[str]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise ResourceError(f"{path}: pyarrow reads it; pip install 'cogvlm[data]'") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # Arrow raises nearly anything on broken files
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    key = next((k for k in KEYS if k in file.schema_arrow.names), None)
    if key is None:
        raise InputError(f"{path}: no column {', '.join(map(repr, KEYS))}")
    for batch in file.iter_batches(columns=[key]):
        yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str))
