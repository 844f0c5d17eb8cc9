"""Stage "align": the adapter learns to speak in the language model's own embeddings.

Still without the language model in the loop.  An image token covers a cell of the picture: nano's a
column of all four patch rows of a line, 14 pixels wide (``merge: [4, 1]``), about one character;
the family's two rows and columns.  Its target is the (frozen) embedding of the word piece that
spells the characters whose points (just above the baseline) lie in it, or the mean of several.
Cells without a character have the embedding of a newline::

    picture   |T|h|e| |c|a|t| |      cells, one column of patches each
    targets    T h e _ c a t \\n     embeddings of these pieces

The lines may stand on pages (``pages`` in the recipe), whose rows of cells are told apart.

A token must be nearer to its target than to any other short word piece, or a doubtful one would
settle between several and mean none: the loss is the cross-entropy of the pieces by distance, and
the distance itself.  The frozen model, which can repeat what it was just told, then needs little
more than to be told that it should.  The tower goes on learning characters at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.vision import VisionModel
from ..processor.tokenizer import Tokenizer
from ..score import cer
from ..tensors import save_tensors
from .lines import Row, Sheet
from .loop import Pieces
from .pages import Page, Pages
from .read import Reader, ReadObjective, column_labels, decode_columns

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


Cells = dict[tuple[int, int], str]


def cells_of(rows: tuple[Row, ...], shape: tuple[int, int], cell: tuple[int, int]) -> Cells:
    """What the cells of a picture say, by row and column; empty ones are left out.

    Args:
        rows: of the picture.
        shape: rows and columns of cells.
        cell: height and width in pixels.

    >>> row = Row("abc", np.array([[3, 30], [20, 30], [31, 31]], np.float32))
    >>> cells_of((row,), (2, 2), (28, 28))
    {(1, 0): 'ab', (1, 1): 'c'}
    """
    out: Cells = {}
    for row in rows:
        for char, (x, y) in zip(row.text, row.points, strict=True):
            i = int(min(max(y // cell[0], 0), shape[0] - 1))
            j = int(min(max(x // cell[1], 0), shape[1] - 1))
            out[i, j] = out.get((i, j), "") + char
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
        """Character logits ``[N, rows, columns of patches, SLOTS, CLASSES]`` and image tokens
        ``[N, T, D]``; rows are those of cells.
        """
        patches, grid = self.vision.patches(pixels)
        tall = self.vision.merge[0]
        return self.name(patches, *grid, tall), self.vision.adapt(patches, grid)


@dataclass
class AlignObjective(ReadObjective):
    """Characters of each column of patches, and the word pieces of each cell."""

    trained: ReaderWithAdapter
    embeddings: Tensor = field(kw_only=True)  # float[V, D] of the language model, frozen
    pieces: CellPieces = field(kw_only=True)
    blank: int = field(kw_only=True)  # id of the word piece for empty cells
    merge: tuple[int, int] = (2, 2)  # rows and columns of patches in a cell
    pages: Pages | None = None  # among the lines of a step
    eval_pages: Pages | None = None
    eval_page_count: int = 24
    longest: int = 3  # characters of the pieces that a token is told apart from
    temperature: float = 0.1

    def __post_init__(self) -> None:
        self.embeddings = self.embeddings.to(self.device)
        self.scale = float(self.embeddings.square().mean())
        ids = short_pieces(self.pieces.tokenizer, len(self.embeddings), self.longest)
        self.rivals = self.embeddings[ids]  # float[R, D]
        self.rival = {piece: i for i, piece in enumerate(ids)}
        self.cell = (self.patch * self.merge[0], self.patch * self.merge[1])

    def batches(self, start: int) -> Iterator[Pieces]:
        """See :class:`cogvlm.train.loop.Objective`: a batch of lines, and some pages."""
        lines = self.train_pools.batches(start, self.workers)
        if self.pages is None:
            yield from (Pieces([batch.sheet()]) for batch in lines)
            return
        count = self.pages.data.per_step
        pages = self.pages.stream(start * count, self.pages.data.workers)
        for batch in lines:
            share = 1 / (1 + count)
            sheets = [_sheet(next(pages), share) for _ in range(count)]
            yield Pieces([batch.sheet(share), *sheets])

    def shape(self, sheet: Sheet) -> tuple[int, int]:
        """Rows and columns of cells."""
        height, width = sheet.pixels.shape[-2:]
        return height // self.cell[0], width // self.cell[1]

    def row_labels(self, sheet: Sheet) -> Tensor:
        """Classes of every slot, ``int64[N, rows, columns of patches, SLOTS]``."""
        rows, _ = self.shape(sheet)
        cols = sheet.pixels.shape[-1] // self.patch
        told = [[("", np.zeros(0, np.float32)) for _ in range(rows)] for _ in sheet.rows]
        for strips, lines in zip(told, sheet.rows, strict=True):
            for line in lines:
                levels = np.clip(line.points[:, 1] // self.cell[0], 0, rows - 1)
                for i in np.unique(levels).astype(int):
                    here = np.flatnonzero(levels == i)
                    text, xs = strips[i]
                    text += "".join(line.text[k] for k in here)
                    strips[i] = (text, np.concatenate([xs, line.points[here, 0]]))
        flat = [strip for strips in told for strip in strips]
        labels = column_labels([t for t, _ in flat], [x for _, x in flat], cols, self.patch)
        return torch.from_numpy(labels).view(len(told), rows, cols, -1)

    def targets(self, sheet: Sheet) -> tuple[Tensor, list[list[int]]]:
        """The cells that hold characters, ``int64[cells, 3]`` (picture, row, column), and the
        rivals that spell each; cells whose pieces are too long for the rivals are left out.
        """
        places, spelled = [], []
        for n, rows in enumerate(sheet.rows):
            for place, text in cells_of(rows, self.shape(sheet), self.cell).items():
                ids = self.pieces(text)
                if all(i in self.rival for i in ids):
                    places.append((n, *place))
                    spelled.append([self.rival[i] for i in ids])
        return torch.tensor(places, dtype=torch.long).view(-1, 3), spelled

    def distances(self, tokens: Tensor) -> Tensor:
        """``float[..., D]`` -> squared distances to the rivals ``float[..., R]``.

        In units of the embeddings' mean square, averaged over dimensions: two pieces are about 2
        apart.
        """
        square = tokens.square().sum(-1, keepdim=True) + self.rivals.square().sum(-1)
        return (square - 2 * tokens @ self.rivals.T) / (self.scale * tokens.shape[-1])

    def loss(self, batch: Sheet) -> tuple[Tensor, dict[str, float]]:
        """See :class:`cogvlm.train.loop.Objective`."""
        logits, tokens = self.trained.both(torch.from_numpy(batch.pixels).to(self.device))
        labels = self.row_labels(batch).to(self.device)
        each = nn.functional.cross_entropy(
            logits.flatten(0, 3).float(), labels.flatten(), reduction="none"
        ).view(labels.shape)
        # Most columns of a page are empty, and easy.
        weight = (labels > 0).any(-1, keepdim=True).float() * 0.85 + 0.15
        read = (each * weight).sum() / (weight.sum() * labels.shape[-1])
        grid = tokens.float().unflatten(1, self.shape(batch))  # [N, rows, cols, D]
        loss, figures = self.named(grid, *self.targets(batch))
        figures |= {"read": read}
        loss = (read + loss) * batch.share
        return loss, {k: float(v.detach()) * batch.share for k, v in figures.items()}

    def named(
        self, grid: Tensor, places: Tensor, spelled: list[list[int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the image tokens ``float[N, rows, cols, D]``: of the cells that say something, of
        as many empty ones by name too, and of all empty ones by distance.
        """
        said = torch.zeros(grid.shape[:3], dtype=torch.bool)
        said[tuple(places.T)] = True
        empty = (~said).nonzero()
        few = empty[torch.randperm(len(empty))[: len(places)]]
        shares = torch.zeros(len(places) + len(few), len(self.rivals))
        for i, ids in enumerate(spelled):
            for rival in ids:
                shares[i, rival] += 1 / len(ids)
        shares[len(places) :, self.rival[self.blank]] = 1.0
        shares = shares.to(self.device)
        found = grid[tuple(torch.cat((places, few)).T)]  # [cells, D]
        names = (-self.distances(found) / self.temperature).log_softmax(-1)
        piece = -(shares * names).sum(-1).mean()
        near = (found - shares @ self.rivals).square().mean() / self.scale
        rest = grid[~said.to(grid.device)] - self.embeddings[self.blank]
        below = rest.square().mean() / self.scale if len(rest) else near.new_zeros(())
        right = names.argmax(-1) == shares.argmax(-1)
        accuracy = right[: len(places)].float().mean()
        figures = {"piece": piece, "distance": near, "piece_accuracy": accuracy}
        return 0.2 * piece + near + 0.1 * below, figures

    def evaluate(self) -> dict[str, float]:
        """Character error rate of the head on what never trains: lines, and pages row by row."""
        pairs: list[tuple[str, str]] = []
        for index in range(self.eval_count):
            for batch in self.eval_pools.pool(index):
                pairs += self.read_out(batch.sheet())
        figures = _cer(pairs)
        if self.eval_pages is not None:
            pages = [self.eval_pages[i] for i in range(self.eval_page_count)]
            read = [pair for page in pages for pair in self.read_out(_sheet(page))]
            figures |= {f"page_{k}": v for k, v in _cer(read).items()}
        return figures

    def read_out(self, sheet: Sheet) -> list[tuple[str, str]]:
        """What the head reads in each picture and what stands there, rows of cells joined."""
        logits, _ = self.trained.both(torch.from_numpy(sheet.pixels).to(self.device))
        classes = logits.argmax(-1).cpu().numpy()
        truths = self.row_labels(sheet).numpy()
        join = "\n".join
        return [
            (join(filter(str.strip, decode_columns(c))), join(filter(str.strip, decode_columns(t))))
            for c, t in zip(classes, truths, strict=True)
        ]

    def export(self, folder: Path) -> None:
        """Write ``vision.safetensors``: tower, adapter and the character head."""
        vision = {f"model.vision.{k}": v for k, v in self.trained.vision.state_dict().items()}
        head = {f"head.{k}": v for k, v in self.trained.head.state_dict().items()}
        tensors = {k: v.detach().cpu() for k, v in {**vision, **head}.items()}
        save_tensors(tensors, folder / "vision.safetensors")


def _sheet(page: Page, share: float = 1.0) -> Sheet:
    """A page that is one block."""
    (block,) = page.blocks
    return Sheet(block.pixels[None], [block.rows], share)


def _cer(pairs: list[tuple[str, str]]) -> dict[str, float]:
    for read, truth in pairs[:3]:
        print(f"  {truth!r} -> {read!r}")
    return {"cer": cer([r for r, _ in pairs], [t for _, t in pairs]), "pictures": len(pairs) * 1.0}
