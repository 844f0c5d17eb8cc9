"""Pages of the data engine as training pictures: where every character stands.

The engine knows a box for every word, and of what it printed itself the middle of each character
and the baseline; elsewhere the usual widths of letters must do.  A character's point lies just
above the baseline, on a straight line through the feet of all words of its line: a line of print
that stands straight stays in one row of cells.

Page ``i`` is a pure function of the settings and ``i``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..data.engine.compose import ALL, Compose
from ..data.engine.corpus import read_corpus
from ..data.engine.faces import find_faces
from ..data.engine.pages import Setting
from ..data.engine.questions import PLACES
from ..data.engine.render import Render, choose_kinds
from ..data.engine.step import Item, Picture, Piece, Sample, Truth
from ..errors import ConfigError
from ..processor.image import NativePixels, normalise
from ..processor.lines import LinePixels, turn_points
from .lines import Pixels, Row

_TAILED = frozenset("gjpqyQ()[]{}|/@_$")  # reach well below the baseline
_TALL = frozenset("bdfhklit") | frozenset(map(chr, (*range(0x30, 0x3A), *range(0x41, 0x5B))))
_NARROW, _WIDE = frozenset("iljtf.,:;'!|()[] I1"), frozenset("mwMW@%")


@dataclass(frozen=True)
class PageData:
    """Pages to train on, see ``cogvlm data render``."""

    kinds: str = "paragraph,list,sign,code,table,form,receipt,diagram"
    side: int = 448  # pixels: a page has about as many as a square of this side
    larger: float = 1.7  # print, against the engine's own
    strength: float = 0.4  # of the damage, 0 to 1
    trim: float = 0.8  # chance that empty margins are mostly cut off
    turns: int = 0  # most questions about a page; 0: none are asked
    places: float = 1.0  # chance that places may be among what is asked about a page
    without: tuple[str, ...] = ()  # tasks that are never set, see data/engine/questions.py
    read_first: float = 0.0  # chance that all of the text is asked for before anything else
    reads: float = 1.0  # chance that all of the text, or a caption, may be among what is asked
    printed: bool = False  # of charts, only what is printed is asked for
    per_step: int = 8
    texts: tuple[str, ...] = ()
    fonts: tuple[str, ...] = ()
    workers: int = 1

    def __post_init__(self) -> None:
        if self.per_step < 1:
            raise ConfigError(f"pages: per_step is {self.per_step}; give 1 or more")


@dataclass(frozen=True)
class Block:
    """A part of a page that is an image block of its own, and the text between it and the next."""

    pixels: Pixels  # float32[3, H, W]
    rows: tuple[Row, ...]
    behind: str = ""
    place: str = ""  # of the part of a line that ends here


@dataclass(frozen=True)
class Page:
    """A page of the engine as the model takes it: whole, or cut into lines."""

    sample: Sample
    blocks: tuple[Block, ...]


class Pages(Dataset[Page]):
    """Pages of the engine, scaled by the processor's own rule."""

    def __init__(self, data: PageData, plan: NativePixels, seed: int, held_out: bool) -> None:
        self.data, self.plan, self.seed, self.held_out = data, plan, seed, held_out

    @cached_property
    def maker(self) -> Render:
        """Opened where it is used: in each process."""
        kinds, _ = choose_kinds(self.data.kinds)
        corpus = read_corpus([*map(Path, self.data.texts)], held_out=self.held_out)
        faces = find_faces([*map(Path, self.data.fonts)], held_out=self.held_out)
        # Nano's language model has no Chinese.
        setting = Setting(
            corpus, replace(faces, han=()), self.data.side, self.data.strength, self.held_out,
            self.data.larger,
        )  # fmt: skip
        return Render(setting, kinds, self.seed)

    def __getstate__(self) -> dict[str, object]:
        """Without what is opened."""
        return {k: v for k, v in self.__dict__.items() if k != "maker"}

    def __getitem__(self, index: int) -> Page:
        """Page ``index``; what cannot be spelled in ASCII is passed over."""
        items: Iterable[Item] = map(self._trimmed, self.maker.items(index))
        if self.data.turns:
            places, reads = np.random.default_rng((self.seed, index, 3)).random(2)
            without = set(self.data.without)
            without |= set(PLACES) if places >= self.data.places else set()
            without |= {*ALL, "caption"} if reads >= self.data.reads else set()
            ask = Compose(
                self.data.turns, text_only=0, pairs=0, held_out=self.held_out,
                without=frozenset(without), first=self.data.read_first,
            )  # fmt: skip
            items = ask(items)
        for item in items:
            if isinstance(item, Sample) and all(w.text.isascii() for w in truth_of(item).words):
                return self.page(item)
        raise AssertionError("the maker is endless")

    def page(self, sample: Sample) -> Page:
        """A sample of one picture as the plan takes it."""
        image = sample.pictures[0].open()
        rows = rows_of(truth_of(sample))
        if isinstance(self.plan, LinePixels):
            return Page(sample, tuple(_strips(self.plan, image, rows)))
        return Page(sample, (_block(self.plan, image, rows),))

    def _trimmed(self, item: Item) -> Item:
        if not isinstance(item, Sample):
            return item
        return self.trimmed(only_printed(item) if self.data.printed else item)

    def trimmed(self, sample: Sample) -> Sample:
        """A sample of one picture without the margins that are not shown."""
        x0, y0, x1, y1 = self.frame(sample, np.random.default_rng((sample.seed, 2)))
        picture = sample.pictures[0]
        if (x0, y0, x1, y1) == (0, 0, *picture.size):
            return sample
        truth = picture.truth.moved(lambda b: (b[0] - x0, b[1] - y0, b[2] - x0, b[3] - y0))
        shown = Picture.of(picture.open().crop((x0, y0, x1, y1)), truth)
        return replace(sample, pictures=(shown,))

    def frame(self, sample: Sample, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """The part of a picture that is shown: all, or what is printed with some of the margin."""
        width, height = sample.pictures[0].size
        truth = truth_of(sample)
        boxes = np.array([piece.box for piece in (*truth.words, *truth.items)])
        if rng.random() >= self.data.trim or not len(boxes):
            return 0, 0, width, height
        left, top = boxes[:, :2].min(0) - rng.uniform(4, 40, 2)
        right, bottom = boxes[:, 2:].max(0) + rng.uniform(4, 40, 2)
        low = max(0, math.floor(left)), max(0, math.floor(top))
        return *low, min(width, math.ceil(right)), min(height, math.ceil(bottom))

    def stream(self, start: int, workers: int) -> Iterator[Page]:
        """Pages ``start``, ``start + 1``, ... drawn by ``workers`` processes (0 = here)."""
        loader: DataLoader[Page] = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, start + 100_000_000),
            num_workers=workers,
            prefetch_factor=16 if workers else None,
        )
        yield from loader


def only_printed(sample: Sample) -> Sample:
    """A sample of one picture that knows nothing of a chart but what can be read as text.

    Where a bar stands, and what it stands for without a number beside it, a model that is told the
    lines of a page cannot know: such questions would teach it to guess.
    """
    truth = truth_of(sample)
    if "chart" not in truth.extra:
        return sample
    known = replace(truth, items=())
    words = set(truth.text.replace("%", " ").split())
    if not all(cell in words for row in truth.table[1:] for cell in row[1:]):
        facts = tuple(fact for fact in truth.facts if fact.name == "title")
        known = replace(known, table=(), facts=facts)
    return replace(sample, pictures=(replace(sample.pictures[0], truth=known),))


def truth_of(sample: Sample) -> Truth:
    """What is known of the one picture of a sample."""
    return sample.pictures[0].truth


def _block(
    plan: NativePixels, image: Image.Image, rows: Iterable[Row], behind: str = "", place: str = ""
) -> Block:
    """A picture and its lines on the grid of the plan."""
    high, wide = plan.grid(*image.size)
    width, height = wide * plan.patch, high * plan.patch
    stretch = np.array([width / image.width, height / image.height], np.float32)
    lines = tuple(Row(r.text, r.points * stretch) for r in rows)
    return Block(normalise(image, width, height), lines, behind, place)


def _strips(plan: LinePixels, image: Image.Image, rows: Sequence[Row]) -> Iterator[Block]:
    """The lines of a picture that the plan finds, each character in the strip that it stands in."""
    straight = plan.cut(image)
    size, angle = straight.image.size, straight.angle
    moved = [Row(r.text, turn_points(r.points * straight.scale, size, angle)) for r in rows]
    for piece in straight.pieces:
        x0, y0, x1, y1 = piece.box
        found = []
        for row in moved:
            x, y = row.points.T
            here = np.flatnonzero((x >= x0) & (x < x1) & (y >= y0) & (y < y1))
            if len(here):
                text = "".join(row.text[i] for i in here)
                found.append(Row(text, row.points[here] - np.array([x0, y0], np.float32)))
        yield _block(plan, straight.crop(piece), found, piece.behind, piece.place)


# --- where characters stand --------------------------------------------------------------------


def rows_of(truth: Truth) -> list[Row]:
    """The lines of a picture, each character with its point; blanks stand between words.

    Where a gap is wider than a blank, another line begins.  A word of no line is one of its own.
    """
    words = list(truth.words)
    lines: list[list[Piece]] = []
    at = 0
    for line in truth.lines:
        taken: list[Piece] = []
        for token in line.text.split():
            if at < len(words) and words[at].text == token:
                taken.append(words[at])
                at += 1
            elif token != "|":  # set between the cells of a row of a table
                break
        if taken:
            lines.append(taken)
    lines += [[word] for word in words[at:]]
    return [row for line in lines for row in _split(line)]


def _split(line: Sequence[Piece]) -> list[Row]:
    """A line of words, as one row or, where it has gaps, as several on one slope."""
    em = float(np.median([_em(word) for word in line]))
    middles = np.array([(w.box[0] + w.box[2]) / 2 for w in line])
    feet = np.array([_foot(word, em) for word in line])
    slope = 0.0
    if len(line) > 1 and np.ptp(middles) > 3 * em:
        slope = float(np.polyfit(middles, feet, 1)[0])
    level = float(np.median(feet - slope * middles)) - 0.125 * em
    groups = [[line[0]]]
    for word in line[1:]:
        if word.box[0] - groups[-1][-1].box[2] < 1.2 * em:
            groups[-1].append(word)
        else:
            groups.append([word])
    return [_row(group, level, slope) for group in groups]


def _row(words: Sequence[Piece], level: float, slope: float) -> Row:
    text = " ".join(word.text for word in words)
    xs: list[float] = []
    for number, word in enumerate(words):
        x0, _, x1, _ = word.box
        if number:
            xs.append((words[number - 1].box[2] + x0) / 2)
        shares = word.middles or _usual(word.text)
        xs += [x0 + share * (x1 - x0) for share in shares]
    x = np.array(xs, np.float32)
    return Row(text, np.stack([x, level + slope * x], 1).astype(np.float32))


def _usual(text: str) -> list[float]:
    """Where the characters of a word usually stand, as shares of its width."""
    sizes = np.array([0.5 if c in _NARROW else 1.5 if c in _WIDE else 1.0 for c in text])
    ends = np.cumsum(sizes)
    return list((ends - sizes / 2) / ends[-1])


def _foot(word: Piece, em: float) -> float:
    """The y of a word's baseline."""
    if word.middles:
        return word.box[1] + word.baseline * (word.box[3] - word.box[1])
    return word.box[3] - _tail(word.text) * em


def _tail(text: str) -> float:
    """How far the ink of a word reaches below the baseline, in em."""
    if any(c in _TAILED for c in text):
        return 0.21
    return 0.1 if any(c in ",;" for c in text) else 0.0


def _em(word: Piece) -> float:
    """The size of a word's print, from the height of its ink."""
    above = 0.72 if any(c in _TALL or c in _TAILED - {*"gpqy"} for c in word.text) else 0.5
    return (word.box[3] - word.box[1]) / (above + _tail(word.text))
