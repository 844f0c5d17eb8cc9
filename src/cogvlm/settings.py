"""How an answer is chosen and where it ends: the values, checked.

Knows nothing of models; a remote server gets the same settings as a model of this machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is chosen and where it ends.

    Raises:
        ConfigError: a value is out of its range; the field is named.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    top_k: int = 0  # sample from so many tokens; 0: all
    seed: int | None = None  # of sampling; the same seed, batch and machine give the same text
    repetition_stop: bool = True  # end an answer that repeats itself, and keep one copy

    def __post_init__(self) -> None:
        require("max_new_tokens", self.max_new_tokens, int, 1, math.inf)
        require("temperature", self.temperature, (int, float), 0.0, 100.0)
        require("top_p", self.top_p, (int, float), 0.0, 1.0)
        require("top_k", self.top_k, int, 0, math.inf)
        if self.top_p == 0.0:
            raise ConfigError("top_p=0 leaves no token; for greedy decoding say temperature=0")
        if self.seed is not None:
            require("seed", self.seed, int, 0, 2**63 - 1)
        if not isinstance(self.repetition_stop, bool):
            raise ConfigError(f"repetition_stop={self.repetition_stop!r} is not true or false")


def require(name: str, value: Any, kind: Any, low: float, high: float) -> None:
    """Raise :class:`ConfigError` if a setting is of another kind or out of its range."""
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name}={value!r} is not {wanted}")
    if not low <= value <= high:
        upper = f" to {high:g}" if high < math.inf else " or more"
        raise ConfigError(f"{name}={value!r} is out of range: give {low:g}{upper}")
