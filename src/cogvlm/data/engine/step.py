"""What flows through the engine: samples, what is known of their pictures, and rejects.

A step takes samples and gives samples; what it refuses stays in the flow as a :class:`Reject` with
its reason, so that nothing disappears uncounted.  Knows no file format and no kind of picture.

::

    maker --> sample, sample, reject, sample --> step --> sample, reject, reject, sample --> shard

Boxes are ``(x0, y0, x1, y1)`` in pixels of the picture, from its upper left corner.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image as PILImage

from ...processor.messages import Image, Message, Role, Text
from ..sft.record import Record

Box: TypeAlias = "tuple[float, float, float, float]"
Random = np.random.Generator

_PNG_UP_TO = 64 * 1024  # bytes; a larger picture is written as JPEG
_MARKS = ("<image>", "<video>")  # have a meaning in questions


@dataclass(frozen=True)
class Piece:
    """Something on a picture: its text or name, where it is, and what it is."""

    text: str
    box: Box
    role: str = "word"  # word, line, title, cell, button, field, link, bar, object, ...
    # Of a printed word: the middles of its characters, as shares of the box's width, and of its
    # height the place of the baseline; empty where it is not known.
    middles: tuple[float, ...] = field(default=(), compare=False)
    baseline: float = field(default=1.0, compare=False)


@dataclass(frozen=True)
class Fact:
    """A question that the picture answers: what of what, and its value.

    ``Fact("total", "12.50")`` is the total; ``Fact("price", "1.20", "Milk")`` the price of Milk.
    """

    name: str
    value: str
    of: str = ""


@dataclass(frozen=True)
class Truth:
    """What is known of a picture."""

    text: str = ""  # all of it in reading order
    words: tuple[Piece, ...] = ()
    lines: tuple[Piece, ...] = ()
    items: tuple[Piece, ...] = ()  # things that are not print: buttons, bars, objects, formulae
    facts: tuple[Fact, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()  # the first row names the columns
    caption: str = ""
    extra: dict[str, str] = field(default_factory=dict)  # LaTeX source, ...

    def moved(self, mapping: Callable[[Box], Box]) -> Truth:
        """The same with every box mapped."""

        def mapped(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
            return tuple(replace(p, box=mapping(p.box)) for p in pieces)

        return replace(
            self, words=mapped(self.words), lines=mapped(self.lines), items=mapped(self.items)
        )


@dataclass(frozen=True)
class Picture:
    """The file of a picture and what is known of it."""

    data: bytes  # PNG or JPEG
    size: tuple[int, int]  # width, height in pixels
    truth: Truth = field(default_factory=Truth)

    @classmethod
    def of(cls, image: PILImage.Image, truth: Truth | None = None) -> Picture:
        """Encoded without loss where that is small, else as JPEG of high quality."""
        return cls(encode(image), image.size, truth or Truth())

    @property
    def suffix(self) -> str:
        """Of its file, without the dot."""
        return "png" if self.data.startswith(b"\x89PNG") else "jpg"

    def open(self) -> PILImage.Image:
        """Decoded, as RGB."""
        return PILImage.open(io.BytesIO(self.data)).convert("RGB")


@dataclass(frozen=True)
class Turn:
    """What one side says; ``<image>`` in a user's text is the place of the next picture."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One record in the making."""

    id: str
    kind: str  # page, receipt, chart, screen, ...
    source: str  # name of the source, see sources.py
    licence: str
    pictures: tuple[Picture, ...] = ()
    turns: tuple[Turn, ...] = ()
    tasks: tuple[str, ...] = ()  # what its questions are about, one a question
    seed: int = 0  # of the chance that later steps take for it

    def rng(self, step: str) -> Random:
        """Chance of its own for every step, whatever the steps before it took."""
        return np.random.default_rng((self.seed, *step.encode()))

    def record(self) -> Record:
        """As training reads it."""
        pictures = iter(self.pictures)
        messages = []
        for turn in self.turns:
            parts: list[Text | Image] = []
            pieces = turn.text.split("<image>") if turn.role == "user" else [turn.text]
            for number, piece in enumerate(pieces):
                if number:
                    parts.append(Image(next(pictures).data))
                if piece.strip():
                    parts.append(Text(piece.strip() if len(pieces) > 1 else piece))
            messages.append(Message(turn.role, tuple(parts)))
        return Record(tuple(messages), self.id, self.source, self.id)

    def as_json(self, names: Iterable[str]) -> dict[str, Any]:
        """For the shard; ``names`` are those of its pictures there."""
        plain: dict[str, Any] = {"id": self.id}
        if self.pictures:
            plain["images"] = list(names)
        plain["messages"] = [{"role": t.role, "content": t.text} for t in self.turns]
        plain |= {"kind": self.kind, "source": self.source, "licence": self.licence}
        plain["tasks"] = list(self.tasks)
        plain["truth"] = [truth_as_json(p) for p in self.pictures]
        return plain


@dataclass(frozen=True)
class Reject:
    """A sample that did not come through, and why."""

    id: str
    source: str
    step: str
    reason: str  # a short name; these are counted
    detail: str = ""


Item: TypeAlias = "Sample | Reject"
Step = Callable[[Iterable[Item]], Iterator[Item]]


class Refused(Exception):
    """Raised by the function of a step about its sample: the reason, and more about it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Maker(Protocol):
    """Where samples come from: those of one shard, the same whenever they are asked for."""

    @property
    def endless(self) -> bool:
        """Whether it goes on for as long as it is asked."""

    def items(self, shard: int) -> Iterator[Item]:
        """Samples and rejects of a shard, from its number and the maker's own settings alone."""


@dataclass(frozen=True)
class Each:
    """A step from a function of one sample, which gives it back, several, or :class:`Refused`."""

    name: str
    function: Callable[[Sample], Sample | Iterable[Sample]]

    def __call__(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass on what was refused before, and try the function on the rest."""
        for item in items:
            if isinstance(item, Reject):
                yield item
                continue
            try:
                made = self.function(item)
                yield from (made,) if isinstance(made, Sample) else tuple(made)
            except Refused as refused:
                yield Reject(item.id, item.source, self.name, refused.reason, refused.detail)


def chain(items: Iterable[Item], steps: Iterable[Step]) -> Iterator[Item]:
    """One step after another."""
    for step in steps:
        items = step(items)
    return iter(items)


def refuse_marks(text: str) -> str:
    """Text that may stand in a question.

    Raises:
        Refused: it holds what would be taken for the place of a picture.
    """
    if any(mark in text for mark in _MARKS):
        raise Refused("holds a picture mark", text[:40])
    return text


def encode(image: PILImage.Image) -> bytes:
    """PNG, or where that is large JPEG of quality 92."""
    file = io.BytesIO()
    image.save(file, "PNG")
    if file.tell() > _PNG_UP_TO:
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=92)
    return file.getvalue()


# --- JSON --------------------------------------------------------------------------------------


def truth_as_json(picture: Picture) -> dict[str, Any]:
    """What is known of a picture as plain JSON; empty parts are left out."""
    truth = picture.truth
    plain: dict[str, Any] = {"size": list(picture.size)}
    for name in ("words", "lines", "items"):
        pieces: tuple[Piece, ...] = getattr(truth, name)
        if pieces:
            plain[name] = [[p.text, [round(v, 1) for v in p.box], p.role] for p in pieces]
    for name in ("text", "caption"):
        if value := getattr(truth, name):
            plain[name] = value
    if truth.facts:
        plain["facts"] = [[f.name, f.value, f.of] for f in truth.facts]
    if truth.table:
        plain["table"] = [list(row) for row in truth.table]
    if truth.extra:
        plain["extra"] = truth.extra
    return plain


def truth_from_json(plain: dict[str, Any]) -> Truth:
    """The inverse of :func:`truth_as_json`."""

    def pieces(name: str) -> tuple[Piece, ...]:
        return tuple(Piece(text, tuple(box), role) for text, box, role in plain.get(name, ()))

    return Truth(
        plain.get("text", ""),
        pieces("words"),
        pieces("lines"),
        pieces("items"),
        tuple(Fact(*fact) for fact in plain.get("facts", ())),
        tuple(tuple(row) for row in plain.get("table", ())),
        plain.get("caption", ""),
        dict(plain.get("extra", {})),
    )
