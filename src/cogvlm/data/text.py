"""Short lines of text to print: runs of words from real sentences, and made-up strings.

Knows nothing about fonts or pictures. The default material is on every machine: docstrings,
comments and the licence of Python's own standard library. Every line is a pure function of
``(seed, index)``, so a run resumes exactly at any line.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import random
import re
import sysconfig
import unicodedata
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from cogvlm.errors import ConfigError, InputError, ResourceError

PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
MADE_UP = 0.15  # share of lines that are no running text
HELD_OUT = 0.1  # share of the material that only held-out lines come from
MAX_SOURCE_BYTES = 5_000_000  # of Python source a root may cost: keeps loading within seconds
PACKAGES = ("numpy", "torch", "transformers")  # read on request, where installed

# Tables, tests and generated files: no sentences in them.
_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings")
)
_COMMENT = re.compile(r"^[ \t]*#+[ \t]*([A-Z(].*)$", re.MULTILINE)
_BREAK = re.compile(r"\n\s*\n")
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:(?=`)")
_ASCII_OF = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2026", "''\"\"--.")

Source = tuple[str, tuple[str, ...]]  # name that decides the side, paragraphs


def stable_fraction(name: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on ``name`` and ``seed`` only, on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def clean_words(text: str) -> list[str]:
    """Words of ``text`` in printable ASCII, without markup and rules such as ``=====``."""
    text = _ROLE.sub("", text.translate(_ASCII_OF)).replace("``", "")
    words = unicodedata.normalize("NFKC", text).split()
    return [w for w in words if w.isascii() and w.isprintable() and _is_word(w)]


def _is_word(word: str) -> bool:
    return len(word) <= 2 or any(c.isalnum() for c in word)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Strings that stand alone as statements, and the values of tables of texts."""
    open_: list[ast.stmt] = list(tree.body)
    while open_:
        node = open_.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            open_ += node.body
        elif isinstance(node, ast.Expr):
            yield from _long_strings([node.value], 1)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from _long_strings(node.value.values, 200)


def _long_strings(nodes: Sequence[ast.expr], at_least: int) -> Iterator[str]:
    for node in nodes:
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and len(text) >= at_least:
            yield text


def _python_paragraphs(path: Path) -> Iterator[str]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return  # a template or a file in another encoding: there are enough others
    for text in _docstrings(tree):
        yield from _BREAK.split(text)
    yield from _COMMENT.findall(source)


def _python_sources(root: Path, prefix: str) -> list[Source]:
    """The modules under ``root``, each a source of its own, up to the budget."""
    names: list[str] = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED]  # not even entered
        place = Path(folder).relative_to(root)
        names += [(place / name).as_posix() for name in files if name.endswith(".py")]
    # Hash order: a budget then takes a fair sample, the same one on every machine.
    names.sort(key=stable_fraction)
    sources: list[Source] = []
    spent = 0
    for name in names:
        spent += (root / name).stat().st_size
        if spent > MAX_SOURCE_BYTES:
            break
        module = prefix + name.removesuffix(".py").replace("/", ".")
        sources.append((module, tuple(_python_paragraphs(root / name))))
    return sources


def _library_sources(packages: tuple[str, ...]) -> list[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = _python_sources(root, "") if root.is_dir() else []
    licence = root / "LICENSE.txt"
    if licence.is_file():
        text = licence.read_text(encoding="utf-8", errors="replace")
        sources.append(("LICENSE", tuple(_BREAK.split(text))))
    for name in packages:
        spec = importlib.util.find_spec(name)  # of a top-level name: imports nothing
        if spec is not None and spec.origin is not None:
            sources += _python_sources(Path(spec.origin).parent, name + ".")
    return sources


def _file_sources(files: Sequence[Path | str]) -> Iterator[Source]:
    """One source a paragraph: a single file then still has both sides."""
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"text file {str(file)!r} cannot be read: {error.strerror}") from error
        for paragraph in _BREAK.split(text):
            yield " ".join(paragraph.split()), (paragraph,)


def split_sources(sources: Sequence[Source]) -> tuple[list[list[str]], list[list[str]]]:
    """Cleaned paragraphs of both sides: ``(train, held_out)``, each a list of words.

    A paragraph that stands in sources of both sides counts as training text only.
    """
    train: dict[tuple[str, ...], None] = {}
    held: dict[tuple[str, ...], None] = {}
    for name, paragraphs in sources:
        side = held if stable_fraction(name) < HELD_OUT else train
        for paragraph in paragraphs:
            words = clean_words(paragraph)
            if words:
                side[tuple(words)] = None
    return [list(w) for w in train], [list(w) for w in held if w not in train]


@lru_cache(maxsize=2)
def _library_sides(packages: tuple[str, ...]) -> tuple[list[list[str]], list[list[str]]]:
    """Both sides of the library: a training run asks for each, and reading takes seconds."""
    return split_sources(_library_sources(packages))


class LineText:
    """Lines of printable ASCII: no blank at either end, single blanks inside.

    Most lines are consecutive words of one paragraph; :data:`MADE_UP` of them are numbers, dates,
    codes, addresses and the like, so that every printable character occurs.

    Args:
        files: text files (UTF-8) to read; without, the standard library of this Python.
        seed: chooses the lines.
        min_chars: shortest line, at least 1.
        max_chars: longest line.
        held_out: lines from the other, disjoint part of the material (see :func:`split_sources`).
        installed: also read the docstrings of :data:`PACKAGES` that are installed.

    Raises:
        ConfigError: impossible lengths.
        InputError: a file cannot be read, or this side of the material has no words.
        ResourceError: this Python ships without its sources.
    """

    def __init__(
        self,
        files: Sequence[Path | str] | None = None,
        seed: int = 0,
        min_chars: int = 1,
        max_chars: int = 24,
        *,
        held_out: bool = False,
        installed: bool = False,
    ) -> None:
        if not 1 <= min_chars <= max_chars:
            raise ConfigError(
                f"line lengths {min_chars}..{max_chars}: need 1 <= min_chars <= max_chars"
            )
        self.seed, self.min_chars, self.max_chars = seed, min_chars, max_chars
        self.held_out = held_out
        if files is None:
            paragraphs = _library_sides(PACKAGES if installed else ())[held_out]
        else:
            paragraphs = split_sources(list(_file_sources(files)))[held_out]
        self._words = [word for words in paragraphs for word in words]
        self._ends = array("l")  # index one past the paragraph of each word
        for words in paragraphs:
            self._ends.extend([len(self._ends) + len(words)] * len(words))
        self._plain = [w for w in dict.fromkeys(self._words) if w.isalpha()]
        if not self._plain:
            if files is None:
                raise ResourceError(
                    "this Python has no standard-library sources to take text from; pass files="
                )
            side = "held-out" if held_out else "training"
            raise InputError(
                f"{len(files)} text files: no words on the {side} side; name more text"
            )

    def __iter__(self) -> Iterator[str]:
        """Lines 0, 1, 2, ... without end."""
        index = 0
        while True:
            yield self.at(index)
            index += 1

    def at(self, index: int) -> str:
        """Line ``index``: depends on the material, the seed and the index only."""
        rng = random.Random((self.seed << 64) + (index << 1) + self.held_out)
        room = rng.randint(self.min_chars, self.max_chars)
        if rng.random() >= MADE_UP:
            for _ in range(8):
                line = self._run(rng, room)
                if self.min_chars <= len(line):
                    return line
        line = rng.choice(_KINDS)(rng, self, room)[: self.max_chars].strip()
        if len(line) >= self.min_chars:
            return line
        return "".join(rng.choices(_CODE, k=room))

    def _run(self, rng: random.Random, room: int) -> str:
        """Consecutive words from a random one on, within ``room``; "" if the first is longer."""
        start = int(rng.random() * len(self._words))
        length, stop = -1, start
        while stop < self._ends[start]:
            length += 1 + len(self._words[stop])
            if length > room:
                break
            stop += 1
        return " ".join(self._words[start:stop])

    def word(self, rng: random.Random) -> str:
        """A word of letters only, each distinct word equally likely."""
        return rng.choice(self._plain)

    def running(self, rng: random.Random, room: int) -> str:
        """Running text, or one word where a long word stands in the way."""
        return self._run(rng, room) or self.word(rng)


# Each makes a string of about ``room`` characters; LineText.at() cuts what is too long.
_Maker = Callable[[random.Random, LineText, int], str]
_CODE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


def _number(rng: random.Random, text: LineText, room: int) -> str:
    value = rng.randrange(10 ** rng.randint(1, 9))
    forms = ("{:d}", "{:,d}", "-{:d}", "+{:d}", "{:d}%", "{:05d}", "({:,d})", "#{:d}", "{:d}/100")
    if rng.random() < 0.3:
        return f"{value / 10 ** rng.randint(1, 5):.{rng.randint(1, 3)}f}"
    return rng.choice(forms).format(value)


def _date(rng: random.Random, text: LineText, room: int) -> str:
    y, m, d = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    month = _MONTHS[m - 1]
    return rng.choice(
        (f"{y}-{m:02}-{d:02}", f"{d:02}/{m:02}/{y}", f"{d}.{m}.{y}", f"{month} {d}, {y}",
         f"{d} {month[:3]} {y}", f"{month[:3]} {y}", f"{m}/{d}/{y % 100:02}", f"{y}-{y + 1}")
    )  # fmt: skip


def _time(rng: random.Random, text: LineText, room: int) -> str:
    h, m, s = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    half = rng.choice(("AM", "PM", "am", "p.m."))
    return rng.choice((f"{h}:{m:02}", f"{h:02}:{m:02}:{s:02}", f"{h % 12 or 12}:{m:02} {half}"))


def _price(rng: random.Random, text: LineText, room: int) -> str:
    value = rng.randrange(1, 10 ** rng.randint(2, 7)) / 100
    forms = ("${:,.2f}", "{:.2f} EUR", "USD {:,.2f}", "-{:.2f}", "{:.2f}*", "${:.0f}", "@ {:.2f}")
    return rng.choice(forms).format(value)


def _code(rng: random.Random, text: LineText, room: int) -> str:
    if rng.random() < 0.25:
        return f"{rng.choice(('#', '0x', ''))}{rng.getrandbits(32):0{rng.choice((6, 8))}x}"
    alphabet = rng.choice((_CODE, _CODE, _CODE.lower(), _CODE + _CODE.lower(), "0123456789"))
    size = rng.randint(2, 6)
    groups = ["".join(rng.choices(alphabet, k=size)) for _ in range(max(1, room // (size + 1)))]
    return rng.choice(("-", " ", "", ".", "/", "_")).join(groups)


def _address(rng: random.Random, text: LineText, room: int) -> str:
    a, b, c = (text.word(rng).lower()[:9] for _ in range(3))
    end = rng.choice(("com", "org", "net", "io", "de", "co.uk"))
    return rng.choice(
        (f"{a}@{b}.{end}", f"{a}.{b}@{c}.{end}", f"{a}{rng.randrange(100)}@{b}.{end}",
         f"www.{a}.{end}", f"https://{a}.{end}/{b}", f"/{a}/{b}/{c}.txt", f"C:\\{a}\\{b}.exe",
         f"~/{a}/{b}.py", f"{a}_{b}?{c}={rng.randrange(99)}&x", f"@{a}_{b}")
    )  # fmt: skip


def _phone(rng: random.Random, text: LineText, room: int) -> str:
    a, b, c = rng.randrange(100, 1000), rng.randrange(100, 1000), rng.randrange(10000)
    return rng.choice(
        (f"({a}) {b}-{c:04}", f"+{rng.randrange(1, 99)} {a} {b} {c:04}", f"{a}-{b}-{c:04}",
         f"0{a} / {b}{c:04}")
    )  # fmt: skip


def _title(rng: random.Random, text: LineText, room: int) -> str:
    return " ".join(w[:1].upper() + w[1:] for w in text.running(rng, room).split())


def _capitals(rng: random.Random, text: LineText, room: int) -> str:
    return text.running(rng, room).upper()


def _shuffled(rng: random.Random, text: LineText, room: int) -> str:
    """Unrelated words: the reader cannot guess the next one."""
    line = text.word(rng)
    while len(longer := f"{line} {text.word(rng)}") <= room:
        line = longer
    return line


def _punctuated(rng: random.Random, text: LineText, room: int) -> str:
    a, b, n = text.word(rng), text.word(rng).lower(), rng.randrange(1000)
    return rng.choice(
        (f'"{a}"', f"'{a}'", f"({a} {b})", f"[{n}] {a}", f"{{{b}: {n}}}", f"<{b}>", f"{a}!",
         f"{a}?", f"{b}[{n}] += {n % 7};", f"{b} = {n} * x^2", f"{b}({n}, '{a[:4]}')", f"`{b}`",
         f"{a} & {b}", f"{a} | {b}", f"~{n}", f"{a}: {n}", f"{a}; {b}", f"* {a}", f"{a}...",
         f"if {b} >= {n}:", f"{b} < {n}", f"$ {b} -{b[:1]} | {a[:5]}", f"{n}) {a}", f"% {a} %")
    )  # fmt: skip


def _signs(rng: random.Random, text: LineText, room: int) -> str:
    return "".join(rng.choices(PRINTABLE[1:], k=min(room, 12)))


_KINDS: tuple[_Maker, ...] = (
    _number, _date, _time, _price, _code, _address, _phone, _title, _capitals, _shuffled,
    _shuffled, _punctuated, _punctuated, _signs,
)  # fmt: skip


def library_paragraphs(held_out: bool = False) -> list[list[str]]:
    """Cleaned paragraphs of Python's standard library, each a list of words; one side of two.

    Raises:
        ResourceError: this Python ships without its sources.
    """
    found = _library_sides(())[held_out]
    if not found:
        raise ResourceError("this Python has no standard-library sources; name files of text")
    return found
