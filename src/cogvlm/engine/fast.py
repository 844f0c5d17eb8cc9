"""One more text token for every row, in as few operators as the decoder allows.

A step on a CPU spends as long on small operators as on reading some weights, so what a text token
does not need is left out: routing between experts, masks made anew, keys repeated for every head.
What is computed is what ``models/language.py`` computes, to rounding, with its own modules; a model
that this does not know takes its steps through its own ``forward``.

``b`` rows, ``D`` width, ``H`` query heads, ``K`` key/value heads, ``d`` head width, ``C`` columns,
``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.cogvlm import CogVLMForCausalLM, CogVLMModel
from ..models.language import DecoderLayer, RMSNorm
from .slots import View


def is_known(model: Any) -> bool:
    """Whether :func:`step` computes what the model does: its own classes, whole on one device."""
    return (
        type(model) is CogVLMForCausalLM
        and type(model.model) is CogVLMModel
        and all(type(layer) is DecoderLayer for layer in model.model.layers)
        and model.config._attn_implementation == "sdpa"
        and model.dtype in (torch.float32, torch.bfloat16)  # float16 has its own rules (half.py)
        and not hasattr(model, "hf_device_map")
        and len({parameter.device for parameter in model.parameters()}) == 1
    )


def step(model: Any, tokens: Tensor, positions: Tensor, view: View, mask: Tensor | None) -> Tensor:
    """The scores of the next tokens, without gradients.

    Args:
        model: one that :func:`is_known`.
        tokens: ``int64[b]``, text.
        positions: ``int64[b, 1]``, or ``int64[2, b, 1]``.
        view: of the rows; the tokens are put behind them.
        mask: ``bool[b, 1, 1, C]``, true where a token looks; none for everywhere.

    Returns:
        ``float32[b, V]``.
    """
    inner = model.model
    x = inner.embed_tokens(tokens)  # [b, D]
    cos, sin = inner.rotary(positions, x.dtype)  # [b, 1, d]
    half = sin.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)  # for halves that change places
    if mask is not None:  # once, not in every layer
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
    for layer in inner.layers:
        x = x + _attention(layer.self_attn, _norm(layer.input_layernorm, x), cos, sin, view, mask)
        x = x + layer.mlp.language_mlp(_norm(layer.post_attention_layernorm, x))
    scores: Tensor = model.lm_head(_norm(inner.norm, x)[:, None])
    return scores[:, -1].float()


def _attention(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, view: View, mask: Tensor | None
) -> Tensor:
    """``float[b, D]`` -> the same shape."""
    heads, kv, width = layer.heads, layer.kv_heads, layer.head_dim
    qkv = layer.language_expert_query_key_value(x).view(len(x), heads + 2 * kv, width)
    turned, value = qkv[:, : heads + kv], qkv[:, heads + kv :]
    turned = turned * cos + turned.roll(width // 2, dims=-1) * sin
    key, value = view.update(turned[:, heads:, None], value[:, :, None], layer.layer_idx)
    # Heads that share keys stand where the tokens of a sequence do otherwise: no copies of keys.
    query = turned[:, :heads].unflatten(1, (kv, -1))  # [b, K, H / K, d]
    mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=layer.scaling)
    return layer.language_expert_dense(mixed.flatten(1))  # type: ignore[no-any-return]


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """As the module; it computes in float32, too."""
    weight = norm.weight
    return F.rms_norm(x.float(), weight.shape, weight.float(), norm.eps).to(x.dtype)
