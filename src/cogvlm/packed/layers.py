"""Linear layers over weights that other programs quantised: kept as stored, restored when used.

Knows nothing about files, configurations or models.  The restored weights are those that the
stored numbers mean, computed in float32 and rounded once, to the dtype of the activations.

Shapes: a matrix has ``N`` rows (outputs) and ``K`` columns (inputs); ``G`` groups a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLAB = 1 << 23  # weights that are restored at once: some 100 MB beside the model


class PackedLinear(nn.Module):
    """``x W^T + b``, with ``W`` restored some rows at a time; for answering, not for training."""

    def __init__(self, rows: int, columns: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.bias = bias
        self.unit = 1  # rows that can only be restored together

    def restore(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of the weights: ``float32[last - first, K]``.

        Both are multiples of ``unit``, or ``last`` is ``N``.
        """
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """All weights, restored: ``float32[N, K]``."""
        return self.restore(0, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """``float[..., K]`` -> ``float[..., N]``, of the same dtype."""
        step = max(1, _SLAB // (self.in_features * self.unit)) * self.unit
        slabs = []
        for first in range(0, self.out_features, step):
            weight = self.restore(first, min(first + step, self.out_features))
            slabs.append(F.linear(x, weight.to(x.dtype)))
        y = slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=-1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What printing the model shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class Nested:
    """Scales that are codes themselves: ``table[code] * scale of its block + offset``."""

    table: Tensor  # float32[256]
    scales: Tensor  # float32[blocks of scales]
    block: int
    offset: float


class BlockLinear(PackedLinear):
    """Four bits that name one of 16 values, times a scale for each block (bitsandbytes).

    Blocks are cut from the flattened matrix, so they may run across rows.

    Args:
        plain: the layer it stands for; its bias is taken.
        codes: ``uint8[ceil(N K / 2)]``, the earlier of two weights in the high four bits.
        scales: ``float32[ceil(N K / block)]``; ``uint8`` where ``nested`` says what they mean.
        table: ``float32[16]``.
        block: weights that share a scale; even.
        nested: none where scales are stored as they are.
    """

    codes: Tensor
    absmax: Tensor
    pairs: Tensor
    nested_table: Tensor
    nested_absmax: Tensor

    def __init__(
        self,
        plain: nn.Linear,
        codes: Tensor,
        scales: Tensor,
        table: Tensor,
        block: int,
        nested: Nested | None = None,
    ) -> None:
        super().__init__(plain.out_features, plain.in_features, plain.bias)
        byte = torch.arange(256, device=table.device)
        # Both weights of a byte are looked up together: eight bytes, moved as one number.
        pairs = torch.stack((table[byte >> 4], table[byte & 15]), dim=1)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", scales)
        self.register_buffer("pairs", pairs.view(torch.int64))
        self.block = block
        self.nested = None
        if nested is not None:
            self.register_buffer("nested_table", nested.table)
            self.register_buffer("nested_absmax", nested.scales)
            self.nested = (nested.block, nested.offset)
        # So that a slab begins with a block.
        while self.unit * self.in_features % block:
            self.unit += 1

    def scales(self) -> Tensor:
        """Of every block: ``float32[ceil(N K / block)]``."""
        if self.nested is None:
            return self.absmax
        block, offset = self.nested
        return _times(self.nested_table[self.absmax.int()], self.nested_absmax, block) + offset

    def restore(self, first: int, last: int) -> Tensor:
        """See :meth:`PackedLinear.restore`."""
        start, stop = first * self.in_features, last * self.in_features
        codes = self.codes[start // 2 : -(-stop // 2)]
        values = self.pairs.index_select(0, codes.int()).view(torch.float32).flatten()
        scales = self.scales()[start // self.block : -(-stop // self.block)]
        values = _times(values[: stop - start], scales, self.block)
        return values.view(last - first, self.in_features)


def _times(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each block of a flat tensor times its scale; the last may be short."""
    size = len(values)
    if missing := -size % block:
        values = F.pad(values, (0, missing))
    return (values.view(-1, block) * scales[:, None]).flatten()[:size]


class GroupLinear(PackedLinear):
    """Whole numbers with a scale and a zero for each group of columns: ``(q - zero) * scale``.

    Args:
        plain: the layer it stands for; its bias is taken.
        codes: ``uint8[N, K bits / 8]``, earlier columns in lower bits.
        scales: ``float[N, G]``.
        zeros: ``uint8[N, G]``.
        bits: 2, 4 or 8.
        order: ``int[K]``, the column that each stored one is; none where they lie in order.
    """

    codes: Tensor
    group_scales: Tensor
    zeros: Tensor
    place: Tensor

    def __init__(
        self,
        plain: nn.Linear,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bits: int,
        order: Tensor | None = None,
    ) -> None:
        super().__init__(plain.out_features, plain.in_features, plain.bias)
        self.bits = bits
        self.register_buffer("codes", codes)
        self.register_buffer("group_scales", scales)
        self.register_buffer("zeros", zeros)
        self.ordered = order is None
        if order is not None:
            self.register_buffer("place", order.argsort())

    def restore(self, first: int, last: int) -> Tensor:
        """See :meth:`PackedLinear.restore`."""
        codes = split(self.codes[first:last], self.bits).flatten(1)
        scales = self.group_scales[first:last, :, None].float()
        steps = codes.unflatten(1, (scales.shape[1], -1)) - self.zeros[first:last, :, None].float()
        weight: Tensor = (steps * scales).flatten(1)
        return weight if self.ordered else weight[:, self.place]


def split(packed: Tensor, bits: int) -> Tensor:
    """Bytes into the numbers they hold, the lowest bits first: ``uint8[..., 8 / bits]``."""
    if bits == 8:
        return packed[..., None]
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    numbers: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return numbers


def join(numbers: Tensor, bits: int) -> Tensor:
    """Numbers ``uint8[N, K]`` into bytes ``uint8[N, K bits / 8]``, the reverse of :func:`split`."""
    parts = numbers.unflatten(1, (-1, 8 // bits))
    out: Tensor = parts[..., 0].clone()
    for i in range(1, 8 // bits):
        out |= parts[..., i] << (bits * i)
    return out
