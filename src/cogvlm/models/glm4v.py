"""GLM-4V-9B: the tower of CogVLM2 in front of GLM-4, without visual experts.

Shapes: ``B`` rows, ``L`` tokens, ``D`` width, ``H`` query heads, ``K`` key/value heads, ``d`` head
width, ``N`` images, ``T`` tokens of an image without its markers.

To callers a CogVLM: the same input, output, cache and ``generate``.  Differences from CogVLM2::

    tensor names   transformer.encoder.layers.N..., as released; the head is inside transformer
    experts        none; query, key and value have a bias; the gated MLP is one matrix
    rotation       neighbouring pairs, first half of each head, tables in float32
    features       the convolution maps to D; all, markers too, divided by scaling_factor
    padding        positions 0 there, then 0, 1, 2...; padding queries attend to everything

The released interface has three placeholder tokens an image, which the model expands.  Here the
processor gives the whole block, as for CogVLM2; :func:`expand_image_tokens` leads from one to the
other::

    released  [gMASK] <sop> <|user|> \\n boi eot eoi          text
    ours      [gMASK] <sop> <|user|> \\n eot eot eot eot eot  text    types 1 in the block
    position  0       1     2        3  4   5   5   5   6    7

Source: released ``modeling_chatglm.py`` and ``visual.py`` of GLM-4V-9B.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import Glm4vConfig
from ..errors import InputError
from .cogvlm import VISION_CUTS, CogVLMForCausalLM, CogVLMModel, Images
from .half import gated, saturated
from .language import RMSNorm, RotaryEmbedding, Step, attend, inverse_frequencies
from .parts import Conv
from .vision import GLU, VisionModel

ROPE_BASE = 10000.0
_LAYER_CUTS = {  # gate and up projection are one matrix, so what it gives is gathered too
    "self_attention.query_key_value": "colwise_gather_output",
    "self_attention.dense": "rowwise_split_input",
    "mlp.dense_h_to_4h": "colwise_gather_output",
    "mlp.dense_4h_to_h": "rowwise_split_input",
}


def block_positions(types: Tensor, mask: Tensor | None, block: int) -> Tensor:
    """Position ids: one for all patches of an image, each marker and each word its own.

    Unlike CogVLM2's, padding and the first real token both have 0, and images back to back are
    told apart, since every image has the same number of tokens.

    Args:
        types: ``int[B, L]``, 0 language, 1 image.
        mask: ``int[B, L]``, 1 real, 0 padding; none means no padding.
        block: tokens of an image, markers included.

    Returns:
        ``int64[B, L]``.

    Raises:
        InputError: the image tokens of a row are not whole images.
    """
    image = types == 1
    seen = image.long().cumsum(dim=1)
    if bool((seen[:, -1] % block).any()):
        worst = int(seen[:, -1].max())
        raise InputError(
            f"a row has {worst} image tokens, an image of this model takes {block}; "
            "encode it with the model's own processor"
        )
    place = (seen - 1) % block  # 0 begin marker, 1 first patch, block - 1 end marker
    counts = ~(image & (place > 1) & (place < block - 1))
    if mask is not None:
        counts &= mask.bool()
    return (counts.long().cumsum(dim=1) - 1).clamp(min=0)


def expand_image_tokens(
    input_ids: Tensor, attention_mask: Tensor, boi: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A released prompt with three tokens an image -> ids, token types and mask as taken here.

    Args:
        input_ids: ``int64[B, L]``, with begin marker, one placeholder and end marker an image.
        attention_mask: ``int64[B, L]``.
        boi: id of the begin marker.
        tokens: ``T``, of one image.

    Returns:
        Three of ``int64[B, L + images * (T - 1)]``.

    Raises:
        InputError: a begin marker has no room for an image behind it, or the rows have
            different numbers of images.
    """
    begin = input_ids == boi
    if bool(begin[:, -2:].any()):
        raise InputError(f"token {boi} begins an image, but two more tokens do not follow it")
    images = begin.sum(dim=1)
    if int(images.min()) != int(images.max()):
        raise InputError(
            f"rows of one batch have {int(images.min())} to {int(images.max())} images; "
            "expand them one by one and pad them on the left"
        )
    middle, end = begin.roll(1, dims=1), begin.roll(2, dims=1)
    repeats = torch.where(middle, tokens, 1)
    types = (begin | middle | end).long()
    ids, kinds, real = (
        torch.stack([r.repeat_interleave(n) for r, n in zip(rows, repeats, strict=True)])
        for rows in (input_ids, types, attention_mask)
    )
    return ids, kinds, real


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs in the first half of each head; the second half is left as it is.

    Args:
        x: ``float[B, H, L, d]``.
        cos: ``float[B, L, d / 4]``.
        sin: ``float[B, L, d / 4]``.
    """
    turned, kept = x.chunk(2, dim=-1)
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)  # each [B, H, L, d / 4]
    cos, sin = cos[:, None], sin[:, None]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((pairs.flatten(-2), kept), dim=-1)


class Glm4vAttention(nn.Module):
    """Grouped-query self-attention; one fused projection with a bias."""

    def __init__(self, config: Glm4vConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer
        self.heads, self.kv_heads = config.num_attention_heads, config.multi_query_group_num
        self.head_dim = dim = config.kv_channels
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = dim**-0.5
        self.is_causal = True
        fused = (self.heads + 2 * self.kv_heads) * dim
        self.query_key_value = nn.Linear(config.hidden_size, fused, bias=config.add_qkv_bias)
        self.dense = nn.Linear(self.heads * dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step, last: bool = False) -> Tensor:
        """``float[B * L, D]`` -> the same shape; ``float[B, D]`` of ``last`` tokens alone."""
        qkv = saturated(step.route.join(self.query_key_value(x)))  # [B, L, (H + 2 K) d]
        qkv = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 K, L, d]
        turned, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        turned = rotate_pairs(turned, step.cos, step.sin)
        query, key = turned.split((self.heads, self.kv_heads), dim=1)
        mixed, route = attend(self, query, key, value, step, last)
        return saturated(self.dense(route.split(mixed)))


class Glm4vMLP(nn.Module):
    """SiLU-gated MLP; gate and up projection are one matrix, the gate's rows first."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(width, 2 * inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``float[..., D]`` -> the same shape."""
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return gated(F.silu, gate, up, self.dense_4h_to_h)


class Glm4vLayer(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: Glm4vConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = Glm4vAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = Glm4vMLP(config.hidden_size, config.ffn_hidden_size)

    def forward(self, x: Tensor, step: Step, last: bool = False) -> Tensor:
        """``float[B * L, D]`` -> the same shape; ``float[B, D]`` of ``last`` tokens alone."""
        mixed = self.self_attention(self.input_layernorm(x), step, last)
        if last:
            x = step.route.join(x)[:, -1]
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Glm4vVision(VisionModel):
    """The tower and adapter of CogVLM2, with two differences: width and scale of what comes out.

    The convolution maps to the decoder's width already, and everything is divided by
    ``scaling_factor``, begin and end marker included.
    """

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        width, dim = config.vision.hidden_size, config.hidden_size
        inner = config.vision.adapter_intermediate_size or config.ffn_hidden_size
        self.conv = Conv(width, dim, kernel_size=2, stride=2)
        self.linear_proj = GLU(dim, dim, inner)
        self.scaling_factor = config.vision.scaling_factor

    def forward(self, pixels: Tensor) -> Tensor:
        """``float[N, 3, H, W]``, all of one size -> ``float[N, T + 2, D]``."""
        return super().forward(pixels) / self.scaling_factor


class Embedding(nn.Module):
    """Holds the table of token embeddings under its released name."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, width)


class Encoder(nn.Module):
    """Holds the decoder layers and the final norm under their released names."""

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Glm4vLayer(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class Glm4vModel(CogVLMModel):
    """Embeddings, tower, decoder, and the head, which the released files have in here too.

    ``rotary_pos_emb.inv_freq`` is in the released files but never read: tables are made from the
    configuration, in float32.
    """

    config_class = Glm4vConfig  # type: ignore[assignment]
    config: Glm4vConfig  # type: ignore[assignment]
    base_model_prefix = "transformer"
    _no_split_modules = ["Glm4vLayer", "VisionLayer"]  # noqa: RUF012
    _tp_plan = {  # noqa: RUF012
        **{f"encoder.layers.*.{name}": style for name, style in _LAYER_CUTS.items()},
        **VISION_CUTS,
        "embedding.word_embeddings": "embedding_rowwise",
        "output_layer": "colwise_gather_output",
    }
    last_state_normed = False

    def __init__(self, config: Glm4vConfig) -> None:
        # Nothing that CogVLMModel builds is wanted, only what it does with its parts.
        super(CogVLMModel, self).__init__(config)
        self.embedding = Embedding(config.padded_vocab_size, config.hidden_size)
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2, ROPE_BASE)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.vision = Glm4vVision(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Embedding:  # type: ignore[override]
        """The table of token embeddings."""
        return self.embedding.word_embeddings

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The decoder layers."""
        return self.encoder.layers

    @property
    def norm(self) -> RMSNorm:  # type: ignore[override]
        """The final norm."""
        return self.encoder.final_layernorm

    def position_ids(self, types: Tensor, mask: Tensor | None, images: Images) -> Tensor:
        """Position ids of a whole prompt: ``int64[B, L]``; see :func:`block_positions`."""
        return block_positions(types, mask, self.config.image_tokens + 2)

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every pair: ``dtype[B, L, d / 4]`` each, computed in float32."""
        base = ROPE_BASE * self.config.rope_ratio
        frequencies = inverse_frequencies(self.config.kv_channels // 2, base)
        angles = position_ids.float()[..., None] * frequencies.to(position_ids.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def attention_mask(
        self,
        embeds: Tensor,
        types: Tensor | None,
        mask: Tensor | None,
        cache: Cache | None,
        places: Tensor | None = None,
    ) -> Any:
        """What the attention kernel takes; none where plain causal attention will do.

        Padding queries attend to everything, as released, where the kernel takes a full mask.
        """
        if mask is None:
            return super().attention_mask(embeds, None, None, cache, places)
        made = create_causal_mask(self.config, embeds, mask, cache)
        if mask.ndim != 2 or not isinstance(made, Tensor) or made.ndim != 4:
            return made
        padding = (mask[:, -embeds.shape[1] :] == 0).to(made.device)[:, None, :, None]
        return made | padding if made.dtype is torch.bool else made.masked_fill(padding, 0.0)


class Glm4vForCausalLM(CogVLMForCausalLM):
    """GLM-4V with its head: logits, loss, ``generate``; arguments as :class:`CogVLMForCausalLM`.

    ``hidden_states``, where asked for, end with the output of the last layer, before the norm.
    """

    config_class = Glm4vConfig  # type: ignore[assignment]
    config: Glm4vConfig  # type: ignore[assignment]
    base_model_prefix = "transformer"
    _no_split_modules = ["Glm4vLayer", "VisionLayer"]  # noqa: RUF012
    _tied_weights_keys = {  # noqa: RUF012
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }
    _tp_plan = {}  # noqa: RUF012 - the head is in the model

    def __init__(self, config: Glm4vConfig) -> None:
        super(CogVLMForCausalLM, self).__init__(config)
        self.transformer = Glm4vModel(config)
        self.post_init()

    @property
    def model(self) -> Glm4vModel:
        """Embeddings, tower and decoder."""
        return self.transformer

    @property
    def lm_head(self) -> nn.Linear:
        """The head."""
        return self.transformer.output_layer

    def get_output_embeddings(self) -> nn.Module:
        """The head, for transformers."""
        return self.transformer.output_layer
