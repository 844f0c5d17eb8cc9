"""What is kept from one request for the next: keys and values of prompts, features of pictures.

Knows tensors, not models.  ``L`` tokens, ``K`` key/value heads, ``d`` head width, ``D`` width.

Two sequences share keys and values as far as the model sees the same in both.  That is written
down token by token, as a *trace*, and compared::

    column   0    1     2        3, 4                    5 (6)
             id   type  expert   digest of the picture   position ids

Keys of a token depend on the tokens before it only, with one exception: what stands behind an image
token can change it (the end marker's expert, positions of images back to back, attention within an
image).  So a sequence is never cut inside a run of image tokens, of either sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Trace = NDArray[np.int64]  # int64[L, columns]
Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, float[K, L, d]

TYPE = 1  # column of the trace
_MOST_ENTRIES = 256  # comparing is quick, but not free
_WORTH = 16  # tokens; to copy fewer gains nothing


def trace(
    ids: NDArray[np.int64],
    types: NDArray[np.int64],
    experts: NDArray[np.bool_],
    pictures: Sequence[tuple[int, bytes]],
    positions: NDArray[np.int64],
) -> Trace:
    """Everything that the model sees of a prompt.

    Args:
        ids: ``int64[L]``.
        types: ``int64[L]``, 0 language, 1 image.
        experts: ``bool[L]``, which tokens go to the vision expert.
        pictures: tokens and digest of every picture, in order; together the image tokens.
        positions: ``int64[1 or 2, L]``.
    """
    seen = np.zeros((len(ids), 2), dtype=np.int64)
    if pictures:
        each = [np.frombuffer(name, dtype=np.int64) for _, name in pictures]
        seen[types == 1] = np.repeat(np.stack(each), [count for count, _ in pictures], axis=0)
    return np.concatenate((np.stack((ids, types, experts), 1), seen, positions.T), axis=1)


def common(new: Trace, old: Trace) -> int:
    """How many leading tokens of ``new`` can take the keys and values of ``old``.

    At least one token of ``new`` is left over, and no run of image tokens is cut.
    """
    most = min(len(new) - 1, len(old))
    same = (new[:most] == old[:most]).all(axis=1)
    count = most if same.all() else int(same.argmin())
    behind = bool(new[count, TYPE] == 1) or (count < len(old) and bool(old[count, TYPE] == 1))
    if behind:
        while count and new[count - 1, TYPE] == 1:
            count -= 1
    return count


class Prefixes:
    """Keys and values of finished sequences, the longest unused thrown away first.

    Args:
        limit: bytes that they may take.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._entries: OrderedDict[int, tuple[Trace, Layers, int]] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, new: Trace) -> tuple[int, Layers]:
        """The most tokens of ``new`` that an entry has, and its keys and values; or 0, none."""
        best, found = 0, None
        for key, (old, _, _) in self._entries.items():
            count = common(new, old)
            if count > best:
                best, found = count, key
        if found is None or best < _WORTH:
            return 0, []
        self._entries.move_to_end(found)
        return best, self._entries[found][1]

    def wants(self, new: Trace, size: int) -> bool:
        """Whether a sequence of ``size`` bytes should be put in: it fits, and says more."""
        if size > self.limit or len(new) < _WORTH:
            return False
        return not any(
            len(new) <= len(old) and bool((old[: len(new)] == new).all())
            for old, _, _ in self._entries.values()
        )

    def put(self, new: Trace, layers: Layers) -> None:
        """Keep a sequence; what it begins with need not be kept any more."""
        size = sum(part.nbytes for pair in layers for part in pair)
        for key, (old, _, _) in list(self._entries.items()):
            if len(old) <= len(new) and bool((new[: len(old)] == old).all()):
                self._drop(key)
        self._entries[self._next] = (new, layers, size)
        self._next += 1
        self.bytes += size
        while self.bytes > self.limit or len(self._entries) > _MOST_ENTRIES:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Give all memory back."""
        self._entries.clear()
        self.bytes = 0

    def _drop(self, key: int) -> None:
        self.bytes -= self._entries.pop(key)[2]


class Features:
    """Features ``float[T + 2, D]`` of pictures by digest, the longest unused thrown away first.

    Args:
        limit: bytes that they may take.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: bytes) -> Tensor | None:
        """The features, if they are here."""
        found = self._entries.get(name)
        if found is not None:
            self._entries.move_to_end(name)
        return found

    def put(self, name: bytes, features: Tensor) -> None:
        """Keep a copy, if it fits at all."""
        if features.nbytes > self.limit or name in self._entries:
            return
        # A copy: the features of several pictures are views of one tensor.
        self._entries[name] = features.clone()
        self.bytes += features.nbytes
        while self.bytes > self.limit:
            _, old = self._entries.popitem(last=False)
            self.bytes -= old.nbytes

    def clear(self) -> None:
        """Give all memory back."""
        self._entries.clear()
        self.bytes = 0
