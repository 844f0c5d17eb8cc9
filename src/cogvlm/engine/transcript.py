"""Tokens of one answer to text that may be shown, and where the answer ends.

Knows nothing of models.  Three things hold text back until it is decided: half of a character, what
may become a stop string, and what may become the surplus of a repetition::

    tokens   " a"  " red"  " b"  "us"  " b"  "us"        stop string "us stop"
    given    " a red b"           held back: the rest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..processor import Detokenizer
from ..processor.tokenizer import Tokenizer
from .repetition import Repetition
from .sampling import TokenLogprob


@dataclass(frozen=True)
class Piece:
    """What is new of an answer; pieces joined are the whole."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class Transcript:
    """The answer so far.

    Args:
        tokenizer: makes text of ids.
        stop: the answer ends before the first of these.
        repetition: whether to end an answer that repeats itself.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], repetition: bool) -> None:
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self._ends: list[int] = []  # characters of the text with each token
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._watch = Repetition() if repetition else None
        self._shown = self._given = 0  # characters and tokens that are given out

    def add(self, token: int, logprob: TokenLogprob | None = None) -> str | None:
        """Take a token; ``stop`` or ``repetition`` if the answer ends with that, and is cut."""
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        self.text += self._detokenizer.add(token)
        self._ends.append(len(self.text))
        if self._cut_at_stop():
            return "stop"
        if self._watch is not None:
            self._watch.push(token)
            if self._watch.unit is not None:
                self._keep(len(self.ids) - self._watch.surplus)
                return "repetition"
        return None

    def finish(self) -> bool:
        """Add what is left of a broken character; true if that ends it with a stop string."""
        self.text += self._detokenizer.finish()
        if self._ends:
            self._ends[-1] = len(self.text)
        return self._cut_at_stop()

    def fresh(self, last: bool = False) -> Piece | None:
        """What is certain and was not given out; with ``last`` all of the rest."""
        safe = len(self.text) if last else self._safe()
        tokens = len(self.ids) if last else self._given
        while tokens < len(self.ids) and self._ends[tokens] <= safe:
            tokens += 1
        if safe <= self._shown and not (last and tokens > self._given):
            return None
        logprobs = tuple(self.logprobs[self._given : tokens])
        piece = Piece(
            self.text[self._shown : safe], tuple(self.ids[self._given : tokens]), logprobs
        )
        self._shown, self._given = safe, tokens
        return piece

    def _safe(self) -> int:
        """Characters that nothing can take back."""
        safe = len(self.text)
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self.text)), 0, -1):
                if self.text.endswith(stop[:size]):
                    safe = min(safe, len(self.text) - size)
                    break
        held = self._watch.held if self._watch is not None else 0
        if held:
            place = len(self.ids) - held
            safe = min(safe, self._ends[place - 1] if place else 0)
        return max(safe, self._shown)

    def _cut_at_stop(self) -> bool:
        # What may become a stop string was never shown: none can begin before.
        places = [self.text.find(stop, self._shown) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if not found:
            return False
        self.text = self.text[: min(found)]
        starts = [0, *self._ends[:-1]]
        # A token stays if the answer shows something of it.
        self._keep(sum(start < len(self.text) for start in starts), cut_text=False)
        return True

    def _keep(self, tokens: int, cut_text: bool = True) -> None:
        tokens = max(tokens, self._given)
        del self.ids[tokens:], self.logprobs[tokens:], self._ends[tokens:]
        if cut_text:
            self.text = self.text[: max(self._shown, self._ends[-1] if self._ends else 0)]
