"""Stage "instruct": answers to questions about pages, among lines that are read.

As in stage "answer", what is quoted from a picture is spelled in the word pieces into which its
cells cut it; everything else in the pieces of the tokenizer.  Where the model's head reads the
lines first (``pixels.shown``), answers quote what it read, in the tokenizer's pieces too.

Beside experts, adapter and tower, the corrections of the language weights behind a picture learn
(``config.text_rank``), where the model has them: SmolLM2 left to itself chats about a text instead
of quoting it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..processor.encode import asked
from ..processor.lines import LinePixels, asks_for_places, read_out
from ..processor.template import ImageSlot, Plain
from ..score import anls
from .align import Cells, cells_of
from .answer import AnswerObjective
from .distributed import World
from .lines import LineBatch, Pixels, Row
from .loop import Pieces
from .pages import Block, Page, Pages
from .quote import MARKS, Reading

Inputs = dict[str, Any]
LINE = 40  # tokens of a line and its answer, about


@dataclass(frozen=True)
class Lines:
    """The line part of a step."""

    index: int
    batch: LineBatch
    share: float


@dataclass(frozen=True)
class Asked:
    """A conversation about a page, and the part that it has in the loss of its step."""

    inputs: Inputs
    share: float


def dealt(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of ``sizes`` in ``count`` hands of about equal sums, none empty where enough are.

    >>> dealt([3, 9, 4, 2], 2)
    [[1], [2, 0, 3]]
    """
    hands: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(hands, key=lambda hand: sum(sizes[i] for i in hand)).append(index)
    return hands


@dataclass
class InstructObjective(AnswerObjective):
    """Cross-entropy of the answers about lines and pages, through the whole model."""

    pages: Pages = field(kw_only=True)
    eval_pages: Pages = field(kw_only=True)
    line_share: float = 0.25  # of the lines in the loss of a step
    eval_page_count: int = 16
    longest: int = 1500  # tokens of a conversation; later turns are left out
    world: World = field(default_factory=World)  # the processes that divide a step

    def __post_init__(self) -> None:
        super().__post_init__()
        plan = self.processor.pixels
        self.shown = plan.shown if isinstance(plan, LinePixels) else None

    def batches(self, start: int) -> Iterator[Pieces]:
        """See :class:`cogvlm.train.loop.Objective`: lines and pages, this process's part.

        Every process draws all, so that they agree who takes which; that is cheap beside the
        model.
        """
        count = self.pages.data.per_step
        pages = self.pages.stream(start * count, self.pages.data.workers)
        for index, batch in enumerate(self.train_pools.batches(start, self.workers), start):
            share = (1 - self.line_share) / count
            drawn = [next(pages) for _ in range(count)]
            sizes = [len(batch.texts) * LINE, *map(self.length, drawn)]
            lines = Lines(index, batch, self.line_share)
            yield Pieces(
                [
                    lines if i == 0 else Asked(self.conversation(drawn[i - 1]), share)
                    for i in dealt(sizes, self.world.size)[self.world.rank]
                ]
            )

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """See :class:`cogvlm.train.loop.Objective`."""
        if isinstance(batch, Lines):
            loss, figures = super().loss((batch.index, batch.batch))
            return loss * batch.share, {"lines": float(loss.detach()), **figures}
        loss = self.forward(**batch.inputs).loss
        figures = {"pages": float(loss.detach()) / self.pages.data.per_step}
        return loss * batch.share, {**figures, "tokens": float(batch.inputs["input_ids"].numel())}

    def length(self, page: Page) -> int:
        """Tokens of a page's conversation, about."""
        cells = [math.prod(b.pixels.shape[1:]) // math.prod(self.cell) for b in page.blocks]
        letters = sum(len(turn.text) for turn in page.sample.turns)
        if self.shown is not None:
            cells = cells[: self.shown]
            letters += sum(len(row.text) for block in page.blocks for row in block.rows)
        return sum(cells) + letters // 3

    def conversation(self, page: Page, answer: bool = True) -> Inputs:
        """Arguments of the model for a page's conversation, or the first question of it alone."""
        texts: Sequence[str | None] = [None] * len(page.blocks)
        cut = None
        if self.shown is None:
            cut = Spelled(page.blocks, (self.cell[0], self.cell[1]))
        else:
            texts = read = self._spell([block.pixels for block in page.blocks])
            if answer:
                told = Reading.of(page.blocks, read).conversation(page.sample)
                page = replace(page, sample=told)
        messages = page.sample.record().messages
        messages = messages if answer else messages[:1]
        placed = asks_for_places(asked(messages))
        ids: list[int] = []
        types: list[int] = []
        labels: list[int] = []
        shown: Sequence[Block] = ()
        end = 0  # of the last answer that is kept
        for segment in self.processor.template.segments(messages, answer):
            if isinstance(segment, ImageSlot):
                shown = self._present(page, texts, placed, ids, types)
                labels += [-100] * (len(ids) - len(labels))
                continue
            new, learnt = self.processor.words(segment), segment.labelled
            if isinstance(segment, Plain) and learnt and cut is not None:
                new = self.spell(segment.text, cut)
            if end and len(ids) + len(new) > self.longest:
                break
            ids += new
            types += [0] * len(new)
            labels += new if learnt else [-100] * len(new)
            end = len(ids) if learnt else end
        kept = end if answer else len(ids)
        arrays = {"input_ids": ids, "token_type_ids": types}
        if answer:
            arrays["labels"] = labels
        tensors: Inputs = {k: torch.tensor([v[:kept]]).to(self.device) for k, v in arrays.items()}
        pixels = [torch.from_numpy(block.pixels).to(self.device) for block in shown]
        return {**tensors, "pixel_values": pixels}

    def readings(self, batch: LineBatch) -> list[str]:
        """See :class:`AnswerObjective`: what the head reads, where it does."""
        if self.shown is None:
            return super().readings(batch)
        return [read_out(text, "\n") for text in self._spell(list(batch.pixels))]

    def answers(self, batch: LineBatch, cols: int, told: Sequence[str]) -> list[list[int]]:
        """See :class:`AnswerObjective`: as it was read, where a line is."""
        if self.shown is None:
            return super().answers(batch, cols, told)
        assert self.end is not None
        said = [read.strip() or text for read, text in zip(told, batch.texts, strict=True)]
        return [[*self.processor.tokenizer.encode(text), self.end] for text in said]

    def _spell(self, strips: Sequence[Pixels]) -> list[str]:
        texts: list[str] = self.trained.model.vision.spell(strips)
        return texts

    def _present(
        self,
        page: Page,
        texts: Sequence[str | None],
        placed: bool,
        ids: list[int],
        types: list[int],
    ) -> Sequence[Block]:
        """Put the places of a page's blocks, and the text behind each, at the end; those that are
        shown.
        """
        shown = page.blocks[: self.shown]
        for number, (block, text) in enumerate(zip(page.blocks, texts, strict=True)):
            if number < len(shown):
                height, width = block.pixels.shape[1:]
                count = (height // self.cell[0]) * (width // self.cell[1]) + 2
                ids += [self.processor.image_token_id] * count
                types += [1] * count
            told = read_out(text, block.behind, block.place if placed else "")
            behind = self.processor.tokenizer.encode(told) if told else []
            ids += behind
            types += [0] * len(behind)
        return shown

    def spell(self, text: str, spelled: Spelled) -> list[int]:
        """Ids of an answer: words that stand on the page as its cells cut them."""
        ids: list[int] = []
        for number, line in enumerate(text.split("\n")):
            ids += self.processor.tokenizer.encode("\n") if number else []
            plain = ""  # gathered until a quoted word comes
            for place, word in enumerate(line.split(" ")):
                parts = spelled.parts(word)
                blank = " " if place else ""
                if parts is None:
                    plain += blank + word
                    continue
                ids += self.processor.tokenizer.encode(plain) if plain else []
                plain = ""
                for part in (blank, *parts):
                    ids += self.pieces(part) if part else []
            ids += self.processor.tokenizer.encode(plain) if plain else []
        return ids

    def evaluate(self) -> dict[str, float]:
        """Lines as in stage "answer"; loss, and the first answer's ANLS, of pages held out."""
        figures = {f"line_{k}": v for k, v in super().evaluate().items()}
        losses, scores, exact = [], [], 0
        for index in range(self.eval_page_count):
            page = self.eval_pages[index]
            losses.append(float(self.trained(**self.conversation(page)).loss.detach()))
            question, truth = (turn.text for turn in page.sample.turns[:2])
            said = self.ask(page)
            print(f"  {question!r}: {truth!r} -> {said!r}")
            scores.append(anls(said, (truth,)))
            exact += said.strip() == truth.strip()
        count = self.eval_page_count
        mean = {"loss": sum(losses) / count, "anls": sum(scores) / count, "exact": exact / count}
        return {**figures, **mean}

    def ask(self, page: Page, most: int = 64) -> str:
        """The greedy answer to the first question about a page."""
        inputs = self.conversation(page, answer=False)
        model: Any = self.trained  # the stub of generate takes itself twice
        out: Tensor = model.generate(
            **inputs, max_new_tokens=most, do_sample=False, eos_token_id=self.end
        )
        return self.processor.decode(out[0, inputs["input_ids"].shape[1] :].tolist()).strip()


class Spelled:
    """The words of a page, as its cells cut them."""

    def __init__(self, blocks: tuple[Block, ...], cell: tuple[int, int]) -> None:
        self.known: dict[str, list[str]] = {}
        for block in blocks:
            height, width = block.pixels.shape[1:]
            for row in block.rows:
                self._learn(row, (height // cell[0], width // cell[1]), cell)

    def _learn(self, row: Row, shape: tuple[int, int], cell: tuple[int, int]) -> None:
        start = 0
        for word in row.text.split(" "):
            own = Row(word, row.points[start : start + len(word)])
            cells: Cells = cells_of((own,), shape, cell)
            if "".join(cells.values()) == word:
                self.known.setdefault(word, list(cells.values()))
            start += len(word) + 1

    def parts(self, word: str) -> list[str] | None:
        """The cut of a word; none if it does not stand there.

        A stop or a quotation mark around it need not stand there.
        """
        found = self.known.get(word)
        if found is None and (bare := word.strip(MARKS)):
            found = self.known.get(bare)
            before, _, after = word.partition(bare)
            found = found and [*([before] * bool(before)), *found, *([after] * bool(after))]
        return found
