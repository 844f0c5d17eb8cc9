"""EVA02-CLIP-L: the encoder of CogAgent's large picture.

Differences from the tower in ``vision.py``: the norm stands on the *input* of each branch, the MLP
is gated with a LayerNorm inside, attention has two-dimensional rotary positions, and nothing is
adapted to the language model's width (its layers read these features by cross-attention).

Shapes: ``N`` pictures, ``P`` patches (row-major), ``W`` width, ``H`` heads, ``d`` head width.

Released oddity, part of the model: the last block, the final norm and the head are in the files
but are never run, so they are parameters here and nothing else.

Source: CogAgent paper section 2.2; EVA-02 paper; tensor names are the released ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.cogagent import CrossVisionConfig
from ..errors import InputError
from .half import saturated, shrunk
from .parts import Conv


def grid_rotary(side: int, head_width: int, span: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every patch: ``float32[side * side, d]`` each.

    The first half of a head turns by the row, the second by the column, in neighbouring pairs;
    a position is ``index / side * span``, so every size of picture has the same range.

    >>> cos, sin = grid_rotary(side=2, head_width=4, span=16)
    >>> sin.asin().sign().int().tolist()  # rows 0 0 8 8, columns 0 8 0 8
    [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    """
    half = head_width // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    places = torch.arange(side, dtype=torch.float32) / side * span
    angles = (places[:, None] * frequencies).repeat_interleave(2, dim=-1)  # [side, d / 2]
    rows = angles[:, None].expand(side, side, half)
    cols = angles[None].expand(side, side, half)
    both = torch.cat((rows, cols), dim=-1).reshape(side * side, head_width)
    return both.cos(), both.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of ``float[N, H, 1 + P, d]`` by tables ``float[P, d]``.

    The class token, which stands first, stays as it is.
    """
    patches = x[:, :, 1:]
    even, odd = patches.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.cat((x[:, :, :1], (patches * cos + turned * sin).to(x.dtype)), dim=2)


class GridRotary(nn.Module):
    """Holds the rotary tables, which the released file stores once for all blocks."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, config: CrossVisionConfig) -> None:
        super().__init__()
        cos, sin = grid_rotary(config.side, config.head_width, config.pt_hw_seq_len)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)


class EvaAttention(nn.Module):
    """Full self-attention; queries and values have a bias, keys have none."""

    def __init__(self, config: CrossVisionConfig) -> None:
        super().__init__()
        width = config.width
        self.head_width = config.head_width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, config.layer_norm_eps)
        self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        """``float[N, 1 + P, W]`` -> ``float[N, H, 1 + P, d]``."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``float[N, 1 + P, W]`` -> the same shape; tables are ``float[P, d]``."""
        query = turn(self.heads(self.q_proj(x) + self.q_bias), cos, sin)
        key = turn(self.heads(self.k_proj(x)), cos, sin)
        value = self.heads(self.v_proj(x) + self.v_bias)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(self.inner_attn_ln(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class EvaMLP(nn.Module):
    """SiLU-gated MLP with a LayerNorm on the gated values."""

    def __init__(self, config: CrossVisionConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.inner)
        self.w2 = nn.Linear(config.width, config.inner)
        self.ffn_ln = nn.LayerNorm(config.inner, config.layer_norm_eps)
        self.w3 = nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """``float[..., W]`` -> the same shape."""
        gate, up = self.w1(x), self.w2(x)
        if gate.dtype is torch.float16:  # the norm behind takes the scale out again
            inner, _ = shrunk(F.silu(saturated(gate).float()) * saturated(up).float())
        else:
            inner = F.silu(gate) * up
        return self.w3(self.ffn_ln(inner))  # type: ignore[no-any-return]


class EvaBlock(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: CrossVisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.attn = EvaAttention(config)
        self.norm2 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = EvaMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``float[N, 1 + P, W]`` -> the same shape; tables are ``float[P, d]``."""
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchProjection(nn.Module):
    """Patches to vectors (released name: ``patch_embed``)."""

    def __init__(self, config: CrossVisionConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = Conv(3, config.width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """``float[N, 3, S, S]`` -> ``float[N, P, W]``."""
        return self.proj(pixels.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class EvaLarge(nn.Module):
    """The encoder as it is in the file; what is run ends before the last block."""

    def __init__(self, config: CrossVisionConfig) -> None:
        super().__init__()
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.side**2 + 1, width))
        self.patch_embed = PatchProjection(config)
        self.rope = GridRotary(config)
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)  # never run
        self.head = nn.Linear(width, config.embed_dim)  # never run

    def forward(self, pixels: Tensor) -> Tensor:
        """``float[N, 3, S, S]`` -> ``float[N, P, W]``, the class token dropped."""
        patches = self.patch_embed(pixels)
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        x = x + self.pos_embed
        for block in list(self.blocks)[:-1]:
            x = block(x, self.rope.freqs_cos, self.rope.freqs_sin)
        return x[:, 1:]


class _Wrapper(nn.Module):
    """Gives the encoder the path ``vit.model`` that it has in the file."""

    def __init__(self, config: CrossVisionConfig) -> None:
        super().__init__()
        self.model = EvaLarge(config)


class CrossVisionModel(nn.Module):
    """The encoder and CogAgent's own table of positions, added to what it gives."""

    def __init__(self, config: CrossVisionConfig) -> None:
        super().__init__()
        self.size = config.image_size
        self.vit = _Wrapper(config)
        self.pos_embed = nn.Parameter(torch.zeros(config.side**2, config.width))

    def forward(self, pixels: Tensor) -> Tensor:
        """``float[N, 3, S, S]`` -> ``float[N, P, W]``.

        Raises:
            InputError: a size other than the configured one.
        """
        height, width = pixels.shape[-2:]
        if (height, width) != (self.size, self.size):
            raise InputError(
                f"large picture of {width}x{height} pixels; this model takes {self.size}x"
                f"{self.size}: use the model's own processor"
            )
        return self.vit.model(pixels) + self.pos_embed  # type: ignore[no-any-return]
