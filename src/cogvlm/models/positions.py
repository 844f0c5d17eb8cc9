"""Token types to expert routing, position ids and image blocks.

Knows nothing about weights.  ``B`` rows, ``L`` tokens; padding stands on the left.

A row with one image of four tokens (``b`` begin marker, ``e`` end marker)::

    tokens  <s> b  p  p  p  p  e  t  t
    types   L   V  V  V  V  V  V  L  L
    expert  .   v  v  v  v  v  .  .  .     end marker goes to the language expert
    shared  0   1  2  2  2  2  3  4  5     all patches of an image share one id
    flat    0   1  2  3  4  5  6  7  8
    tie x   0   1  4  4  7  7  10 11 12    RoPE-Tie, a 2 x 2 grid: rows are 3 apart,
    tie y   0   1  4  7  4  7  10 11 12    columns too; text goes on at 1 + 3 * 3

Sources: released ``get_expert_mask`` and ``build_position_ids`` of CogVLM2; RoPE-Tie: Su Jianlin,
spaces.ac.cn/archives/10040.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import InputError

Grid = tuple[int, int]  # rows and columns of image tokens


def expert_mask(types: Tensor) -> Tensor:
    """Which tokens use the vision expert: those of type 1 whose next token is of type 1.

    Args:
        types: ``int[B, L]``, 0 language, 1 image.

    Returns:
        ``bool[B, L]``; the last token of a row never does.
    """
    mask = torch.zeros_like(types, dtype=torch.bool)
    mask[:, :-1] = (types[:, :-1] == 1) & (types[:, 1:] == 1)
    return mask


def shared_positions(types: Tensor, mask: Tensor | None = None) -> Tensor:
    """Released rule: one id for all patches of a block, markers have their own.

    Padding has position 0 and the first real token of a padded row has 1, as released: only
    index 0 of the array is exempt from counting.

    Args:
        types: ``int[B, L]``.
        mask: ``int[B, L]``, 1 real, 0 padding; none means no padding.

    Returns:
        ``int64[B, L]``.
    """
    image = types == 1
    inner = image.clone()  # patches: image tokens with image tokens on both sides
    inner[:, 1:] &= image[:, :-1]
    inner[:, :-1] &= image[:, 1:]
    inner[:, 0] = False
    inner[:, -1] = False
    counts = ~inner
    counts[:, 1:] |= inner[:, 1:] & ~inner[:, :-1]  # the first patch of a block counts
    counts[:, 0] = False
    if mask is not None:
        counts &= mask.bool()
    return counts.long().cumsum(dim=1)


def flat_positions(types: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every token has its own id, 0 at the first real one: ``int64[B, L]``."""
    if mask is None:
        return torch.arange(types.shape[1], device=types.device).expand_as(types)
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def image_blocks(types: Sequence[int], grids: Sequence[Grid]) -> list[tuple[int, Grid]]:
    """Where each image of a row begins (its begin marker) and its grid of tokens.

    Raises:
        InputError: the image tokens of the row are not those of ``grids``.
    """
    places = [i for i, t in enumerate(types) if t == 1]
    sizes = [rows * cols + 2 for rows, cols in grids]
    if sum(sizes) != len(places):
        raise InputError(
            f"the row has {len(places)} image tokens, its images need {sum(sizes)}; "
            "encode it with the model's own processor"
        )
    blocks, used = [], 0
    for grid, size in zip(grids, sizes, strict=True):
        blocks.append((places[used], grid))
        used += size
    return blocks


def tie_positions(types: Tensor, mask: Tensor | None, grids: Sequence[Grid]) -> Tensor:
    """RoPE-Tie: text at (n, n), the patch in row i, column j (from 1) of an image that follows
    position n at (n + i * (cols + 1), n + j * (rows + 1)), the next text at
    n + (rows + 1) * (cols + 1).

    Args:
        types: ``int[B, L]``.
        mask: ``int[B, L]`` or none.
        grids: of all images, in order of appearance over the batch.

    Returns:
        ``int64[2, B, L]``: x (rows) and y (columns).
    """
    out = torch.zeros(2, *types.shape, dtype=torch.long)
    rows_of_types = types.tolist()
    real = mask.tolist() if mask is not None else None
    used = 0
    for b, row in enumerate(rows_of_types):
        start = real[b].index(1) if real is not None else 0
        images = list(grids[used:])
        count = _images_in(row, images)
        blocks = dict(image_blocks(row, images[:count]))
        used += count
        position, i = 0, start
        while i < len(row):
            out[:, b, i] = position
            i += 1
            if i - 1 in blocks:
                h, w = blocks[i - 1]
                steps_x = torch.arange(1, h + 1).repeat_interleave(w) * (w + 1)
                steps_y = torch.arange(1, w + 1).repeat(h) * (h + 1)
                out[0, b, i : i + h * w] = position + steps_x
                out[1, b, i : i + h * w] = position + steps_y
                i += h * w
                position += (h + 1) * (w + 1) - 1
            position += 1
    return out.to(types.device)


def _images_in(row: Sequence[int], grids: Sequence[Grid]) -> int:
    """How many of the next images belong to this row."""
    left = sum(1 for t in row if t == 1)
    count = 0
    while left > 0 and count < len(grids):
        left -= grids[count][0] * grids[count][1] + 2
        count += 1
    return count


def behind_picture(types: Tensor, places: Tensor | None = None) -> Tensor:
    """Which tokens stand in a picture or behind one: ``bool[B, L]``.

    ::

        types   L V V V V L L
        behind  . + + + + + +

    Args:
        types: ``int[B, L]``.
        places: ``int64[B, L]`` of packed sequences, see :func:`packed_lengths`; each has its own
            pictures.
    """
    image = (types == 1).long()
    seen = image.cumsum(dim=1)
    if places is None:
        return seen > 0
    # What was seen before the sequence began; it only grows along a row.
    before = torch.where(places == 0, seen - image, 0).cummax(dim=1).values
    return seen > before


def block_ids(types: Tensor) -> Tensor:
    """Number of the image block of each token, -1 for text: ``int64[B, L]``."""
    image = types == 1
    starts = image.clone()
    starts[:, 1:] &= ~image[:, :-1]
    return torch.where(image, starts.long().cumsum(dim=1) - 1, -1)


def packed_lengths(places: Tensor) -> list[int]:
    """Lengths of the sequences that are packed into rows, row after row.

    Args:
        places: ``int64[B, L]``, the place of each token in its own sequence, from 0.

    Raises:
        InputError: a row does not begin with the first token of a sequence.

    >>> packed_lengths(torch.tensor([[0, 1, 2, 0, 1]]))
    [3, 2]
    """
    if bool(places[:, 0].any()):
        raise InputError("a packed row does not begin with the first token of a sequence")
    starts = (places.flatten() == 0).nonzero().flatten().tolist()
    return [end - start for start, end in pairwise([*starts, places.numel()])]


@dataclass(frozen=True)
class Route:
    """The cut of a batch into language and vision tokens, found once a forward.

    Through the decoder, tokens stand *grouped*: all language tokens, then all vision tokens, each
    in order, as ``float[B * L, D]``.  Every linear layer then works on two contiguous halves;
    only attention needs the order of the sequence, which :meth:`join` and :meth:`split` restore
    by joining contiguous spans::

        sequence  L V V V L L        spans  (0,1) L, (1,4) V, (4,6) L
        grouped   L L L V V V        n_language = 3

    With no vision token both are views and cost nothing.
    """

    batch: int
    length: int
    n_language: int
    spans: tuple[tuple[int, int, bool], ...]  # (start, end, vision) over the flat batch
    # float[n_language, 1], 1 for text behind a picture, and float[B, 1] of the last token of each
    # row; none where no text is, or no weights are, for such text.
    behind: Tensor | None = field(default=None, compare=False)
    behind_last: Tensor | None = field(default=None, compare=False)

    @classmethod
    def text(cls, batch: int, length: int) -> Route:
        """All tokens are language tokens."""
        return cls(batch, length, batch * length, ())

    @classmethod
    def of(cls, experts: Tensor) -> Route:
        """The route of an expert mask ``bool[B, L]``."""
        batch, length = experts.shape
        flat = experts.flatten()
        change = torch.nonzero(flat[1:] != flat[:-1]).flatten().add(1).tolist()
        vision = bool(flat[0])
        if not change and not vision:
            return cls.text(batch, length)
        bounds = [0, *change, batch * length]
        spans = []
        for start, end in pairwise(bounds):
            spans.append((start, end, vision))
            vision = not vision
        n_language = sum(end - start for start, end, v in spans if not v)
        return cls(batch, length, n_language, tuple(spans))

    def last(self) -> Route:
        """The route of the last token of each row, which is always a language token."""
        return replace(Route.text(self.batch, 1), behind=self.behind_last)

    def marking(self, behind: Tensor, dtype: torch.dtype) -> Route:
        """The same, with text marked that stands behind a picture: ``bool[B, L]``."""
        if not bool(behind.any()):
            return self
        marks = behind[..., None].to(dtype)
        text = self.split(marks)[: self.n_language]
        return replace(self, behind=text, behind_last=marks[:, -1])

    def split(self, sequence: Tensor) -> Tensor:
        """``[B, L, ...]`` -> grouped ``[B * L, ...]``."""
        flat = sequence.flatten(0, 1)
        if not self.spans:
            return flat
        language = [flat[a:b] for a, b, vision in self.spans if not vision]
        return torch.cat(language + [flat[a:b] for a, b, vision in self.spans if vision])

    def join(self, grouped: Tensor) -> Tensor:
        """Grouped ``[B * L, ...]`` -> ``[B, L, ...]``."""
        if self.spans:
            taken = {False: 0, True: self.n_language}
            parts = []
            for start, end, vision in self.spans:
                begin = taken[vision]
                taken[vision] = begin + end - start
                parts.append(grouped[begin : taken[vision]])
            grouped = torch.cat(parts)
        return grouped.view(self.batch, self.length, *grouped.shape[1:])
