"""What a process holds of a model that ``zero2`` and ``fsdp`` divide, see :mod:`.distributed`.

::

    always          a share of weights, gradients, optimiser and mean
    zero2           weights whole, from a step's first use of them to its end
    fsdp            whole: what is no layer, the layer that works, and the next one
    both, loading   the model, before it is divided
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

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
