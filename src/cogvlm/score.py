"""How far an answer is from the truth; pure functions on strings."""

from __future__ import annotations

from collections.abc import Sequence


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters.

    >>> edit_distance("kitten", "sitting")
    3
    """
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def cer(predictions: Sequence[str], truths: Sequence[str]) -> float:
    """Character error rate: all edits over all characters of the truths.

    Args:
        predictions: as many as truths.
        truths: what is right.

    >>> cer(["abc", "x"], ["abd", "x"])
    0.25
    """
    edits = sum(edit_distance(p, t) for p, t in zip(predictions, truths, strict=True))
    return edits / max(1, sum(len(t) for t in truths))
