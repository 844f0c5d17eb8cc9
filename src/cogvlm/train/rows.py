"""Records to the rows of a step; what does not fit is left out or cut, and counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..config import CogVLMConfig
from ..data.sft import Mix, RecordError
from ..errors import ConfigError, InputError
from ..processor import Encoded, Message, Processor, SquarePixels


@dataclass
class Rows:
    """Rows with labels, and what became of the other records."""

    rows: list[Encoded] = field(default_factory=list)
    cut: int = 0
    left_out: list[str] = field(default_factory=list)  # where and why


@dataclass(frozen=True)
class Limit:
    """Longest row in tokens (none: any), and whether a longer one is cut or left out."""

    tokens: int | None = None
    cut: bool = False


def encode(processor: Processor, messages: Sequence[Message], limit: Limit) -> tuple[Encoded, bool]:
    """A row with its labels, and whether it was cut.

    Whole turns are cut from the end; where one question and answer are too long already, the end
    of the answer is cut, as long as a part of it and every picture stay.

    Raises:
        InputError: too long, and not to be cut, or too long before the answer begins.
    """
    row = processor.encode(messages, train=True)
    if limit.tokens is None or len(row.input_ids) <= limit.tokens:
        return row, False
    why = f"{len(row.input_ids)} tokens, max_tokens is {limit.tokens}"
    if not limit.cut:
        raise InputError(why)
    ends = [i for i, m in enumerate(messages[:-1], 1) if m.role == "assistant"]
    for end in reversed(ends):
        row = processor.encode(messages[:end], train=True)
        if len(row.input_ids) <= limit.tokens:
            return row, True
    assert row.labels is not None
    if row.token_type_ids[limit.tokens :].any() or not (row.labels[: limit.tokens] >= 0).any():
        raise InputError(f"{why}, and no answer begins before that")
    short = (row.input_ids[: limit.tokens], row.token_type_ids[: limit.tokens], row.pixel_values)
    return Encoded(*short, row.labels[: limit.tokens], row.cross_pixel_values), True


@dataclass
class Steps(Dataset[Rows]):
    """``steps[first]``: the rows of records ``first`` to ``first + size - 1`` of a mix.

    A pure function of the mix and ``first``: a step is the same for any number of workers, and of
    processes, each of which has its ``share`` of the rows.
    """

    mix: Mix
    processor: Processor
    size: int
    limit: Limit
    share: tuple[int, int] = (0, 1)  # number of the process, and how many there are

    def __getitem__(self, first: int) -> Rows:
        """See the class."""
        out = Rows()
        rank, processes = self.share
        for index in range(first + rank, first + self.size, processes):
            try:
                record = self.mix[index]
            except RecordError as error:
                out.left_out.append(str(error))
                continue
            try:
                row, cut = encode(self.processor, record.messages, self.limit)
            except InputError as error:
                out.left_out.append(f"{record.where}: {error}")
                continue
            out.rows.append(row)
            out.cut += cut
        return out

    def stream(self, first: int, workers: int) -> Iterator[Rows]:
        """Steps from record ``first`` on, on and on; ``workers`` processes prepare them."""
        loader: DataLoader[Rows] = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, first + 1_000_000 * self.size, self.size),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
        )
        yield from loader


def at_resolution(steps: Steps, config: Any, side: int | None) -> Steps:
    """The same records with pictures of ``side`` pixels a side; none: the model's own.

    Raises:
        ConfigError: a model of pictures of one size, or no size that it takes.
    """
    if side is None:
        return steps
    pixels, most = steps.processor.pixels, config.vision.image_size
    if type(config) is not CogVLMConfig or not isinstance(pixels, SquarePixels):
        raise ConfigError("resolution: this model takes pictures of its own sizes only")
    if side > most:
        raise ConfigError(f"resolution {side}: this model takes at most {most} pixels a side")
    return replace(steps, processor=replace(steps.processor, pixels=replace(pixels, size=side)))


def labelled(row: Encoded) -> int:
    """How many tokens of a row are learnt."""
    assert row.labels is not None
    return int(np.count_nonzero(row.labels[1:] >= 0))


def micro_batches(rows: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    """Rows of a step in groups of ``size``, those of like length together: least padding."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
