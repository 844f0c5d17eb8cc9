"""CogAgent: CogVLM whose layers also read a large copy of the picture.

Differences from CogVLM (everything else is inherited):

* every layer has cross-attention between self-attention and MLP, for all tokens alike::

      x = x + self_attention(norm(x))
      x = x + cross_attention(norm(x), large picture)     rows without a picture skip this
      x = x + mlp(norm(x))

* the large picture goes through an encoder of its own (``eva_large.py``); its features are made
  once a prompt, their keys and values once a layer, and both are kept with the cache;
* a learned table is added to the small picture's patches between tower and adapter.

The released code cannot take a prompt without a picture; here such a row is plain Vicuna.

Shapes: ``B`` rows, ``L`` tokens, ``T`` tokens of the whole batch, ``D`` width, ``R`` rows with a
picture, ``P`` patches of the large picture, ``H`` heads, ``c`` their width.

Source: CogAgent paper section 2.2; tensor names are the released ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import CogVLMConfig
from ..config.cogagent import CogAgentConfig
from ..errors import InputError
from .cogvlm import CogVLMForCausalLM, CogVLMModel, Images
from .eva_large import CrossVisionModel
from .half import saturated
from .language import DecoderLayer, RMSNorm, Step
from .positions import Grid, Route
from .vision import VisionModel

_ON_CACHE = "cogagent_cross"  # attribute of the cache that holds its rows' pictures


@dataclass
class Cross:
    """The large pictures that a batch sees."""

    features: Tensor  # [R, P, W]
    rows: Tensor | None  # int64[R], the rows they belong to; none: all, in order
    keep: bool  # whether keys and values outlive this forward
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # [R, H, P, c] by layer


@dataclass
class CrossStep(Step):
    """What every layer of one forward shares, the large pictures among it."""

    cross: Cross | None = None


class CrossAttention(nn.Module):
    """Tokens read the large picture: no rotary positions, no mask, no biases."""

    def __init__(self, config: CogAgentConfig, layer: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.cross_compute_hidden_size
        self.layer_idx = layer
        self.head_dim = inner // config.num_attention_heads
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(config.cross_hidden_size, 2 * inner, bias=False)
        self.dense = nn.Linear(inner, width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """``float[R, n, H c]`` -> ``float[R, H, n, c]``."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]

    def key_values(self, cross: Cross, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values of the pictures on this layer's device, ``float[R, H, P, c]`` each."""
        kept = cross.kept.get(self.layer_idx)
        if kept is not None:
            return kept
        key, value = self.key_value(cross.features.to(device)).chunk(2, dim=-1)
        made = self.heads(key), self.heads(value)
        if cross.keep:
            cross.kept[self.layer_idx] = made
        return made

    def forward(self, x: Tensor, route: Route, cross: Cross) -> Tensor:
        """Grouped ``float[T, D]`` -> the same shape; zero for rows without a picture."""
        query = route.join(self.query(x))  # [B, L, H c]
        rows = None if cross.rows is None else cross.rows.to(query.device)
        seeing = query if rows is None else query[rows]
        key, value = self.key_values(cross, query.device)
        mixed = F.scaled_dot_product_attention(self.heads(seeing), key, value)
        out = mixed.transpose(1, 2).flatten(2)  # [R, L, H c]
        if rows is not None:
            out = torch.zeros_like(query).index_copy(0, rows, out)
        return saturated(self.dense(route.split(out)))


class CogAgentLayer(DecoderLayer):
    """A decoder layer with cross-attention between self-attention and MLP."""

    def __init__(self, config: CogVLMConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config, CogAgentConfig)
        self.cross_attn = CrossAttention(config, layer)
        self.post_cross_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def between(self, x: Tensor, step: Step, route: Route) -> Tensor:
        """Add what the tokens ``float[T, D]`` read of the large picture, if there is one."""
        assert isinstance(step, CrossStep)
        if step.cross is None:
            return x
        normed = self.post_cross_attention_layernorm(x)
        return x + self.cross_attn(normed, route, step.cross)  # type: ignore[no-any-return]


class CogAgentVisionModel(VisionModel):
    """Tower and adapter of the small picture, with a table added between the two."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        rows, cols = config.vision.table_grid
        self.pos_embed = nn.Parameter(torch.zeros(rows * cols, config.vision.hidden_size))

    def adapt(self, patches: Tensor, grid: Grid) -> Tensor:
        """Tower output ``float[N, P, C]`` -> ``float[N, T, D]``, row-major."""
        return super().adapt(patches + self.pos_embed, grid)


class CogAgentModel(CogVLMModel):
    """Embeddings, both encoders and decoder; gives hidden states.

    ``forward`` takes ``cross_pixel_values`` besides the arguments of :class:`CogVLMModel`:
    ``float[R, 3, S, S]`` or a list of ``float[3, S, S]``, one for every row that has an image, in
    row order; in a batch without image tokens, one for every row.
    """

    config_class = CogAgentConfig  # type: ignore[assignment]
    config: CogAgentConfig
    _no_split_modules = ["CogAgentLayer", "VisionLayer", "CrossVisionModel"]  # noqa: RUF012
    layer_class = CogAgentLayer
    vision_class = CogAgentVisionModel

    def __init__(self, config: CogAgentConfig) -> None:
        super().__init__(config)
        self.cross_vision = CrossVisionModel(config.cross_vision)
        self.post_init()

    def extend_step(self, step: Step, types: Tensor, extra: dict[str, Any]) -> CrossStep:
        """Add the large pictures: new ones, or those kept with the cache.

        Raises:
            InputError: a picture comes after the first tokens of a conversation, or as
                :meth:`look`.
        """
        images: Images = extra.get("cross_pixel_values")
        cache = step.cache
        past = cache.get_seq_length() if cache is not None else 0
        if not past:
            cross = self.look(types, images, keep=cache is not None)
            if cache is not None:
                setattr(cache, _ON_CACHE, cross)
        elif images is not None or (types.shape[1] > 1 and bool((types == 1).any())):
            raise InputError(
                f"{past} tokens are cached, but CogAgent takes its picture with the first tokens "
                "of a conversation; start again with an empty cache"
            )
        else:
            cross = getattr(cache, _ON_CACHE, None)
        return CrossStep(step.route, step.cos, step.sin, step.mask, cache, cross)

    def look(self, types: Tensor, images: Images, keep: bool) -> Cross | None:
        """Encode the large pictures of a prompt; none where there are none.

        Args:
            types: ``int64[B, L]``, 0 language, 1 image.
            images: as ``cross_pixel_values``.
            keep: whether the layers keep their keys and values of them.

        Raises:
            InputError: a row has several images, or a picture lacks one of its two sizes.
        """
        count = 0 if images is None else len(images)
        places = (types == 1).sum(dim=1)
        side = self.config.vision.image_size // self.config.vision.patch_size
        rows, cols = self.config.vision.token_grid(side, side)
        if int(places.max()) > rows * cols + 2:
            raise InputError("CogAgent takes one image a conversation; leave out the others")
        seeing = places.nonzero().flatten()
        wanted = len(seeing)
        if not wanted and count:  # the decoder alone, with a large picture for every row
            wanted = len(types)
        if count != wanted:
            raise InputError(
                f"{count} large pictures (cross_pixel_values) for {wanted} rows with an image; "
                "CogAgent needs every image in both sizes: use the model's own processor"
            )
        if images is None or not count:
            return None
        pixels = images if isinstance(images, Tensor) else torch.stack(list(images))
        some = 0 < len(seeing) < len(types)
        return Cross(self.cross_vision(pixels), seeing if some else None, keep)


class CogAgentForCausalLM(CogVLMForCausalLM):
    """CogAgent with its head: logits, loss, ``generate``.

    ``forward`` takes ``cross_pixel_values``, as :class:`CogAgentModel`, besides the arguments of
    :class:`CogVLMForCausalLM`.
    """

    config_class = CogAgentConfig  # type: ignore[assignment]
    config: CogAgentConfig
    _no_split_modules = CogAgentModel._no_split_modules
    model_class = CogAgentModel
    image_inputs = ("pixel_values", "cross_pixel_values")

    def prepare_inputs_for_generation(
        self, *args: Any, cross_pixel_values: Images = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Leave out the large pictures where transformers leaves out the small ones.

        They are named because ``generate`` reads from here, too, what a model takes.
        """
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs: dict[str, Any] = prepare(*args, **kwargs)
        if kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True):
            inputs["cross_pixel_values"] = cross_pixel_values
        return inputs
