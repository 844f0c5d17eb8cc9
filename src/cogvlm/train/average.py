"""The exponential mean of what trains.  Knows nothing about models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """``mean = d * mean + (1 - d) * value`` after every step, in float32.

    ``d`` is ``decay``, but at most ``(1 + step) / (10 + step)``: the first steps do not stay in the
    mean for good.
    """

    def __init__(self, values: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().float().clone() for name, value in values.items()}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], step: int) -> None:
        """The values after ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, mean in self.values.items():
            mean.lerp_(values[name].float(), 1 - decay)

    def take(self, values: Mapping[str, Tensor]) -> None:
        """The means of a checkpoint."""
        for name, mean in self.values.items():
            mean.copy_(values[name])

    @contextmanager
    def used(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, ``values`` are overwritten by the means."""
        kept = {name: value.detach().clone() for name, value in values.items()}
        with torch.no_grad():
            for name, value in values.items():
                value.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in values.items():
                    value.copy_(kept[name])
