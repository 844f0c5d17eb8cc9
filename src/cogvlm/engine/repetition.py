"""Is the end of a sequence repeating itself?

Knows tokens as numbers only. A model that is caught in a loop would go on to the token limit; a
:class:`Repetition` sees it after ``MIN_TOKENS`` tokens and says how much of the end to drop, so
that one copy of the repeated unit is left::

    tokens   a b c   x y   x y   x y   x y  ...
                     kept  dropped
"""

from __future__ import annotations

MAX_UNIT = 32  # longest unit looked for, in tokens
MIN_TOKENS = 48  # the copies together must cover as many tokens
MIN_COPIES = 3  # and be at least as many


class Repetition:
    """Watches one sequence, token by token.

    >>> watch = Repetition()
    >>> for token in [7] + [1, 2] * 24:
    ...     watch.push(token)
    >>> watch.unit, watch.surplus
    (2, 46)
    """

    def __init__(self) -> None:
        self._recent: list[int] = []  # the last MAX_UNIT tokens, newest first
        self._runs = [0] * MAX_UNIT  # [n - 1]: trailing tokens equal to the one n before

    def push(self, token: int) -> None:
        """Take the next token."""
        recent = self._recent
        for i, run in enumerate(self._runs):
            self._runs[i] = run + 1 if i < len(recent) and recent[i] == token else 0
        recent.insert(0, token)
        del recent[MAX_UNIT:]

    @property
    def held(self) -> int:
        """Trailing tokens that may turn out to be surplus: at least ``surplus``, often 0."""
        return max(self._runs)

    @property
    def unit(self) -> int | None:
        """Length of the repeated unit in tokens, once it has been repeated enough."""
        for i, run in enumerate(self._runs):
            n = i + 1
            if run + n >= max(MIN_TOKENS, MIN_COPIES * n):
                return n
        return None

    @property
    def surplus(self) -> int:
        """Trailing tokens that repeat an earlier copy; 0 while :attr:`unit` is none."""
        return self._runs[self.unit - 1] if self.unit else 0
