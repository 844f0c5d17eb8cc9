"""Gradients through layers of eight and four bits, whose kernels have none.

The weights stay as they are; what trains are LoRAs beside them and whatever lies before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import QuantisedLinear

_ROWS = 1024  # of the weights that are float32 at one time; a multiple of every packing


class _Frozen(torch.autograd.Function):
    """``x W^T + b`` with a gradient for ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return type(layer).forward(layer, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return _times_weight(grad.float(), ctx.layer).to(grad.dtype), None


def _times_weight(grad: Tensor, layer: QuantisedLinear) -> Tensor:
    """``float32[..., N]`` times ``W``: ``float32[..., K]``."""
    if layer.weight.device.type != "cpu" or not layer.restorable():
        # The kernel's own idea of the weights, read off a unit matrix: W^T, without the bias.
        unit = torch.eye(layer.in_features, device=grad.device, dtype=torch.bfloat16)
        columns = layer.by_kernel(unit).float()
        if layer.bias is not None:
            columns -= layer.bias.float()
        return grad @ columns.t()
    total: Tensor | None = None
    for first in range(0, layer.out_features, _ROWS):
        last = min(first + _ROWS, layer.out_features)
        part = grad[..., first:last] @ layer.restored(first, last).t()
        total = part if total is None else total + part
    assert total is not None
    return total


def let_gradients_through(model: nn.Module) -> int:
    """Make every quantised layer of ``model`` pass gradients on; returns how many there are."""
    layers = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: QuantisedLinear, x: Tensor) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # which does not know these layers
        x = x.to(torch.get_autocast_dtype(kind))
    if torch.is_grad_enabled() and x.requires_grad:
        return _Frozen.apply(x, layer)  # type: ignore[no-any-return]
    with torch.autocast(kind, enabled=False):
        return type(layer).forward(layer, x)
