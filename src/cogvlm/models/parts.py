"""Layers that spare memory and time: wide ones over long inputs, convolutions on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 1024

Forward = Callable[[Any, Tensor], Tensor]


def in_parts(forward: Forward) -> Forward:
    """Make a ``forward`` of ``float[..., L, D]`` that takes every token on its own work in parts.

    What it holds in between is then as long as a part: of a picture of 9,217 patches, the widest
    moment of CogVLM2's tower is 0.06 GB and not 0.6.  Not where gradients are wanted, which keep
    all of it anyway.
    """

    @wraps(forward)
    def run(self: Any, x: Tensor) -> Tensor:
        if x.shape[-2] <= TOKENS or torch.is_grad_enabled():
            return forward(self, x)
        return torch.cat([forward(self, part) for part in x.split(TOKENS, dim=-2)], dim=-2)

    return run


class Conv(nn.Conv2d):
    """A convolution without padding, on the CPU in float32 where the weights are bfloat16.

    Most CPUs have no unit for bfloat16, and torch's own loop is a hundred times slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``float[N, C, H, W]`` -> ``float[N, D, H', W']``, of the same dtype."""
        if x.device.type != "cpu" or x.dtype is not torch.bfloat16:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        y = F.conv2d(x.float(), self.weight.float(), bias, self.stride)
        return y.to(x.dtype)
