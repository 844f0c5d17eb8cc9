"""Rendered lines as training batches, grouped so that no picture is padded.

A pool is a few hundred lines rendered together and sorted by width; neighbours form a batch and
are resized to one grid, which stretches each by a few percent at most.  Pool ``i`` is a pure
function of the seed and ``i``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ..data.lines import Line, LineStream
from ..processor.image import NativePixels, normalise

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """A line of a picture; ``points`` float32[N, 2] are x and y of its characters, in pixels."""

    text: str
    points: NDArray[np.float32]


@dataclass
class Sheet:
    """Pictures of one size, float32[N, 3, H, W], and of each its lines.

    ``share`` is the part that they have in the loss of their step.
    """

    pixels: Pixels
    rows: list[tuple[Row, ...]]
    share: float = 1.0


@dataclass
class LineBatch:
    """Pictures of a line each; places in pixels of the resized picture.

    ``pixels`` float32[N, 3, H, W] normalised; ``centers`` x of the characters, ``feet`` their y,
    just above the baseline.
    """

    pixels: Pixels
    texts: list[str]
    centers: list[NDArray[np.float32]]
    feet: list[NDArray[np.float32]]

    def sheet(self, share: float = 1.0) -> Sheet:
        """The same as any other pictures."""
        lines = zip(self.texts, self.centers, self.feet, strict=True)
        return Sheet(self.pixels, [(Row(t, np.stack([x, y], 1)),) for t, x, y in lines], share)


def stack(lines: list[Line], width: int, height: int) -> LineBatch:
    """Resize lines to one size, normalise and stack them."""
    pixels = np.empty((len(lines), 3, height, width), np.float32)
    centers, feet = [], []
    for i, line in enumerate(lines):
        pixels[i] = normalise(line.image, width, height)
        centers.append(line.centers * (width / line.image.width))
        feet.append(line.feet * (height / line.image.height))
    return LineBatch(pixels, [line.text for line in lines], centers, feet)


class LinePools(Dataset[list[LineBatch]]):
    """Pools of batches: ``pool_size`` lines, cut into batches of ``batch_size``.

    ``plan`` is the processor's own rule for picture sizes, so training sees what asking sees.
    """

    def __init__(
        self,
        stream: LineStream,
        plan: NativePixels,
        batch_size: int,
        pool_size: int,
        seed: int,
    ) -> None:
        self.stream, self.plan, self.seed = stream, plan, seed
        self.batch_size, self.pool_size = batch_size, pool_size

    @property
    def per_pool(self) -> int:
        """Batches in a pool."""
        return -(-self.pool_size // self.batch_size)

    def pool(self, index: int) -> list[LineBatch]:
        """The batches of pool ``index``, in an order drawn from the seed."""
        first = index * self.pool_size
        lines = [self.stream.line_at(first + i) for i in range(self.pool_size)]
        grids = [self.plan.grid(line.image.width, line.image.height) for line in lines]
        order = sorted(range(len(lines)), key=lambda i: grids[i])
        batches = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            rows, cols = grids[chosen[len(chosen) // 2]]
            patch = self.plan.patch
            batches.append(stack([lines[i] for i in chosen], cols * patch, rows * patch))
        turn = np.random.default_rng((self.seed, index)).permutation(len(batches))
        return [batches[i] for i in turn]

    def __getitem__(self, index: int) -> list[LineBatch]:
        """See :meth:`pool`."""
        return self.pool(index)

    def batches(self, start: int, workers: int) -> Iterator[LineBatch]:
        """Batches ``start``, ``start + 1``, ... rendered by ``workers`` processes (0 = here)."""
        first, skip = divmod(start, self.per_pool)
        loader: DataLoader[list[LineBatch]] = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, first + 10_000_000),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        for number, pool in enumerate(loader):
            yield from pool[skip:] if number == 0 else pool
