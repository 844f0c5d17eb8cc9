"""Configuration of CogAgent: CogVLM plus an encoder for a second, large copy of the picture.

Differences from CogVLM: every decoder layer reads the large copy by cross-attention, so the
decoder's sequence stays as short as for a small picture.  Source: CogAgent paper section 2.2 and
the released ``config.json``; the released code has the sizes of the second encoder in itself, here
they are :class:`CrossVisionConfig`.
"""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig

from ..errors import ConfigError
from .cogvlm import CogVLMConfig, VisionConfig
from .keys import check_keys


class CrossVisionConfig(PreTrainedConfig):
    """EVA02-CLIP-L, the encoder of the large copy; the defaults are the released sizes.

    Raises:
        ConfigError: an unknown key, or sizes that do not divide.
    """

    model_type = "cogagent_cross_vision"

    width: int = 1024  # of the encoder
    layers: int = 24  # blocks in the file; the last one is never run
    head_width: int = 64  # must divide width, and be a multiple of 4 (pairs, rows and columns)
    embed_dim: int = 768  # outputs of the head, which is never run
    mlp_ratio: float = 2.6667  # width of the gated MLP, in widths; rounded down
    patch_size: int = 14  # pixels
    pt_hw_seq_len: int = 16  # rotary positions run from 0 to this, whatever the picture's size
    image_size: int = 1120  # pixels a side
    layer_norm_eps: float = 1e-6  # of every LayerNorm

    def __post_init__(self, **kwargs: Any) -> None:
        check_keys(self, kwargs, "cross_vision_config")
        super().__post_init__(**kwargs)
        for name, value, unit in (
            ("width", self.width, self.head_width),
            ("head_width", self.head_width, 4),
            ("image_size", self.image_size, self.patch_size),
        ):
            if value % unit:
                raise ConfigError(
                    f"cross_vision_config: {name} {value} is not a multiple of {unit}"
                )
        if self.layers < 2:
            raise ConfigError(
                f"cross_vision_config: layers is {self.layers}; give 2 or more, the last is not run"
            )

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def inner(self) -> int:
        """Width of the gated MLP."""
        return int(self.width * self.mlp_ratio)


class CogAgentConfig(CogVLMConfig):
    """A CogAgent model; the defaults are CogAgent-18B (Vicuna-7B, 224 and 1120 pixels).

    Raises:
        ConfigError: an unknown key (the nearest known one is named), or an impossible value.
    """

    model_type = "cogagent"
    sub_configs = {  # noqa: RUF012
        "vision_config": VisionConfig,
        "cross_vision_config": CrossVisionConfig,
    }

    vocab_size: int = 32000  # rows of the embedding and of the head
    intermediate_size: int = 11008  # width of the gated MLPs
    num_multi_query_heads: int = 32  # key and value heads: one for every query head
    max_position_embeddings: int = 2048  # context length the weights were trained for
    rope_theta: float = 10000.0  # base of the rotary frequencies
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    expert_bias: bool = False  # the experts' query_key_value has none
    template_version: Literal["base", "vqa", "chat", "chat_old"] = "chat"  # type: ignore[assignment]
    cross_image_size: int = 1120  # pixels a side of the large copy
    cross_hidden_size: int = 1024  # width of the large copy's encoder
    cross_compute_hidden_size: int = 1024  # width of all heads of the cross-attention together
    cross_vision_config: CrossVisionConfig | dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_keys(self, kwargs, "config.json")
        if not isinstance(self.vision_config, VisionConfig):
            small = {"image_size": 224, "num_positions": 257, "adapter": "linear_glu"}
            self.vision_config = VisionConfig(**{**small, **(self.vision_config or {})})
        if not isinstance(self.cross_vision_config, CrossVisionConfig):
            size = {"image_size": self.cross_image_size, "width": self.cross_hidden_size}
            given = self.cross_vision_config or {}
            self.cross_vision_config = CrossVisionConfig(**{**size, **given})
        super().__post_init__(**kwargs)
        self._check_cross()

    def _check_cross(self) -> None:
        cross = self.cross_vision
        for name, value, other, inner in (
            ("cross_image_size", self.cross_image_size, "image_size", cross.image_size),
            ("cross_hidden_size", self.cross_hidden_size, "width", cross.width),
        ):
            if value != inner:
                raise ConfigError(
                    f"config.json: {name} is {value}, but cross_vision_config.{other} is {inner}; "
                    "give the same"
                )
        if self.cross_compute_hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"config.json: cross_compute_hidden_size {self.cross_compute_hidden_size} is not "
                f"a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.vision.grid != "square" or self.vision.adapter == "qformer":
            raise ConfigError(
                "config.json: CogAgent's table of added positions needs vision_config.grid "
                "'square' and adapter 'linear_glu' or 'conv_glu'"
            )
        if self.language_model is not None:
            raise ConfigError(
                "config.json: language_model is for folders without language weights, which "
                "CogAgent's are not; leave it out"
            )

    @property
    def cross_vision(self) -> CrossVisionConfig:
        """``cross_vision_config``, as the object it always is after construction."""
        assert isinstance(self.cross_vision_config, CrossVisionConfig)
        return self.cross_vision_config
