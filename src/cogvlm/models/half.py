"""Float16 without overflow: its largest number is 65504, and infinities become NaN in a norm.

What is done, in float16 only (bfloat16 and float32 are left to the bit)::

    norms                   RMSNorm in float32; torch's LayerNorm adds up in float32
    scores, softmax         in float32
    residual of the decoder in float32: the sum of all layers is what grows most
    gated MLPs              gate * up in float32, scaled down token by token to what the next
                            matrix takes, and up again behind it, where the sum is float32
    MLPs of the tower       likewise, and the norm behind them takes a smaller copy
    anything else           what overflows stays at the largest number

Knows nothing about which layer is which.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float16).max
# Rows of the next matrix may sum up to 256 in absolute value before its product overflows.
_ROOM = 256.0


def widened(x: Tensor) -> Tensor:
    """Float16 as float32, anything else as it is."""
    return x.float() if x.dtype is torch.float16 else x


def saturated(x: Tensor) -> Tensor:
    """Infinities of float16 as its largest number; finite values and other dtypes as they are."""
    return x.clamp(-LARGEST, LARGEST) if x.dtype is torch.float16 else x


def shrunk(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 as float16 and the power of two that each token was divided by, at least 1.

    Args:
        x: ``float32[..., n]``.

    Returns:
        ``float16[..., n]`` of at most 256, and ``float32[..., 1]``.
    """
    top = x.detach().abs().amax(dim=-1, keepdim=True)
    scale = (top / _ROOM).log2().ceil().clamp(min=0).exp2()
    return (x / scale).half(), scale


def gated(
    activation: Callable[[Tensor], Tensor],
    gate: Tensor,
    up: Tensor,
    down: Callable[[Tensor], Tensor],
) -> Tensor:
    """``down(activation(gate) * up)``; of float16 the result is float32, and right where the
    product or the result is beyond float16.
    """
    if gate.dtype is not torch.float16:
        return down(activation(gate) * up)
    inner, scale = shrunk(activation(saturated(gate).float()) * saturated(up).float())
    return down(inner).float() * scale


def biased(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A float16 layer with a bias of a float32 input: ``float32``, right beyond float16 too."""
    inner, scale = shrunk(x)
    y = layer(inner).float()
    if not bool((scale > 1).any()):
        return y
    bias = layer(torch.zeros_like(inner[..., :1, :])).float()  # wherever the layer keeps it
    return (y - bias) * scale + bias


def fitted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a scale-blind norm in ``dtype`` is given: float32 scaled into float16, or ``x``."""
    return shrunk(x)[0] if dtype is torch.float16 else x
