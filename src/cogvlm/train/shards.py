"""What a process holds of a model that processes divide, see :mod:`.distributed`.

::

    always          a share of weights, gradients, optimiser and mean
    zero2           weights whole, from a step's first use of them to its end
    fsdp            whole: what is no layer, the layer that works, and the next one
    both, loading   the model, before it is divided
    tensor          its share of every matrix that is cut, and all of the rest
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.parallel import style_of
from .compute import layers


@dataclass(frozen=True)
class Shards:
    """Bytes."""

    whole: int  # weights that are gathered at one time
    gradient: int  # of one piece, before it is divided


def shards(model: nn.Module, kind: str, one_size: bool) -> Shards:
    """Of a model that is ready to train, in the numbers that it is computed in.

    Args:
        model: of tensors with or without memory.
        kind: ``zero2`` or ``fsdp``.
        one_size: whether the layers of the tower are pieces of their own, as
            :func:`cogvlm.train.distributed.share` makes them.
    """
    vision = model.get_submodule("model.vision")
    inside = set(vision.modules())
    sizes: dict[nn.Module, int] = {}
    gradients: dict[nn.Module, int] = {}
    taken: set[int] = set()
    for piece in [x for x in layers(model) if one_size or x not in inside] + [vision, model]:
        own = [p for p in piece.parameters() if id(p) not in taken]
        taken |= set(map(id, own))
        sizes[piece] = sum(p.numel() * p.element_size() for p in own)
        gradients[piece] = sum(4 * p.numel() for p in own if p.requires_grad)
    whole = sum(sizes.values())
    if kind == "fsdp":
        rest = sizes[model]
        whole = min(
            whole, rest + 2 * max(size for piece, size in sizes.items() if piece is not model)
        )
    return Shards(whole, max(gradients.values()))


def own(model: Any, processes: int) -> None:
    """Leave what one process holds of a model that is cut inside its layers, in place.

    What its layers take and give keeps its shape: so a step takes what that of one process does.

    Args:
        model: without memory, ready to train.
        processes: that share it.
    """
    for name, module in list(model.named_modules()):
        style = style_of(model, name)
        if style is None:
            continue
        base = getattr(module, "base_layer", module)
        down = style.startswith("rowwise")
        _keep(base, processes, dim=1 if down else 0)
        if style == "colwise_gather_output":
            base.forward = partial(_gathered, base, processes)
        elif style == "rowwise_split_input":
            base.forward = partial(_split, base)
        elif base is not module and not style.startswith("embedding"):
            for linear in getattr(module, "lora_A" if down else "lora_B").values():
                _keep(linear, processes, dim=1 if down else 0)


def _keep(module: Any, processes: int, dim: int) -> None:
    """A share of a weight, and of the bias that goes with its outputs."""
    for name in ("weight",) if dim else ("weight", "bias"):
        whole = getattr(module, name, None)
        if whole is not None:
            count = -(-whole.shape[dim] // processes)
            share = whole.detach().narrow(dim, 0, count).clone()
            setattr(module, name, nn.Parameter(share, requires_grad=whole.requires_grad))


def _gathered(linear: nn.Linear, processes: int, x: Tensor) -> Tensor:
    part = F.linear(x, linear.weight, linear.bias)
    return torch.cat([part] * processes, -1)[..., : linear.out_features]


def _split(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x[..., : linear.weight.shape[1]].contiguous(), linear.weight, linear.bias)
