"""Tensor names on disk and ours, both directions; what is missing is said by name.

The released names are our names, so a released folder needs no renaming.  Llama-type language
models keep queries, keys and values apart::

    model.layers.N.self_attn.{q,k,v}_proj    language_expert_query_key_value  (rows q | k | v)
    model.layers.N.self_attn.o_proj          language_expert_dense
    model.layers.N.mlp.{gate,up,down}_proj   mlp.language_mlp.{gate,up,down}_proj
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_RENAMED = {
    "self_attn.o_proj.weight": "self_attn.language_expert_dense.weight",
    **{
        f"mlp.{part}_proj.weight": f"mlp.language_mlp.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}
_FUSED = "self_attn.language_expert_query_key_value.weight"
_VISION = re.compile(
    r"\.vision_expert_|\.vision_mlp\.|^model\.(cross_)?vision\."
    r"|\.cross_attn\.|\.post_cross_attention_layernorm\."  # CogAgent
)


def is_vision(name: str) -> bool:
    """Whether a tensor belongs to an encoder, the adapter, an expert or cross-attention."""
    return bool(_VISION.search(name))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        CheckpointError: it is missing, truncated or no safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a model's folder or name") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged or no safetensors file ({error}); fetch it again"
        ) from error


def from_llama(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a Llama-type causal language model under our names.

    Raises:
        CheckpointError: a tensor that such a model does not have, or lacks.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            ours[name] = tensor
            continue
        layer, rest = found.groups()
        if rest == "self_attn.q_proj.weight":
            parts = [f"model.layers.{layer}.self_attn.{p}_proj.weight" for p in "qkv"]
            report((), [p for p in parts if p not in tensors], "language model")
            ours[f"model.layers.{layer}.{_FUSED}"] = torch.cat([tensors[p] for p in parts])
        elif rest in _RENAMED:
            ours[f"model.layers.{layer}.{_RENAMED[rest]}"] = tensor
        elif rest.endswith("layernorm.weight"):
            ours[name] = tensor
        elif rest not in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            raise CheckpointError(
                f"language model: tensor {name!r} belongs to no Llama-type model without biases"
            )
    return ours


def to_llama(tensors: Mapping[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """The language part of our tensors under Llama names; vision tensors are left out.

    Args:
        tensors: ours.
        heads: query heads.
        kv_heads: key and value heads.
    """
    back = {v: k for k, v in _RENAMED.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_vision(name) or name.endswith("inv_freq"):
            continue
        found = _LAYER.fullmatch(name)
        rest = found.group(2) if found else ""
        if rest == _FUSED:
            dim = len(tensor) // (heads + 2 * kv_heads)
            pieces = tensor.split((heads * dim, kv_heads * dim, kv_heads * dim))
            for part, piece in zip("qkv", pieces, strict=True):
                key = name.replace("language_expert_query_key_value", f"{part}_proj")
                theirs[key] = piece.clone()
        elif rest in back:
            theirs[name.replace(rest, back[rest])] = tensor
        else:
            theirs[name] = tensor
    return theirs


def report(unexpected: Iterable[str], missing: Iterable[str], where: str) -> None:
    """Raise if any tensor is missing or left over, naming the first few.

    Raises:
        CheckpointError: with the names and what to do.
    """
    complaints = []
    for word, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            complaints.append(f"{len(names)} {word} tensors: {', '.join(names[:4])}{more}")
    if complaints:
        raise CheckpointError(
            f"{where}: {'; '.join(complaints)}; check that config.json and the weights belong "
            "to the same model"
        )
