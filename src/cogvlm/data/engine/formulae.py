"""Made-up formulae as LaTeX, of the kinds that papers have.  Knows nothing about TeX."""

from __future__ import annotations

from collections.abc import Callable

from . import words
from .step import Random

_LATIN = tuple("abcdfghkmnpqrstuvwxyzABFGHKLMNPQRSTVXYZ")
_GREEK = (
    r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\theta", r"\lambda", r"\mu", r"\pi",
    r"\rho", r"\sigma", r"\phi", r"\omega", r"\Delta", r"\Omega", r"\Phi",
)  # fmt: skip
_RELATIONS = ("=", "=", "=", r"\le", r"\ge", "<", ">", r"\approx", r"\neq", r"\propto")
_SIGNS = ("+", "-", "+", r"\cdot")
_ENDS = ("n", "N", "k", r"\infty")
_FUNCTIONS = (r"\sin", r"\cos", r"\log", r"\exp", r"\tan", r"\max", r"\min")


def formula(rng: Random, small: bool = False) -> str:
    """A formula that stands alone, or one to stand in a line of text.

    >>> import numpy as np
    >>> print(formula(np.random.default_rng(2), small=True))
    f = \\beta_{k} - c
    """
    depth = 1 if small else int(rng.integers(1, 4))
    if not small and rng.random() < 0.12:
        return _matrix(rng)
    left = _symbol(rng)
    if not small and rng.random() < 0.3:
        left = f"{words.pick(rng, ('f', 'g', 'P', 'E'))}({_symbol(rng)})"
    return f"{left} {words.pick(rng, _RELATIONS)} {_sum(rng, depth)}"


def _symbol(rng: Random) -> str:
    base = words.pick(rng, _LATIN if rng.random() < 0.7 else _GREEK)
    chance = rng.random()
    if chance < 0.25:
        return f"{base}_{{{words.pick(rng, ('i', 'j', 'n', '0', '1', 'k'))}}}"
    return f"{base}^{{{words.pick(rng, ('2', '3', 'n', '-1', 'T'))}}}" if chance < 0.4 else base


def _number(rng: Random) -> str:
    return str(int(rng.integers(1, 20))) if rng.random() < 0.8 else f"{rng.uniform(0, 9):.2f}"


def _sum(rng: Random, depth: int) -> str:
    parts = [_term(rng, depth) for _ in range(int(rng.integers(1, 4)))]
    text = parts[0]
    for part in parts[1:]:
        text += f" {words.pick(rng, _SIGNS)} {part}"
    return text


def _term(rng: Random, depth: int) -> str:
    if depth <= 1:
        return _symbol(rng) if rng.random() < 0.75 else _number(rng)
    return words.pick(rng, _TERMS)(rng, depth - 1)


def _fraction(rng: Random, depth: int) -> str:
    return f"\\frac{{{_sum(rng, depth)}}}{{{_sum(rng, depth)}}}"


def _root(rng: Random, depth: int) -> str:
    return f"\\sqrt{{{_sum(rng, depth)}}}"


def _series(rng: Random, depth: int) -> str:
    sign = words.pick(rng, (r"\sum", r"\prod"))
    return f"{sign}_{{i=1}}^{{{words.pick(rng, _ENDS)}}} {_term(rng, depth)}"


def _integral(rng: Random, depth: int) -> str:
    low, high = words.pick(rng, (("0", "1"), ("a", "b"), ("0", r"\infty"), (r"-\infty", r"\infty")))
    return f"\\int_{{{low}}}^{{{high}}} {_term(rng, depth)} \\, dx"


def _function(rng: Random, depth: int) -> str:
    return f"{words.pick(rng, _FUNCTIONS)}\\left({_sum(rng, depth)}\\right)"


def _power(rng: Random, depth: int) -> str:
    return f"\\left({_sum(rng, depth)}\\right)^{{{words.pick(rng, ('2', '3', 'n', '1/2'))}}}"


def _matrix(rng: Random) -> str:
    n = int(rng.integers(2, 4))
    rows = r" \\ ".join(" & ".join(_term(rng, 1) for _ in range(n)) for _ in range(n))
    return f"{words.pick(rng, 'ABMX')} = \\begin{{pmatrix}} {rows} \\end{{pmatrix}}"


_TERMS: tuple[Callable[[Random, int], str], ...] = (
    _fraction, _root, _series, _integral, _function, _power, _fraction,
    lambda rng, depth: _term(rng, 1),
)  # fmt: skip
