"""EVA2-CLIP tower and adapter: pixels in, image tokens at the language model's width out.

Knows nothing about text, positions of tokens, or experts.

Shapes: ``N`` images, ``P`` patches (rows x cols, row-major), ``C`` tower width, ``D`` language
width, ``T`` image tokens without the begin and end markers.

Source: CogVLM paper section 2.1; released ``visual.py`` of CogVLM2 (tensor names are the
released ones).  Every block normalises the *output* of its branches: ``x + LN(attn(x))``, then
``x + LN(mlp(x))``; there is no norm on the input and none at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..config import CogVLMConfig, VisionConfig
from ..errors import InputError
from .ctc import SURE, CTCHead, certainty, spelled
from .half import biased, fitted, gated, saturated, widened
from .parts import Conv, in_parts


class PatchEmbedding(nn.Module):
    """Patches to vectors, a class token in front, learned absolute positions added.

    The position table covers ``table_rows`` x ``table_cols`` patches; a smaller grid takes its
    top left corner.
    """

    def __init__(self, channels: int, width: int, patch: int, table: tuple[int, int]) -> None:
        super().__init__()
        self.table = table
        self.proj = Conv(channels, width, kernel_size=patch, stride=patch)
        self.cls_embedding = nn.Parameter(torch.zeros(1, width))
        self.position_embedding = nn.Embedding(table[0] * table[1] + 1, width)

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``float[N, 3, H, W]`` -> ``float[N, 1 + P, C]`` and the grid (rows, cols)."""
        patches = self.proj(pixels.to(self.proj.weight.dtype))  # [N, C, rows, cols]
        rows, cols = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)  # [N, P, C]
        cls = self.cls_embedding.expand(len(x), 1, -1)
        return torch.cat((cls, x), dim=1) + self.positions(rows, cols), (rows, cols)

    def positions(self, rows: int, cols: int) -> Tensor:
        """``float[1 + rows * cols, C]``, the class token's first.

        Raises:
            InputError: the grid is larger than the table.
        """
        table_rows, table_cols = self.table
        table = self.position_embedding.weight
        if (rows, cols) == self.table:
            return table
        if rows > table_rows or cols > table_cols:
            raise InputError(
                f"image of {rows}x{cols} patches; this model takes at most "
                f"{table_rows}x{table_cols}: resize the image with the model's own processor"
            )
        corner = table[1:].view(table_rows, table_cols, -1)[:rows, :cols]
        return torch.cat((table[:1], corner.reshape(rows * cols, -1)))


class VisionAttention(nn.Module):
    """Full self-attention with one fused projection (bias everywhere)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``float[N, 1 + P, C]`` -> the same shape."""
        n, length, width = x.shape
        qkv = self.query_key_value(x).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, 1 + P, C / heads]
        out = F.scaled_dot_product_attention(q, k, v)
        return saturated(self.dense(out.transpose(1, 2).reshape(n, length, width)))


class VisionMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = ACT2FN[activation]

    @in_parts
    def forward(self, x: Tensor) -> Tensor:
        """``float[..., C]`` -> the same shape."""
        inner = self.activation(widened(saturated(self.fc1(x))))
        return biased(self.fc2, inner) if x.dtype is torch.float16 else self.fc2(inner)


class VisionLayer(nn.Module):
    """One post-norm block: each branch is normalised before it is added."""

    def __init__(self, width: int, heads: int, inner: int, activation: str, eps: float) -> None:
        super().__init__()
        self.attention = VisionAttention(width, heads)
        self.input_layernorm = nn.LayerNorm(width, eps)  # released name; it acts on the output
        self.mlp = VisionMLP(width, inner, activation)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """``float[N, 1 + P, C]`` -> the same shape."""
        x = x + self.input_layernorm(self.attention(x))
        # A norm does not see the scale that each token is brought to.
        return x + self.post_attention_layernorm(fitted(self.mlp(x), x.dtype))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """The stack of blocks (released name: ``transformer``)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            VisionLayer(
                config.hidden_size,
                config.num_heads,
                config.intermediate_size,
                config.hidden_act,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``float[N, 1 + P, C]`` -> the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


class GLU(nn.Module):
    """Adapter: linear, LayerNorm (eps 1e-5), GELU, then a SiLU-gated MLP; no biases."""

    def __init__(self, width_in: int, width: int, inner: int) -> None:
        super().__init__()
        self.linear_proj = nn.Linear(width_in, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.dense_h_to_4h = nn.Linear(width, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    @in_parts
    def forward(self, x: Tensor) -> Tensor:
        """``float[N, T, C]`` -> ``float[N, T, D]``."""
        x = F.gelu(self.norm1(self.linear_proj(x)))
        y = gated(F.silu, self.gate_proj(x), self.dense_h_to_4h(x), self.dense_4h_to_h)
        return saturated(y.to(x.dtype))


class QFormer(nn.Module):
    """Learned queries read the patches through layers of cross-attention and an MLP (pre-norm).

    Not in any released checkpoint; here so that the launch talk's comparison can be made.
    """

    def __init__(self, width: int, heads: int, inner: int, queries: int, layers: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, queries, width))
        self.cross = nn.ModuleList(
            nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.mlps = nn.ModuleList(VisionMLP(width, inner, "gelu") for _ in range(layers))

    def forward(self, patches: Tensor) -> Tensor:
        """``float[N, P, C]`` -> ``float[N, queries, C]``."""
        x = self.queries.expand(len(patches), -1, -1)
        for i, (cross, mlp) in enumerate(zip(self.cross, self.mlps, strict=True)):
            q = self.norms[2 * i](x)
            x = x + cross(q, patches, patches, need_weights=False)[0]
            x = x + saturated(mlp(self.norms[2 * i + 1](x)).to(x.dtype))
        return x


class VisionModel(nn.Module):
    """Tower and adapter: one image becomes ``[boi, T tokens, eoi]``.

    ``conv`` (2x2, stride 2, where the configuration does not say otherwise) exists for
    ``adapter="conv_glu"`` only, ``qformer`` for ``adapter="qformer"`` only, ``ctc`` where
    ``ctc_hidden`` is set.
    """

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        vision = config.vision
        width, dim = vision.hidden_size, config.hidden_size
        inner = vision.adapter_intermediate_size or config.intermediate_size
        self.patch_size = vision.patch_size
        self.merge = vision.merge
        self.patch_embedding = PatchEmbedding(
            vision.in_channels, width, vision.patch_size, vision.table_grid
        )
        self.transformer = VisionTransformer(vision)
        self.linear_proj = GLU(width, dim, inner)
        if vision.adapter == "conv_glu":
            self.conv = Conv(width, width, kernel_size=vision.merge, stride=vision.merge)
        elif vision.adapter == "qformer":
            self.qformer = QFormer(
                width,
                vision.num_heads,
                vision.intermediate_size,
                vision.adapter_queries,
                vision.adapter_layers,
            )
        self.adapter = vision.adapter
        if vision.ctc_hidden is not None:
            self.ctc = CTCHead(width, vision.merge[0], vision.ctc_hidden)
        self.boi = nn.Parameter(torch.zeros(1, 1, dim))
        self.eoi = nn.Parameter(torch.zeros(1, 1, dim))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``height`` x ``width`` pixels.

        Raises:
            InputError: a side is not a multiple of patch x merge.
        """
        tall, wide = (self.patch_size * patches for patches in self.merge)
        if height % tall or width % wide or not height or not width:
            raise InputError(
                f"image of {width}x{height} pixels: its width must be a multiple of {wide}, its "
                f"height of {tall}; use the model's own processor"
            )
        return height // self.patch_size, width // self.patch_size

    def patches(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``float[N, 3, H, W]`` -> tower output ``float[N, P, C]`` and the grid of patches."""
        self.grid(*pixels.shape[-2:])
        x, grid = self.patch_embedding(pixels)
        return self.transformer(x)[:, 1:], grid

    def adapt(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tower output ``float[N, P, C]`` -> ``float[N, T, D]``, row-major."""
        if self.adapter == "conv_glu":
            n, _, width = patches.shape
            square = patches.transpose(1, 2).reshape(n, width, *grid)
            patches = self.conv(square).flatten(2).transpose(1, 2)  # [N, T, C]
        elif self.adapter == "qformer":
            patches = self.qformer(patches)
        return self.linear_proj(patches)  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> Tensor:
        """``float[N, 3, H, W]``, all of one size -> ``float[N, T + 2, D]``."""
        tokens = self.adapt(*self.patches(pixels))
        n = len(tokens)
        return torch.cat((self.boi.expand(n, -1, -1), tokens, self.eoi.expand(n, -1, -1)), dim=1)

    def encode(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """Images of any sizes -> one ``float[T + 2, D]`` each, in the order given.

        Images of equal size go through the tower together.
        """
        if isinstance(images, Tensor):
            return list(self.forward(images))
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(tuple(image.shape), []).append(i)
        out: list[Tensor] = [self.boi] * len(images)
        for places in by_size.values():
            features = self.forward(torch.stack([images[i] for i in places]))
            for i, feature in zip(places, features, strict=True):
                out[i] = feature
        return out

    @torch.inference_mode()
    def spell(self, strips: Sequence[NDArray[np.float32]], sure: float = SURE) -> list[str]:
        """What strips of print say, ``float32[3, H, W]`` each, one row of tokens high.

        For a model with a ``ctc`` head (``vision_config.ctc_hidden``).  Where it is less ``sure``
        of the characters, it was no print that was found, and the strip says nothing.
        """
        where = self.patch_embedding.cls_embedding.device
        texts = []
        for strip in strips:
            patches, _ = self.patches(torch.from_numpy(strip)[None].to(where))
            scores = self.ctc(patches)[0].float()  # [steps, classes]
            read = spelled(scores.argmax(-1).tolist()).strip()
            texts.append(read if certainty(scores) >= sure else "")
        return texts
