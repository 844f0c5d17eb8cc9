"""Configuration of GLM-4V-9B, and of CogAgent-9B-20241220, which is the same class.

The field names are those of the released ``config.json``.  Many of them choose between variants
of earlier ChatGLM models; those that GLM-4V does not use are refused, never ignored.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from ..errors import ConfigError
from .cogvlm import VisionConfig
from .keys import check_choice, check_keys

# What the released model is, of the variants that the field names could describe.
_ONLY: dict[str, Any] = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "multi_query_attention": True,
    "original_rope": True,
    "fp32_residual_connection": False,
    "pre_seq_len": None,
    "prefix_projection": False,
}


class Glm4vVisionConfig(VisionConfig):
    """The tower of CogVLM2 at 1120 pixels; its convolution maps to the width of the decoder.

    Raises:
        ConfigError: an unknown key, sizes that do not divide, or another adapter or grid.
    """

    model_type = "glm4v_9b_vision"

    image_size: int = 1120  # pixels a side
    num_positions: int = 6401  # rows of the position table, class token included
    scaling_factor: int | float = 8  # the features, markers included, are divided by it

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice(self.adapter, ("conv_glu",), "vision_config.adapter")
        check_choice(self.grid, ("square",), "vision_config.grid")
        if self.scaling_factor <= 0:
            raise ConfigError(
                f"vision_config: scaling_factor is {self.scaling_factor}; give more than 0"
            )
        unit = self.patch_size * math.lcm(*self.merge)
        if self.image_size % unit:
            raise ConfigError(
                f"vision_config: image_size {self.image_size} is not a multiple of {unit}"
            )


class Glm4vConfig(PreTrainedConfig):
    """A GLM-4V-9B; the defaults are the released model.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), or an impossible value.
    """

    model_type = "chatglm"
    attribute_map = {  # noqa: RUF012  (what transformers calls the released fields)
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "max_position_embeddings": "seq_length",
    }
    sub_configs = {"vision_config": Glm4vVisionConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    # Fixed for this family; not fields of the file.
    language_model = None  # the folder always holds the language part too
    visual_expert = "none"  # image tokens use the language model's own weights
    image_positions = "shared"  # one position id for all patches of an image

    padded_vocab_size: int = 151552  # rows of the embedding and of the head
    hidden_size: int = 4096  # width of the decoder
    ffn_hidden_size: int = 13696  # width of the gated MLP
    num_layers: int = 40  # decoder layers
    num_attention_heads: int = 32  # query heads
    multi_query_group_num: int = 2  # key and value heads
    kv_channels: int = 128  # width of a head; rotation acts on its first half
    seq_length: int = 8192  # context length the weights were trained for
    layernorm_epsilon: float = 1.5625e-07  # of every RMSNorm
    add_qkv_bias: bool = True  # queries, keys and values have a bias
    rope_ratio: int | float = 1  # the base of the rotary frequencies is 10000 times this
    initializer_range: float = 0.02  # standard deviation of fresh weights; not in released files
    tie_word_embeddings: bool = False  # the head is the embedding
    use_cache: bool = True  # keep keys and values while generating
    bos_token_id: int | None = None  # there is none: a prompt begins with [gMASK]<sop>
    eos_token_id: int | list[int] | None = None  # None: 151329, 151336, 151338
    pad_token_id: int | None = 151329
    boi_token_id: int = 151339  # before an image in the released, unexpanded prompt
    eoi_token_id: int = 151340  # after an image in the released, unexpanded prompt
    vision_config: Glm4vVisionConfig | dict[str, Any] | None = None  # the tower and the adapter
    # Without effect on what is computed: how the released kernels scale, fuse and round.
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    bias_dropout_fusion: bool = True
    classifier_dropout: int | float | None = None  # of a classification head, which is not here
    # One value only; see _ONLY.
    hidden_dropout: int | float = 0.0  # after each branch
    attention_dropout: int | float = 0.0  # of the attention weights
    rmsnorm: bool = True  # RMSNorm, not LayerNorm
    post_layer_norm: bool = True  # a norm after the last layer
    apply_residual_connection_post_layernorm: bool = False  # the residual is taken before the norm
    add_bias_linear: bool = False  # a bias in every linear layer
    multi_query_attention: bool = True  # grouped queries
    original_rope: bool = True  # rotation of neighbouring pairs
    fp32_residual_connection: bool = False  # the residual in float32
    pre_seq_len: int | None = None  # learned prefix of this length
    prefix_projection: bool = False  # the learned prefix passes through an MLP

    def __post_init__(self, **kwargs: Any) -> None:
        self._same_by_both_names(kwargs)
        check_keys(self, kwargs, "config.json")
        if not isinstance(self.vision_config, Glm4vVisionConfig):
            self.vision_config = Glm4vVisionConfig(**(self.vision_config or {}))
        if self.eos_token_id is None:
            self.eos_token_id = [151329, 151336, 151338]
        super().__post_init__(**kwargs)
        for name, value in _ONLY.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"config.json: {name} is {getattr(self, name)!r}, a variant that GLM-4V does "
                    f"not use; only {value!r} is supported"
                )
        self._check_sizes()

    def _same_by_both_names(self, kwargs: dict[str, Any]) -> None:
        # Released files give the vocabulary and the number of layers twice.
        for alias, name in self.attribute_map.items():
            if alias in kwargs and kwargs.pop(alias) != getattr(self, name):
                raise ConfigError(
                    f"config.json: {alias} differs from {name}, which is {getattr(self, name)}; "
                    f"they are one number: give it as {name}"
                )

    def _check_sizes(self) -> None:
        if self.num_attention_heads % self.multi_query_group_num:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple "
                f"of multi_query_group_num {self.multi_query_group_num}"
            )
        if self.kv_channels % 4:
            raise ConfigError(
                f"config.json: kv_channels {self.kv_channels} is not a multiple of 4, but pairs "
                "in half of it are rotated"
            )

    @property
    def vision(self) -> Glm4vVisionConfig:
        """``vision_config``, as the object it always is after construction."""
        assert isinstance(self.vision_config, Glm4vVisionConfig)
        return self.vision_config

    @property
    def image_tokens(self) -> int:
        """Tokens of an image without its two markers; every image has the same number."""
        rows, cols = self.vision.token_grid(*self.vision.table_grid)
        return rows * cols
