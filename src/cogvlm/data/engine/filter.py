"""Which pictures with texts are worth learning from: the published rules, each with its count.

CogVLM left out of LAION-2B and COYO-700M what was broken, unsafe, noisily captioned, and wider or
higher than 6:1 (arXiv 2311.03079, section 3.1).  Which words and thresholds it took is not
published; those here are ours and stated.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from ...errors import ConfigError, InputError
from .records import Records
from .step import Each, Refused, Reject, Sample

LANGUAGES = ("en", "zh")
_HAN = re.compile("[\u3400-\u9fff]")
_OTHER = re.compile("[\u0370-\u1fff\u3040-\u30ff\uac00-\ud7af]")  # Greek to Khmer, Kana, Hangul
_ACCENTED = re.compile("[\u00c0-\u024f]")
_LATIN = re.compile("[A-Za-z]")
_COMMON = frozenset(
    """the of and a an to in is with on for at from by it this that are as was be or his her its
    their has have there two three one no not""".split()  # noqa: SIM905
)
_ADDRESS = re.compile(
    r"https?://|www\.|\b\w+\.(?:com|net|org|jpe?g|png|gif|html?)\b|</?\w+>|&\w+;", re.I
)
_FILE_NAME = re.compile(
    r"^(?:img|dsc|dscn|image|photo|pict?|screenshot|untitled)[\s_-]*\d*\W*$", re.I
)
_BOILERPLATE = re.compile(
    r"click (?:here|to)|image not (?:found|available)|no image|stock (?:photo|image|vector)"
    r"|all rights reserved|\bbuy now\b|free shipping|add to cart|sold out\b|terms of use"
    r"|download (?:free|now)|photo by\b.{0,40}$|点击|下载|包邮|版权所有",
    re.IGNORECASE,
)
_UNSAFE = frozenset(
    """porn porno pornographic nsfw xxx nude nudes naked hentai erotic fetish blowjob cumshot
    escort camgirl bdsm rape raped incest pedophile beheading gore suicide 色情 裸体 成人视频 强奸
    """.split()  # noqa: SIM905
)
_BITS = 64


@dataclass(frozen=True)
class Rules:
    """Thresholds.

    Attributes:
        least_side: Of a picture's shorter side, in pixels.
        aspect: Longer side over shorter, at most.
        languages: Of captions; any where empty.
        least_words: Of a caption; two Chinese signs count as a word.
        most_words: The same.
        unsafe: Words that leave a record out, besides our own list.
        distance: Bits in which the hashes of two pictures may differ that count as one; under 0
            none are compared.

    Raises:
        ConfigError: an impossible value.
    """

    least_side: int = 64
    aspect: float = 6.0
    languages: tuple[str, ...] = LANGUAGES
    least_words: int = 2
    most_words: int = 2000
    unsafe: tuple[str, ...] = ()
    distance: int = 3

    def __post_init__(self) -> None:
        for language in self.languages:
            if language not in LANGUAGES:
                raise ConfigError(
                    f"language {language!r} is not known; known: {', '.join(LANGUAGES)}"
                )
        if self.aspect < 1:
            raise ConfigError(f"aspect is {self.aspect}; give 1 or more")
        if self.distance > 7:
            raise ConfigError(
                f"distance is {self.distance}; more than 7 of {_BITS} bits are no likeness"
            )

    def steps(self) -> tuple[Each, ...]:
        """One step a rule, the cheap ones first."""
        return (
            Each("size", self.size),
            Each("aspect", self.shape),
            Each("unsafe", self.safe),
            Each("language", self.language),
            Each("noise", self.clean),
        )

    def size(self, sample: Sample) -> Sample:
        """Refuse small pictures."""
        for picture in sample.pictures:
            if min(picture.size) < self.least_side:
                raise Refused("too small", "{}x{}".format(*picture.size))
        return sample

    def shape(self, sample: Sample) -> Sample:
        """Refuse very wide and very high pictures."""
        for picture in sample.pictures:
            if max(picture.size) > self.aspect * min(picture.size):
                raise Refused(f"beyond {self.aspect:g}:1", "{}x{}".format(*picture.size))
        return sample

    def safe(self, sample: Sample) -> Sample:
        """Refuse unsafe words, as whole words; Chinese ones anywhere."""
        text = " ".join(t.text for t in sample.turns).lower()
        said = set(re.findall(r"[a-z]+", text))
        for word in sorted(_UNSAFE.union(self.unsafe)):
            if word in said or (not word.isascii() and word in text):
                raise Refused("unsafe word", word)
        return sample

    def language(self, sample: Sample) -> Sample:
        """Refuse answers in other languages."""
        text = _answers(sample)
        if self.languages and (found := language_of(text)) not in self.languages:
            raise Refused(f"language {found}", text[:60])
        return sample

    def clean(self, sample: Sample) -> Sample:
        """Refuse answers that are no sentences about a picture; see :func:`noise`."""
        text = _answers(sample)
        count = len(text.split()) + len(_HAN.findall(text)) // 2
        if not self.least_words <= count <= self.most_words:
            raise Refused("too short" if count < self.least_words else "too long", text[:60])
        if reason := noise(text):
            raise Refused(reason, text[:60])
        return sample


def read_words(path: Path) -> tuple[str, ...]:
    """Words of a file, one a line, lower case.

    Raises:
        InputError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return tuple(sorted({word for line in lines if (word := line.strip().lower())}))


def _answers(sample: Sample) -> str:
    return " ".join(t.text for t in sample.turns if t.role == "assistant")


def language_of(text: str) -> str:
    """``en``, ``zh``, ``other``, or ``none`` where there are no letters.

    >>> [language_of(t) for t in ("A cat on a mat", "一只猫", "Кошка на коврике", "12 34")]
    ['en', 'zh', 'other', 'none']
    """
    han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    other, accented = len(_OTHER.findall(text)), len(_ACCENTED.findall(text))
    letters = han + latin + other + accented
    if not letters:
        return "none"
    if other > 0.2 * letters:
        return "other"
    if han * 2 > latin:  # a sign says as much as several letters
        return "zh"
    words = re.findall(r"[a-z]+", text.lower())
    common = sum(word in _COMMON for word in words)
    # A short caption need not hold a common word of English; a long one without any is none.
    if accented > 0.04 * letters or (len(words) > 12 and common < 0.08 * len(words)):
        return "other"
    return "en"


def noise(text: str) -> str:
    """Why a caption is none; nothing if it may be one.

    >>> noise("IMG_2041.jpg"), noise("dog dog dog dog dog"), noise("A dog in the snow")
    ('an address or a file', 'repeats itself', '')
    """
    if _ADDRESS.search(text):
        return "an address or a file"
    if _FILE_NAME.match(text.strip()):
        return "a file name"
    if _BOILERPLATE.search(text):
        return "boilerplate"
    letters = len(_LATIN.findall(text)) + len(_HAN.findall(text)) + len(_ACCENTED.findall(text))
    if letters < 0.5 * len("".join(text.split())):
        return "mostly digits and signs"
    words = text.lower().split()
    if len(words) >= 4 and len(set(words)) < 0.4 * len(words) ** 0.9:
        return "repeats itself"
    return ""


# --- near-duplicates ---------------------------------------------------------------------------


def picture_hash(image: PILImage.Image) -> int:
    """64 bits: whether each of 8x8 places of a small grey copy is lighter than the one beside it.

    The difference hash; insensitive to size, quality and brightness.
    """
    grey = image.convert("L").resize((9, 8), PILImage.Resampling.BOX)
    pixels = np.asarray(grey, np.int16)
    bits = (pixels[:, 1:] > pixels[:, :-1]).ravel()
    return int("".join("01"[int(b)] for b in bits), 2)


class Seen:
    """Hashes met so far; finds one within ``distance`` bits.

    With ``distance`` + 1 bands, two hashes that near agree in one band at least, so only those are
    compared.
    """

    def __init__(self, distance: int) -> None:
        self.distance, self.bands = distance, distance + 1
        self.width = -(-_BITS // self.bands)
        self.tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(self.bands)]

    def add(self, value: int) -> bool:
        """Remember a hash; whether one near it was there before."""
        keys = [(value >> (i * self.width)) & ((1 << self.width) - 1) for i in range(self.bands)]
        for table, key in zip(self.tables, keys, strict=True):
            if any((value ^ other).bit_count() <= self.distance for other in table.get(key, ())):
                return True
        for table, key in zip(self.tables, keys, strict=True):
            table[key].append(value)
        return False


def duplicates(records: Records, distance: int) -> Iterator[tuple[int, bool]]:
    """Go through all records in their order: place, and whether an earlier picture is like it.

    Flat pictures, whose hash says nothing, are never alike.  Only the first picture counts.
    """
    seen = Seen(distance)
    for index in range(len(records)):
        item = records.item(index)
        if isinstance(item, Reject) or not item.pictures:
            yield index, False
            continue
        value = picture_hash(item.pictures[0].open())
        yield index, 4 <= value.bit_count() <= _BITS - 4 and seen.add(value)
