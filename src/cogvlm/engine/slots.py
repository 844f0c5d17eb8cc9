"""Keys and values of the sequences that are being decoded, each in a row of its own.

Knows rows and lengths, not tokens.  ``R`` rows, ``K`` key/value heads, ``C`` columns, ``d`` head
width.  Sequence ``i`` has columns ``0 .. length_i`` of row ``i``; a mask hides the rest::

    row 0   k k k k k k .  .       no padding on the left, so that a newcomer never moves
    row 1   k k k .  .  .  .       the others; rows are kept together: when row 0 leaves,
    row 2   k k k k .  .  .        row 2 moves into its place

The buffers grow in blocks as they are needed, layer by layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .reuse import Layers

BLOCK = 256  # columns
_KEPT = 1024  # columns that an idle engine keeps


class Place:
    """A sequence's row and how many of its columns are filled."""

    def __init__(self, row: int) -> None:
        self.row, self.length = row, 0


class Slots:
    """The buffers of all layers: ``float[R, K, C, d]`` for keys and for values of each.

    Args:
        rows: at most.
    """

    def __init__(self, rows: int) -> None:
        self._most = rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def room(self, layer: int, like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, large enough; ``like`` is ``float[b, K, L, d]``."""
        if layer == len(self._keys):  # layers come in order the first time
            self._keys.append(like.new_empty(0, like.shape[1], 0, like.shape[3]))
            self._values.append(like.new_empty(0, like.shape[1], 0, like.shape[3]))
        for buffers in (self._keys, self._values):
            old = buffers[layer]
            if old.shape[0] < rows or old.shape[2] < columns:
                wide = max(old.shape[2], -(-columns // BLOCK) * BLOCK)
                tall = old.shape[0]
                if tall < rows:
                    tall = max(rows, min(2 * tall, self._most))
                # Zeros: a mask does not hide what is no number.
                new = old.new_zeros(tall, old.shape[1], wide, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                buffers[layer] = new
        return self._keys[layer], self._values[layer]

    def move(self, place: Place, row: int) -> None:
        """Move a sequence to another row."""
        for buffer in (*self._keys, *self._values):
            buffer[row, :, : place.length] = buffer[place.row, :, : place.length]
        place.row = row

    def wipe(self, place: Place) -> None:
        """Put zeros into a row."""
        for buffer in (*self._keys, *self._values):
            if place.row < len(buffer):
                buffer[place.row] = 0

    def read(self, place: Place, length: int) -> Layers:
        """A copy of the first ``length`` columns of every layer."""
        row = place.row
        pairs = zip(self._keys, self._values, strict=True)
        return [(k[row, :, :length].clone(), v[row, :, :length].clone()) for k, v in pairs]

    def fill(self, place: Place, layers: Layers, length: int) -> None:
        """Begin a sequence with ``length`` columns of a copy."""
        for layer, (keys, values) in enumerate(layers):
            mine = self.room(layer, keys[None], place.row + 1, length)
            mine[0][place.row, :, :length] = keys[:, :length]
            mine[1][place.row, :, :length] = values[:, :length]
        place.length = length

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers; 0 before the first."""
        buffers = (*self._keys, *self._values)
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in buffers)

    def release(self) -> None:
        """Nothing is decoded: give buffers back that one long prompt made large."""
        if self._keys and self._keys[0].shape[2] > _KEPT:
            self._keys, self._values = [], []


class View(Cache):
    """The rows of one forward pass as transformers' models want them.

    Either one sequence and any number of new tokens, or rows ``0 .. b`` and one new token each, and
    then for one pass only.
    """

    def __init__(self, slots: Slots, places: list[Place]) -> None:
        super().__init__(layers=[])
        self._slots, self._places = slots, places
        self._ends: tuple[Tensor, Tensor] | None = None  # rows and columns of the new tokens

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return len(self._places)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put ``float[b, K, L, d]`` behind what the rows hold; give the rows as far as filled."""
        first, new = self._places[0].row, key_states.shape[2]
        longest = max(place.length for place in self._places) + new
        rows = first + len(self._places)
        keys, values = self._slots.room(layer_idx, key_states, rows, longest)
        if len(self._places) == 1:
            start = self._places[0].length
            keys[first:rows, :, start:longest] = key_states
            values[first:rows, :, start:longest] = value_states
        else:
            if self._ends is None:  # the same in every layer
                index = torch.arange(first, rows, device=keys.device)
                ends = torch.tensor([p.length for p in self._places], device=keys.device)
                self._ends = index, ends
            index, where = (part.to(keys.device) for part in self._ends)
            keys[index, :, where] = key_states[:, :, 0]
            values[index, :, where] = value_states[:, :, 0]
        return keys[first:rows, :, :longest], values[first:rows, :, :longest]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row before this pass."""
        return max(place.length for place in self._places)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The same, for the mask."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that the mask covers, and the first of them."""
        return self.get_seq_length() + query_length, 0
