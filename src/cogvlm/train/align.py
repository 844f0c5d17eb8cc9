"""Stage "align": the adapter learns to speak in the language model's own embeddings.

Still without the language model in the loop.  An image token covers a cell of two patch columns,
one or two characters wide; its target is the (frozen) embedding of the word piece that spells the
cell, or the mean of several.  Cells without a character, and all rows but the first, have the
embedding of a newline::

    picture   |Th|e |ca|t |      cells, two 14-pixel columns each
    row 0      Th e_  ca t_      targets: embeddings of these pieces
    row 1      \\n \\n  \\n \\n

The frozen model, which can repeat what it was just told, then needs little more than to be told
that it should.  The tower goes on learning characters at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.vision import VisionModel
from ..processor.tokenizer import Tokenizer
from .lines import LineBatch
from .read import Reader, ReadObjective

Ids = list[int]


def cut_into_cells(text: str, centers: NDArray[np.float32], cells: int, width: int) -> list[str]:
    """The characters whose centres lie in each cell of ``width`` pixels.

    >>> cut_into_cells("abc", np.array([3.0, 20.0, 31.0], np.float32), 3, 28)
    ['ab', 'c', '']
    """
    out = [""] * cells
    for char, x in zip(text, centers, strict=True):
        out[int(min(max(x // width, 0), cells - 1))] += char
    return out


@dataclass
class CellPieces:
    """Spells cells in word pieces, remembering each spelling."""

    tokenizer: Tokenizer
    known: dict[str, Ids] = field(default_factory=dict)

    def __call__(self, cell: str) -> Ids:
        """Word-piece ids of one cell's characters."""
        if cell not in self.known:
            self.known[cell] = self.tokenizer.encode(cell)
        return self.known[cell]

    def line(self, text: str, centers: NDArray[np.float32], cells: int, width: int) -> Ids:
        """Ids of a whole line, cut where the picture is cut."""
        ids: Ids = []
        for cell in cut_into_cells(text, centers, cells, width):
            if cell:
                ids += self(cell)
        return ids


class ReaderWithAdapter(Reader):
    """The reader, and the adapter on the same tower."""

    def __init__(self, vision: VisionModel, width: int) -> None:
        super().__init__(vision, width)
        self.vision = vision

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Character logits ``[N, cols, SLOTS, CLASSES]`` and image tokens ``[N, T, D]``."""
        patches, grid = self.vision.patches(pixels)
        return self.name(patches, *grid), self.vision.adapt(patches, grid)


@dataclass
class AlignObjective(ReadObjective):
    """Characters of each column, and the distance of image tokens to their targets."""

    trained: ReaderWithAdapter
    embeddings: Tensor = field(kw_only=True)  # float[V, D] of the language model, frozen
    pieces: CellPieces = field(kw_only=True)
    blank: int = field(kw_only=True)  # id of the word piece for empty cells
    merge: int = 2

    def targets(self, batch: LineBatch) -> Tensor:
        """``float[N, T, D]``, row-major."""
        height, width = batch.pixels.shape[-2:]
        cell = self.patch * self.merge
        rows, cols = height // cell, width // cell
        out = self.embeddings[self.blank].expand(len(batch.texts), rows * cols, -1).clone()
        for i, (text, xs) in enumerate(zip(batch.texts, batch.centers, strict=True)):
            for j, spelled in enumerate(cut_into_cells(text, xs, cols, cell)):
                if spelled:
                    out[i, j] = self.embeddings[self.pieces(spelled)].mean(0)
        return out

    def loss(self, batch: LineBatch) -> tuple[Tensor, dict[str, float]]:
        """See :class:`cogvlm.train.loop.Objective`."""
        pixels = torch.from_numpy(batch.pixels).to(self.device)
        logits, tokens = self.trained.both(pixels)
        labels = self.labels(batch).to(self.device)
        read = nn.functional.cross_entropy(logits.flatten(0, 2).float(), labels.flatten())
        target = self.targets(batch).to(self.device)
        written = (target != self.embeddings[self.blank].to(target)).any(-1)
        error = (tokens.float() - target).square().mean(-1) / self.embeddings.square().mean()
        weight = torch.where(written, 1.0, 0.1)
        distance = (error * weight).sum() / weight.sum()
        figures = {"read": float(read.detach()), "distance": float(error[written].mean().detach())}
        return read + distance, figures

    def export(self, folder: Path) -> None:
        """Write ``vision.safetensors``: tower, adapter and the character head."""
        vision = {f"model.vision.{k}": v for k, v in self.trained.vision.state_dict().items()}
        head = {f"head.{k}": v for k, v in self.trained.head.state_dict().items()}
        tensors = {k: v.detach().cpu() for k, v in {**vision, **head}.items()}
        save_file(tensors, folder / "vision.safetensors")
