"""Linear layers over weights in eight or four bits, and the tensors of torchao they hold.

Short inputs go through kernels of torchao and torch.  On the CPU a long one (a prompt, a picture)
is multiplied by weights that are made float32 again, a slab at a time: the kernels compute in
bfloat16 there, for which most CPUs have no unit.  Measured on one core with AVX2, in thousand
million operations a second: kernel of int8 25, of int4 30 to 40, plain bfloat16 10, float32 70.

Knows nothing about files, models, or which weights are quantised.

Shapes: a matrix has ``N`` rows (outputs) and ``K`` columns (inputs), ``g`` weights share a scale.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ResourceError

_SLAB = 1 << 23  # weights that are float32 at one time: 34 MB
_PART = 1 << 23  # numbers of the input or output that are: 34 MB
_UNIT = 32  # rows and columns that torch's int8 kernel is known to be right for
_PACKED = 64  # rows that are packed on their own: every packing known joins 16, 32 or 64
FEW = 16  # rows of an input below which every kind of layer takes its kernel
Product = Callable[[Tensor], Tensor]


def _answers_on_cpu(x: Tensor) -> bool:
    """Whether nothing is to be differentiated, and it is on the CPU."""
    return x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


class QuantisedLinear(nn.Linear):
    """``x W^T + b`` over quantised weights; the result has the dtype of ``x``."""

    long = 0  # rows of an input from which slabs are faster than the kernel

    def __init__(self, plain: nn.Linear, weight: Tensor) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.bias = plain.bias
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``float[..., K]`` -> ``float[..., N]``, of the same dtype."""
        is_long = _answers_on_cpu(x) and x.numel() >= self.long * self.in_features
        if is_long and self.restorable():
            return self.by_slabs(x)
        return self.by_kernel(x)

    def by_slabs(self, x: Tensor) -> Tensor:
        """The product in float32; the weights are restored once for every part of the input."""
        flat = x.reshape(-1, self.in_features)
        out = flat.new_empty(len(flat), self.out_features)
        step = max(_PACKED, _SLAB // self.in_features // _PACKED * _PACKED)
        length = max(1, _PART // max(self.in_features, min(step, self.out_features)))
        for part, place in zip(flat.split(length), out.split(length), strict=True):
            whole = part.float()
            for first in range(0, self.out_features, step):
                last = min(first + step, self.out_features)
                y = whole @ self.restored(first, last)
                if self.bias is not None:
                    y += self.bias[first:last]
                place[:, first:last] = y
        return out.view(*x.shape[:-1], self.out_features)

    def by_kernel(self, x: Tensor) -> Tensor:
        """The product as torchao computes it."""
        raise NotImplementedError

    def bare(self) -> Product:
        """:meth:`forward` for less than :data:`FEW` rows, ``float[b, K]``, without gradients.

        On the CPU it is a function of the tensors alone: one row through a narrow layer takes
        longer in the module than in the kernel.
        """
        return self

    def restorable(self) -> bool:
        """Whether :meth:`restored` knows how the weights are packed."""
        return True

    def restored(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of the weights, transposed: ``float32[K, last - first]``."""
        raise NotImplementedError


class Int8Linear(QuantisedLinear):
    """int8 with a scale a row."""

    long = FEW

    def by_kernel(self, x: Tensor) -> Tensor:
        """See :class:`QuantisedLinear`; where torch has a kernel for the CPU, by that."""
        if not self._even() or not _answers_on_cpu(x):
            return F.linear(x, self.weight, self.bias)
        y = self._kernel()(x.reshape(-1, self.in_features).contiguous())
        return y.view(*x.shape[:-1], self.out_features)

    def bare(self) -> Product:
        """See :class:`QuantisedLinear`."""
        return self._kernel() if self._even() and self.weight.device.type == "cpu" else self

    def _even(self) -> bool:
        return self.in_features % _UNIT == 0 and self.out_features % _UNIT == 0

    def _kernel(self) -> Product:
        weight: Any = self.weight
        ones = _ones(self.out_features)
        return partial(_times_int8, weight.qdata, weight.scale.t(), ones, self.bias)

    def restored(self, first: int, last: int) -> Tensor:
        """See :class:`QuantisedLinear`."""
        weight: Any = self.weight
        codes: Tensor = weight.qdata[first:last]
        scale: Tensor = weight.scale[first:last]
        return (codes.float() * scale).t()


class Int4Linear(QuantisedLinear):
    """int4 with a scale and a zero for each group; its kernels multiply in bfloat16.

    Those of both CPU and CUDA want bfloat16 (that of the CPU takes float32 too, at a hundredth of
    the speed).
    """

    long = 128

    def by_kernel(self, x: Tensor) -> Tensor:
        """See :class:`QuantisedLinear`; on the CPU without torchao's way to the same operator."""
        if _answers_on_cpu(x):
            y = self._kernel()(x.reshape(-1, self.in_features).contiguous())
            return y.view(*x.shape[:-1], self.out_features)
        y = F.linear(x.to(torch.bfloat16), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def bare(self) -> Product:
        """See :class:`QuantisedLinear`."""
        return self._kernel() if self.weight.device.type == "cpu" else self

    def _kernel(self) -> Product:
        weight: Any = self.weight
        group: int = weight.block_size[1]
        return partial(_times_int4, weight.qdata, group, weight.scale_and_zero, self.bias)

    def restorable(self) -> bool:
        """See :class:`QuantisedLinear`."""
        return self.out_features % _PACKED == 0 and _halves() > 0

    def restored(self, first: int, last: int) -> Tensor:
        """See :class:`QuantisedLinear`; both are multiples of 64."""
        weight: Any = self.weight
        group: int = weight.block_size[1]
        codes = _unpacked(weight.qdata[first:last], _halves())
        steps: Tensor = codes.view(-1, group, last - first)  # [K / g, g, n]
        pairs: Tensor = weight.scale_and_zero[:, first:last].float()  # [K / g, n, 2]
        scale, zero = pairs[..., 0], pairs[..., 1]
        steps.mul_(scale[:, None]).add_((zero - 8 * scale)[:, None])
        return steps.flatten(0, 1)


def _times_int8(
    codes: Tensor, scale: Tensor, ones: Tensor, bias: Tensor | None, x: Tensor
) -> Tensor:
    """``float[b, K]`` -> ``float[b, N]``."""
    # Scales would be rounded to bfloat16 inside; here the product is float32, as they are.
    y = torch._weight_int8pack_mm(x.to(torch.bfloat16), codes, ones) * scale
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def _times_int4(
    codes: Tensor, group: int, scales: Tensor, bias: Tensor | None, x: Tensor
) -> Tensor:
    """``float[b, K]`` -> ``float[b, N]``."""
    multiply: Any = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    y: Tensor = multiply(x.to(torch.bfloat16), codes, group, scales).to(x.dtype)
    return y if bias is None else y + bias


@lru_cache(maxsize=64)
def _ones(count: int) -> Tensor:
    """``bfloat16[count]`` on the CPU; a step asks for the same few sizes a hundred times."""
    return torch.ones(count, dtype=torch.bfloat16)


# --- the packing of int4 ---


def _unpacked(packed: Tensor, rows: int) -> Tensor:
    """``uint8[n, K / 2]`` as the CPU's kernel has it -> ``float32[K, n]``, each 0 to 15.

    ``rows`` rows lie together, column after column; a byte holds two of a column, half of
    ``rows`` apart, the earlier in the low bits.
    """
    count, half = packed.shape
    blocks = packed.reshape(count // rows, 2 * half, rows // 2).transpose(0, 1)
    codes = torch.empty(2 * half, count // rows, 2, rows // 2)
    codes[:, :, 0] = blocks & 15
    codes[:, :, 1] = blocks >> 4
    return codes.view(2 * half, count)


@lru_cache(maxsize=1)
def _halves() -> int:
    """The ``rows`` of :func:`_unpacked` on this CPU, found by trying; 0: it packs differently."""
    made = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (2 * _PACKED, 32), generator=made, dtype=torch.int32)
    packed = _pack(codes)
    return next((n for n in (32, 64) if torch.equal(_unpacked(packed, n), codes.t())), 0)


def _pack(codes: Tensor) -> Tensor:
    pack: Any = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return pack(codes.int(), 1)  # type: ignore[no-any-return]


def split_codes(packed: Tensor) -> Tensor:
    """``uint8[N, K / 2]`` as a folder has it -> ``uint8[N, K]``, each 0 to 15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def _for_cpu(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    codes = parts["int4"]
    # Some rows at a time: the operator takes codes of 32 bits, eight times what it gives.
    rows = max(1, _SLAB // codes.shape[1] // _PACKED) * _PACKED
    packed = torch.cat([_pack(split_codes(some)) for some in codes.split(rows)])
    return packed, _scales(parts["scale"], parts["zero"])


def _for_cuda(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Columns padded to a multiple of 1024 (scale zero: they count nothing), as torchao does."""
    columns, groups = 2 * parts["int4"].shape[1], parts["scale"].shape[1]
    missing = -columns % 1024
    # Here the even columns are in the high four bits.
    swapped = parts["int4"] << 4 | parts["int4"] >> 4
    pack: Any = torch.ops.aten._convert_weight_to_int4pack
    packed = pack(F.pad(swapped, (0, missing // 2)), 8)
    more = (0, missing * groups // columns)
    return packed, _scales(F.pad(parts["scale"], more), F.pad(parts["zero"], more))


def _scales(scale: Tensor, zero: Tensor) -> Tensor:
    """``bfloat16[K / g, N, 2]``, as the kernels take them."""
    return torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


# --- torchao ---

Types = Mapping[str, Any]


def backend() -> Types:
    """The tensor types of torchao by name.

    Raises:
        ResourceError: torchao is not installed, or too old.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [logger.level for logger in loggers]
    for logger in loggers:  # on the CPU it tells which of its CUDA kernels it cannot load
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.prototype.quantization import int4
            from torchao.quantization import Int4TilePackedTo4dTensor, Int8Tensor
    except ImportError as error:
        raise ResourceError(
            "precision int8 and int4 need torchao 0.18 or later: pip install 'cogvlm[quant]' "
            f"({str(error).splitlines()[0]})"
        ) from error
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
    return {"int8": Int8Tensor, "cpu": int4.Int4OpaqueTensor, "cuda": Int4TilePackedTo4dTensor}


def quantised(
    plain: nn.Linear, parts: Mapping[str, Tensor], dtype: torch.dtype, types: Types
) -> QuantisedLinear:
    """A layer over the pieces of a matrix.

    Args:
        plain: the layer it stands for; its bias is taken.
        parts: ``int8`` and ``scale``, or ``int4``, ``scale`` and ``zero``, as
            :mod:`cogvlm.quantize` describes them, on the device where they stay.
        dtype: of the activations.
        types: what :func:`backend` gives.
    """
    rows, columns = plain.out_features, plain.in_features
    if "int8" in parts:
        weight = types["int8"](parts["int8"], parts["scale"], [1, columns], dtype)
        return Int8Linear(plain, weight)
    device = parts["int4"].device.type
    packed, scales = (_for_cuda if device == "cuda" else _for_cpu)(parts)
    group = columns // parts["scale"].shape[1]
    weight = types[device](packed, scales, [1, group], torch.Size((rows, columns)))
    return Int4Linear(plain, weight)
