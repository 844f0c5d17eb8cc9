"""Conversations about a page, told in the words in which it was read.

A language model that is given a text sees nothing else: an answer that mends what was misread, or
tells a place that was not told, teaches it to make things up.  So answers quote what was read, and
questions that cannot be answered from it are left out::

    printed   Milk   1.20        What is the price of Milk?   1.20
    read      Nilk   I.20        What is the price of Milk?   I.20
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

from ..data.engine.step import Sample, Turn
from ..processor.lines import joined
from ..score import boxes, common, iou
from .ctc import text_of
from .pages import Block

_IMAGE = "<image>\n"  # before the first question
_PLACE = re.compile(r"\[\[\d+,\d+,\d+,\d+\]\]")
MARKS = "\"'.,;:?!"  # what may stand around a word that is quoted
_LOST = 0.2  # share of an answer's words
_ALIKE = 0.6  # of two texts, to be taken for one


@dataclass(frozen=True)
class Reading:
    """What a language model is told of a page."""

    text: str  # as it is written out
    places: tuple[str, ...] = ()  # "[[x0,y0,x1,y1]]" of the parts of lines
    otherwise: dict[str, str] = field(default_factory=dict)  # words -> as they were read
    lost: frozenset[str] = frozenset()  # words that stand on the page and were not read

    @classmethod
    def of(cls, blocks: Sequence[Block], texts: Sequence[str]) -> Reading:
        """Of a page's strips, each with its text."""
        truth = [word for block in blocks for word in text_of(block).split()]
        read = [word for text in texts for word in text.split()]
        otherwise = as_read(truth, read)
        lost = {word for word in truth if word not in otherwise} - {*read}
        places = (block.place for block, text in zip(blocks, texts, strict=True) if text)
        text = joined(texts, [block.behind for block in blocks])
        return cls(text, tuple(filter(None, places)), otherwise, frozenset(lost))

    def conversation(self, sample: Sample) -> Sample:
        """The sample with the turns that can be answered, the answers quoting what was read."""
        turns: list[Turn] = []
        tasks = sample.tasks or ("",) * (len(sample.turns) // 2)
        for task, question, answer in zip(
            tasks, sample.turns[::2], sample.turns[1::2], strict=True
        ):
            said = self.answer(task, answer.text)
            if said is None:
                continue
            asked = question.text.removeprefix(_IMAGE)
            turns.append(replace(question, text=asked if turns else _IMAGE + asked))
            turns.append(replace(answer, text=said))
        return replace(sample, turns=tuple(turns or sample.turns[:2]))

    def answer(self, task: str, text: str) -> str | None:
        """An answer in the words that were read; none where it cannot be known.

        >>> reading = Reading("Nilk 2 3", otherwise={"Milk": "Nilk"}, lost=frozenset({"Bread"}))
        >>> reading.answer("next word", 'The first word is "Milk".')
        'The first word is "Nilk".'
        >>> reading.answer("next word", "Bread"), reading.answer("read", "Milk 2 3")
        (None, 'Nilk 2 3')
        """
        if task == "read":
            alike = SequenceMatcher(None, text.split(), self.text.split(), autojunk=False).ratio()
            return self.text if alike >= _ALIKE else None
        words = text.split()
        gone = sum(word in self.lost or word.strip(MARKS) in self.lost for word in words)
        if gone > _LOST * len(words):
            return None
        placed = snapped(text, self.places)
        if placed is None:
            return None
        lines = placed.split("\n")
        return "\n".join(" ".join(map(self._word, line.split(" "))) for line in lines)

    def _word(self, word: str) -> str:
        bare = word.strip(MARKS)
        if word in self.otherwise or not bare:
            return self.otherwise.get(word, word)
        return word.replace(bare, self.otherwise.get(bare, bare))


def as_read(truth: Sequence[str], read: Sequence[str]) -> dict[str, str]:
    """Words that were read otherwise, where it is clear as what.

    >>> as_read("fresh Milk and Bread".split(), "fresh Nilk Bread".split())
    {}
    >>> as_read("fresh Milk and Bread".split(), "fresh Nilk and Bread".split())
    {'Milk': 'Nilk'}
    """
    out: dict[str, str] = {}
    for kind, a, b, c, d in SequenceMatcher(None, truth, read, autojunk=False).get_opcodes():
        if kind != "replace" or b - a != d - c:
            continue
        for word, said in zip(truth[a:b], read[c:d], strict=True):
            if SequenceMatcher(None, word.lower(), said.lower()).ratio() > 0.5:
                out.setdefault(word, said)
    return out


def snapped(text: str, told: Sequence[str], least: float = 0.5) -> str | None:
    """An answer whose places are those that were told; none if one of them was not.

    The place that overlaps by ``least`` or more is taken, else one that a place of the answer lies
    in: print stands in its frame, and what was not cut apart in the whole of it.

    >>> snapped("It is at [[100,100,202,200]].", ["[[103,100,200,200]]", "[[500,100,600,200]]"])
    'It is at [[103,100,200,200]].'
    >>> snapped("[[110,110,190,190]]", ["[[100,100,300,200]]"])
    '[[100,100,300,200]]'
    """
    out, end = "", 0
    for found in _PLACE.finditer(text):
        own = found.group()
        near = max(told, key=lambda one: _overlap(own, one), default="")
        if not near or _overlap(own, near) < least:
            return None
        out += text[end : found.start()] + near
        end = found.end()
    return out + text[end:]


def _overlap(own: str, told: str) -> float:
    """Of two places; 0.5 where the first lies in the second, a sixth of it or more."""
    (a,), (b,) = boxes(own), boxes(told)
    size, room = ((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b))
    within = common(a, b) >= 0.9 * size and room <= 6 * size
    return max(iou(a, b), 0.5 if within else 0.0)
