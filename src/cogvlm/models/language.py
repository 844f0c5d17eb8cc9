"""The decoder: a Llama-type language model with a visual expert in its layers.

Knows nothing about pixels or about which token is which: a :class:`Route` tells it.

Shapes: ``T`` tokens of the whole batch, grouped language first (see :class:`Route`), ``B`` rows,
``L`` tokens a row, ``D`` width, ``H`` query heads, ``K`` key/value heads, ``d`` head width.

Source: CogVLM paper section 2.2; released ``modeling_cogvlm.py`` of CogVLM2 (tensor names are
the released ones).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config import CogVLMConfig
from .half import gated, saturated, widened
from .parts import in_parts
from .positions import Route


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32; the weight too, then cast, as released."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``float[..., D]`` -> the same shape and dtype."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        # Under float16 weights the residual is float32, and what is normed is float16 again.
        half = self.weight.dtype is torch.float16
        return (self.weight.float() * y).to(torch.float16 if half else x.dtype)


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """Rotary frequencies ``theta ** (-2 i / d)``: ``float32[d / 2]``."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_table(inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token, both halves: ``dtype[B, L, d]`` each.

    Positions are cast to the dtype of ``inv_freq`` before anything is multiplied: with bfloat16
    frequencies this is what the released code computes, rounding included.

    Args:
        inv_freq: ``float[d / 2]``.
        positions: ``int[B, L]``; or ``int[2, B, L]``, where even frequencies turn by the first
            and odd ones by the second (RoPE-2D: R(n, n) is R(n)).
        dtype: of the activations.
    """
    if positions.ndim == 2:
        angles = positions.to(inv_freq.dtype)[..., None] * inv_freq
    else:
        x, y = (p.to(inv_freq.dtype)[..., None] * inv_freq for p in positions)
        even = torch.arange(len(inv_freq), device=inv_freq.device) % 2 == 0
        angles = torch.where(even, x, y)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head against each other: ``float[B, H, L, d]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class RotaryEmbedding(nn.Module):
    """Holds ``inv_freq``, which the released files store in every layer."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(head_dim, theta))


class ZeroLinear(nn.Linear):
    """A linear layer whose fresh weights are zero."""


class LowRank(nn.Module):
    """A correction ``B(A(x))`` to another layer's output; zero at first (LoRA without scale)."""

    def __init__(self, width_in: int, width_out: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        self.lora_A = nn.Linear(width_in, rank, bias=False)
        self.lora_B = ZeroLinear(rank, width_out, bias=bias)

    def forward(
        self, x: Tensor, base: Callable[[Tensor], Tensor], where: Tensor | None = None
    ) -> Tensor:
        """``base(x) + B(A(x))``; the correction times ``where``, ``float[T, 1]``, if given."""
        low = self.lora_A(x)
        return base(x) + self.lora_B(low if where is None else low * where)  # type: ignore[no-any-return]


def expert_linear(width_in: int, width_out: int, rank: int | None, bias: bool) -> nn.Module:
    """A vision expert's layer: full weights, or a low-rank correction to the language layer."""
    if rank is None:
        return nn.Linear(width_in, width_out, bias=bias)
    return LowRank(width_in, width_out, rank, bias=bias)


def routed(
    x: Tensor,
    route: Route,
    language: nn.Module,
    expert: nn.Module | None,
    text: LowRank | None = None,
) -> Tensor:
    """Language tokens through the language layer, vision tokens through the expert: ``[T, ...]``.

    A low-rank expert corrects the language layer's output; without an expert the language layer
    serves every token.  ``text`` corrects it for language tokens behind a picture.
    """
    n_language = route.n_language
    if expert is None or n_language == len(x):
        return spoken(x, language, text, route.behind)
    vision = x[n_language:]
    low_rank = isinstance(expert, LowRank | LowRankMLP)
    seen: Tensor = expert(vision, language) if low_rank else expert(vision)
    if n_language == 0:
        return seen
    return torch.cat((spoken(x[:n_language], language, text, route.behind), seen))


def spoken(
    x: Tensor, language: Callable[[Tensor], Tensor], text: LowRank | None, behind: Tensor | None
) -> Tensor:
    """Language tokens ``[T, ...]``; with no picture in sight through the language layer alone.

    ``behind`` is that of :class:`Route`.
    """
    if text is None or behind is None:
        return language(x)
    return text(x, language, behind)  # type: ignore[no-any-return]


@dataclass
class Step:
    """What every layer of one forward shares."""

    route: Route
    cos: Tensor  # [B, L, d]
    sin: Tensor  # [B, L, d]
    mask: Any  # what the attention kernel takes, or None for plain causal
    cache: Cache | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Step:
        """On another device; accelerate calls it where layers lie on several."""
        names = ("cos", "sin", "mask")
        there = {n: getattr(self, n) for n in names if hasattr(getattr(self, n), "to")}
        moved = {n: value.to(device, non_blocking=non_blocking) for n, value in there.items()}
        return replace(self, **moved)


def eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attention in plain products, softmax in float32; returns ``[B, L, H, d]``."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = widened(query * module.scaling) @ widened(key).transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), None


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, step: Step, last: bool
) -> tuple[Tensor, Route]:
    """Attention by the configured kernel, over what the cache holds too, which is extended.

    Args:
        module: the attention layer, of any family.
        query: ``float[B, H, L, d]``, rotated.
        key: ``float[B, K, L, d]``, rotated.
        value: ``float[B, K, L, d]``.
        step: of this forward.
        last: attend from the last token of each row alone.

    Returns:
        ``float[B, L, H d]`` or ``float[B, 1, H d]``, and the route of what is returned.
    """
    if step.cache is not None:
        key, value = step.cache.update(key, value, module.layer_idx)
    route, mask = step.route, step.mask
    if last:
        query, route = query[:, :, -1:], route.last()
        mask = mask[..., -1:, :] if mask is not None and mask.ndim == 4 else mask
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention
    )
    mixed, _ = kernel(module, query, key, value, mask, dropout=0.0, scaling=module.scaling)
    return mixed.flatten(2), route


class Attention(nn.Module):
    """Grouped-query self-attention over all tokens; projections by expert.

    ``expert`` false leaves out the vision weights; the language ones then serve every token.
    """

    def __init__(self, config: CogVLMConfig, layer: int, expert: bool) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer
        heads, kv, dim = config.num_attention_heads, config.num_multi_query_heads, config.head_dim
        assert dim is not None
        self.heads, self.kv_heads, self.head_dim = heads, kv, dim
        self.num_key_value_groups = heads // kv
        self.scaling = dim**-0.5
        self.is_causal = True
        width, rank = config.hidden_size, config.expert_rank
        self.rotary_emb = RotaryEmbedding(dim, config.rope_theta)
        self.vision_expert_query_key_value: nn.Module | None = None
        self.vision_expert_dense: nn.Module | None = None
        if expert:
            self.vision_expert_query_key_value = expert_linear(
                width, (heads + 2 * kv) * dim, rank, bias=config.expert_bias
            )
            self.vision_expert_dense = expert_linear(heads * dim, width, rank, bias=False)
        self.vision_expert_text_query_key_value: LowRank | None = None
        self.vision_expert_text_dense: LowRank | None = None
        if config.text_rank is not None:
            low = config.text_rank
            self.vision_expert_text_query_key_value = LowRank(width, (heads + 2 * kv) * dim, low)
            self.vision_expert_text_dense = LowRank(heads * dim, width, low)
        self.language_expert_query_key_value = nn.Linear(width, (heads + 2 * kv) * dim, bias=False)
        self.language_expert_dense = nn.Linear(heads * dim, width, bias=False)

    def project(self, x: Tensor, route: Route) -> Tensor:
        """Queries, keys and values: grouped ``[T, D]`` -> ``[T, (H + 2 K) d]``."""
        language, expert = self.language_expert_query_key_value, self.vision_expert_query_key_value
        return routed(x, route, language, expert, self.vision_expert_text_query_key_value)

    def out(self, x: Tensor, route: Route) -> Tensor:
        """Output projection: grouped ``[T, H d]`` -> ``[T, D]``."""
        language, expert = self.language_expert_dense, self.vision_expert_dense
        return routed(x, route, language, expert, self.vision_expert_text_dense)

    def forward(self, x: Tensor, step: Step, last: bool = False) -> Tensor:
        """Grouped ``float[T, D]`` -> the same shape; ``float[B, D]`` of ``last`` tokens alone.

        The last token of a row attends to all of it, and is always a language token.
        """
        qkv = saturated(step.route.join(self.project(x, step.route)))  # [B, L, (H + 2 K) d]
        qkv = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 K, L, d]
        turned, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        query, key = rotate(turned, step.cos, step.sin).split((self.heads, self.kv_heads), dim=1)
        mixed, route = attend(self, query, key, value, step, last)
        return saturated(self.out(route.split(mixed), route))


class GatedMLP(nn.Module):
    """SiLU-gated MLP without biases."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = ACT2FN[activation]

    @in_parts
    def forward(self, x: Tensor) -> Tensor:
        """``float[..., D]`` -> the same shape."""
        return gated(self.activation, self.gate_proj(x), self.up_proj(x), self.down_proj)


class LowRankMLP(nn.Module):
    """The language model's gated MLP with a low-rank correction to each of its matrices."""

    def __init__(self, width: int, inner: int, rank: int) -> None:
        super().__init__()
        self.gate_proj = LowRank(width, inner, rank)
        self.up_proj = LowRank(width, inner, rank)
        self.down_proj = LowRank(inner, width, rank)

    def forward(self, x: Tensor, language: GatedMLP) -> Tensor:
        """``float[..., D]`` -> the same shape."""
        gate, up = self.gate_proj(x, language.gate_proj), self.up_proj(x, language.up_proj)
        down = partial(self.down_proj, base=language.down_proj)
        return gated(language.activation, gate, up, down)


class ExpertMLP(nn.Module):
    """The gated MLP, once for language tokens and once for vision tokens."""

    def __init__(self, config: CogVLMConfig, expert: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.language_mlp = GatedMLP(width, inner, config.hidden_act)
        self.vision_mlp: GatedMLP | LowRankMLP | None = None
        if expert and config.expert_rank is None:
            self.vision_mlp = GatedMLP(width, inner, config.hidden_act)
        elif expert:
            assert config.expert_rank is not None
            self.vision_mlp = LowRankMLP(width, inner, config.expert_rank)

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """Grouped ``float[T, D]`` -> the same shape."""
        return routed(x, route, self.language_mlp, self.vision_mlp)


class DecoderLayer(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; norms are shared by both experts."""

    def __init__(self, config: CogVLMConfig, layer: int) -> None:
        super().__init__()
        has = config.expert_in_layer(layer)
        self.self_attn = Attention(config, layer, has and config.visual_expert == "all")
        self.mlp = ExpertMLP(config, has)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, last: bool = False) -> Tensor:
        """Grouped ``float[T, D]`` -> the same shape; ``float[B, D]`` of ``last`` tokens alone."""
        mixed = self.self_attn(self.input_layernorm(x), step, last)
        route = step.route
        if last:
            x, route = route.join(x)[:, -1], route.last()
        x = self.between(x + mixed, step, route)
        return x + self.mlp(self.post_attention_layernorm(x), route)  # type: ignore[no-any-return]

    def between(self, x: Tensor, step: Step, route: Route) -> Tensor:
        """What a family does between attention and MLP to ``float[T, D]``, grouped by ``route``."""
        return x
