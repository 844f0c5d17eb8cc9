"""Stage "align": the adapter learns to speak in the language model's own embeddings.

Still without the language model in the loop.  An image token covers a cell of the line: nano's a
column of all four patch rows, 14 pixels wide (``merge: [4, 1]``), about one character; the family's
two patch rows and columns.  Its target is the (frozen) embedding of the word piece that spells the
cell, or the mean of several.  Cells without a character, and rows below the first, have the
embedding of a newline::

    picture   |T|h|e| |c|a|t| |      cells, one column of patches each
    targets    T h e _ c a t \\n     embeddings of these pieces

A token must be nearer to its target than to any other short word piece, or a doubtful one would
settle between several and mean none: the loss is the cross-entropy of the pieces by distance, and
the distance itself.  The frozen model, which can repeat what it was just told, then needs little
more than to be told that it should.  The tower goes on learning characters at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.vision import VisionModel
from ..processor.tokenizer import Tokenizer
from ..tensors import save_tensors
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


def short_pieces(tokenizer: Tokenizer, vocab: int, longest: int) -> Ids:
    """Ids of the word pieces of 1 to ``longest`` printable ASCII characters, and of a newline."""
    texts = ((i, tokenizer.decode([i])) for i in range(vocab))
    fitting = [i for i, s in texts if 0 < len(s) <= longest and s.isascii() and s.isprintable()]
    return sorted({*fitting, *tokenizer.encode("\n")})


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
    """Characters of each column, and the word pieces of each cell."""

    trained: ReaderWithAdapter
    embeddings: Tensor = field(kw_only=True)  # float[V, D] of the language model, frozen
    pieces: CellPieces = field(kw_only=True)
    blank: int = field(kw_only=True)  # id of the word piece for empty cells
    merge: int = 2  # columns of patches in a cell
    longest: int = 3  # characters of the pieces that a token is told apart from
    temperature: float = 0.1

    def __post_init__(self) -> None:
        self.embeddings = self.embeddings.to(self.device)
        self.scale = float(self.embeddings.square().mean())
        ids = short_pieces(self.pieces.tokenizer, len(self.embeddings), self.longest)
        self.rivals = self.embeddings[ids]  # float[R, D]
        self.rival = {piece: i for i, piece in enumerate(ids)}

    def shares(self, batch: LineBatch) -> Tensor:
        """What each cell of the first row says: ``float[N, cols, R]``, its pieces in equal parts.

        All zero, which is then not learned, where a piece is too long to be among the rivals.
        """
        cell = self.patch * self.merge
        cols = batch.pixels.shape[-1] // cell
        out = torch.zeros(len(batch.texts), cols, len(self.rivals))
        for i, (text, xs) in enumerate(zip(batch.texts, batch.centers, strict=True)):
            for j, spelled in enumerate(cut_into_cells(text, xs, cols, cell)):
                ids = self.pieces(spelled) if spelled else [self.blank]
                for piece in ids if all(i in self.rival for i in ids) else []:
                    out[i, j, self.rival[piece]] += 1 / len(ids)
        return out.to(self.device)

    def distances(self, tokens: Tensor) -> Tensor:
        """``float[..., D]`` -> squared distances to the rivals ``float[..., R]``.

        In units of the embeddings' mean square, averaged over dimensions: two pieces are about 2
        apart.
        """
        square = tokens.square().sum(-1, keepdim=True) + self.rivals.square().sum(-1)
        return (square - 2 * tokens @ self.rivals.T) / (self.scale * tokens.shape[-1])

    def loss(self, batch: LineBatch) -> tuple[Tensor, dict[str, float]]:
        """See :class:`cogvlm.train.loop.Objective`."""
        logits, tokens = self.trained.both(torch.from_numpy(batch.pixels).to(self.device))
        labels = self.labels(batch).to(self.device)
        read = nn.functional.cross_entropy(logits.flatten(0, 2).float(), labels.flatten())
        shares = self.shares(batch)
        first, rest = tokens.float().split((shares.shape[1], tokens.shape[1] - shares.shape[1]), 1)
        told = shares.any(-1)
        first, shares = first[told], shares[told]  # [cells, D] and [cells, R]
        names = (-self.distances(first) / self.temperature).log_softmax(-1)
        piece = -(shares * names).sum(-1).mean()
        near = (first - shares @ self.rivals).square().mean() / self.scale
        below = (rest - self.embeddings[self.blank]).square().sum() / max(1, rest.numel())
        right = (names.argmax(-1) == shares.argmax(-1)).float().mean()
        figures = {"read": read, "piece": piece, "distance": near, "piece_accuracy": right}
        loss = read + 0.2 * piece + near + 0.1 * below / self.scale
        return loss, {k: float(v.detach()) for k, v in figures.items()}

    def export(self, folder: Path) -> None:
        """Write ``vision.safetensors``: tower, adapter and the character head."""
        vision = {f"model.vision.{k}": v for k, v in self.trained.vision.state_dict().items()}
        head = {f"head.{k}": v for k, v in self.trained.head.state_dict().items()}
        tensors = {k: v.detach().cpu() for k, v in {**vision, **head}.items()}
        save_tensors(tensors, folder / "vision.safetensors")
