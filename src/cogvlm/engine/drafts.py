"""Guesses at how an answer goes on: as the prompt, or the answer itself, once went on already.

Knows token ids only.  An answer that quotes what was read runs along with the prompt, and a model
checks several tokens at once almost as fast as it makes one::

    prompt   ... Milk 1.20 | Bread 2.40 | Eggs 3.10 ...
    answer   Milk 1.20 | Bread            the last tokens stand in the prompt
    guess                      2.40 | Eggs

What is guessed wrong costs time and nothing else: every token is still the model's own choice.
Source: prompt lookup decoding, after "Inference with Reference" (2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence

_LEAST = 2  # tokens that must have stood there before
_LONGEST = 16  # tokens that are compared
_PLACES = 32  # the latest ones are looked at
_FIRST = 3  # tokens of the first guess


class Drafts:
    """Of one sequence.

    Guesses that were right become longer, and after a wrong one more tokens must have stood there
    before.

    Args:
        prompt: its ids; an id that cannot be generated does no harm.
        most: tokens of a guess.

    >>> drafts = Drafts([1, 2, 3, 4, 5, 6, 7, 8], most=4)
    >>> for token in (2, 3):
    ...     drafts.add(token)
    >>> drafts.guess(9)
    [4, 5, 6]
    >>> drafts.learn(3, 3)
    >>> drafts.guess(9)
    [4, 5, 6, 7]
    """

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, int], list[int]] = {}  # two tokens -> places behind them
        self._most, self._length, self._least = most, min(_FIRST, most), _LEAST
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> None:
        """Take the next token."""
        self._ids.append(token)
        if len(self._ids) >= _LEAST:
            pair = (self._ids[-2], token)
            self._ends.setdefault(pair, []).append(len(self._ids))

    def guess(self, limit: int) -> list[int]:
        """The next tokens, ``limit`` at most; none where nothing speaks for any."""
        if len(self._ids) < _LEAST:
            return []
        places = self._ends[self._ids[-2], self._ids[-1]][-_PLACES - 1 : -1]
        alike, place = max(((self._alike(p), p) for p in places), default=(0, 0))
        if alike < self._least:
            return []
        return self._ids[place : place + min(self._length, limit)]

    def learn(self, right: int, guessed: int) -> None:
        """How many tokens of a guess were."""
        if right == guessed:
            self._length = min(2 * self._length + 1, self._most)
        else:
            self._length = min(max(right + 1, _FIRST), self._most)
        self._least = _LEAST if right else min(self._least + 1, _LONGEST)

    def _alike(self, place: int) -> int:
        """How many tokens before a place are the last ones."""
        ids, end = self._ids, len(self._ids)
        for n in range(min(_LONGEST, place)):
            if ids[place - 1 - n] != ids[end - 1 - n]:
                return n
        return min(_LONGEST, place)
