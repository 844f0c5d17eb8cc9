"""Four-bit layers of bitsandbytes itself: from what it stored, or quantised here (NF4).

bitsandbytes is imported when a layer is made.  Its layers run on CUDA; those of recent versions
on the CPU too, which is how they are tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResourceError

KINDS = ("nf4", "fp4")
_HINT = "pip install 'cogvlm[nf4]'"


def backend() -> Any:
    """The package bitsandbytes.

    Raises:
        ResourceError: it is not installed, or does not fit this torch.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise ResourceError(
            f"precision nf4 needs bitsandbytes: {_HINT} ({str(error).splitlines()[0]})"
        ) from error
    return bitsandbytes


def usable(device: torch.device) -> bool:
    """Whether its kernels are to be taken: on CUDA, where it is installed."""
    if device.type != "cuda":
        return False
    try:
        backend()
    except ResourceError:
        return False
    return True


def refuse(device: torch.device) -> None:
    """Raise :class:`ResourceError` if NF4 cannot be made on ``device``; says what to take."""
    if device.type != "cuda":
        other = "int4" if device.type == "cpu" else "int8"
        raise ResourceError(
            f"precision nf4 is for CUDA, not for {device.type}; take {other} (folders that are "
            "stored in nf4 are read on every device)"
        )
    backend()


def from_stored(plain: nn.Linear, parts: Mapping[str, Tensor]) -> nn.Module:
    """Its layer over the tensors of a file, which must have been checked.

    Args:
        plain: the layer it stands for; its bias is taken.
        parts: as :mod:`.formats` names them.
    """
    bnb = backend()
    kind = _kind_of(bnb, parts["quant_state"])
    rest = {n: t for n, t in parts.items() if n not in ("weight", "quant_state")}
    weight = bnb.nn.Params4bit.from_prequantized(
        data=parts["weight"].contiguous().view(-1, 1),
        quantized_stats={**rest, f"quant_state.bitsandbytes__{kind}": parts["quant_state"]},
        device=parts["weight"].device,
    )
    return _layer(bnb, plain, weight)


def _kind_of(bnb: Any, blob: Tensor) -> str:
    return str(bnb.utils.unpack_tensor_to_dict(blob)["quant_type"])


def quantised(plain: nn.Linear, weight: Tensor) -> nn.Module:
    """Its layer over ``weight``, quantised here: NF4 in blocks of 64, scales quantised again.

    Args:
        plain: the layer it stands for; its bias is taken.
        weight: ``float[N, K]``, on the device where it is to run.
    """
    bnb = backend()
    made = bnb.nn.Params4bit(
        weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return _layer(bnb, plain, made.to(weight.device))


def _layer(bnb: Any, plain: nn.Linear, weight: Any) -> nn.Module:
    layer: nn.Module = bnb.nn.Linear4bit(
        plain.in_features,
        plain.out_features,
        bias=False,
        quant_type=weight.quant_type,
        device="meta",
    )
    layer.weight = weight
    layer.bias = plain.bias
    layer.quant_state = weight.quant_state
    return layer.requires_grad_(False).eval()
