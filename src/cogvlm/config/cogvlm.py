"""Configuration of CogVLM, CogVLM2 and CogVLM2-Video, which are one class.

The field names are those of the released ``config.json`` files where one exists; the options that
the released code does not have default to what CogVLM2 does.  Unknown keys are refused.
"""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig

from ..errors import ConfigError
from .keys import check_choice, check_keys, check_pair


class VisionConfig(PreTrainedConfig):
    """EVA2-CLIP tower and adapter (facts: CogVLM paper section 2.1; released ``visual.py``).

    Raises:
        ConfigError: an unknown key, or sizes that do not divide.
    """

    model_type = "cogvlm_vision"

    hidden_size: int = 1792  # width of the tower
    num_hidden_layers: int = 63  # EVA02-CLIP-E without its last block
    num_heads: int = 16  # attention heads; must divide hidden_size
    intermediate_size: int = 15360  # width of the MLP
    hidden_act: str = "gelu"  # exact GELU
    layer_norm_eps: float = 1e-6  # of the tower; the adapter's LayerNorm has 1e-5
    patch_size: int = 14  # pixels
    image_size: int = 1344  # pixels a side, for grid="square"
    in_channels: int = 3  # RGB
    num_positions: int = 9217  # rows of the position table, class token included
    dropout_prob: float = 0.0  # kept from the released files; the tower never drops
    # "square": every image is image_size x image_size. "native": any grid of at most
    # max_rows x max_cols patches, which takes the top left corner of the position table.
    grid: Literal["square", "native"] = "square"
    max_rows: int | None = None  # patches, for grid="native"
    max_cols: int | None = None  # patches, for grid="native"
    # "conv_glu": a strided convolution (2x2 released), then linear + GLU; "linear_glu": CogVLM;
    # "qformer": adapter_queries learned queries read the patches by cross-attention.
    adapter: Literal["conv_glu", "linear_glu", "qformer"] = "conv_glu"
    # Rows and columns of patches that the convolution joins into one token.
    adapter_merge: list[int] | tuple[int, ...] = (2, 2)
    adapter_intermediate_size: int | None = None  # None: that of the language model
    adapter_queries: int = 64  # tokens an image, for adapter="qformer"
    adapter_layers: int = 2  # cross-attention layers, for adapter="qformer"
    # Width of the head that spells strips of print, see models/ctc.py; None: there is none.
    ctc_hidden: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_keys(self, kwargs, "vision_config")
        super().__post_init__(**kwargs)
        check_choice(self.grid, ("square", "native"), "vision_config.grid")
        check_choice(self.adapter, ("conv_glu", "linear_glu", "qformer"), "vision_config.adapter")
        self.adapter_merge = check_pair(self.adapter_merge, "vision_config.adapter_merge")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"vision_config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_heads {self.num_heads}"
            )
        rows, cols = self.table_grid
        if rows * cols + 1 != self.num_positions:
            raise ConfigError(
                f"vision_config: num_positions is {self.num_positions}, but a {rows}x{cols} grid "
                f"and the class token need {rows * cols + 1}"
            )

    @property
    def table_grid(self) -> tuple[int, int]:
        """Rows and columns of the position table, in patches."""
        if self.grid == "native":
            if not self.max_rows or not self.max_cols:
                raise ConfigError("vision_config: grid='native' needs max_rows and max_cols")
            return self.max_rows, self.max_cols
        side = self.image_size // self.patch_size
        return side, side

    @property
    def merge(self) -> tuple[int, int]:
        """Rows and columns of patches that the adapter joins into one token."""
        rows, cols = self.adapter_merge if self.adapter == "conv_glu" else (1, 1)
        return rows, cols

    def token_grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of image tokens for a grid of ``rows`` x ``cols`` patches."""
        if self.adapter == "qformer":
            return 1, self.adapter_queries
        return rows // self.merge[0], cols // self.merge[1]


class CogVLMConfig(PreTrainedConfig):
    """A CogVLM2-type model; the defaults are CogVLM2-Llama3-19B.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), or an impossible value.
    """

    model_type = "cogvlm2"
    attribute_map = {"num_key_value_heads": "num_multi_query_heads"}  # noqa: RUF012
    sub_configs = {"vision_config": VisionConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 128256  # rows of the embedding and of the head
    hidden_size: int = 4096  # width of the decoder
    intermediate_size: int = 14336  # width of the gated MLPs
    num_hidden_layers: int = 32  # decoder layers
    num_attention_heads: int = 32  # query heads
    num_multi_query_heads: int = 8  # key and value heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"  # of the gated MLPs
    max_position_embeddings: int = 8192  # context length the weights were trained for
    rms_norm_eps: float = 1e-5  # of every RMSNorm
    rope_theta: float = 500000.0  # base of the rotary frequencies
    initializer_range: float = 0.02  # standard deviation of fresh weights
    tie_word_embeddings: bool = False  # the head is the embedding (SmolLM2)
    use_cache: bool = True  # keep keys and values while generating
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    pad_token_id: int | None = 128002
    template_version: Literal["base", "vqa", "chat", "chatml"] = "chat"  # prompt format
    # Where the language weights and the tokenizer come from when the folder holds only the
    # vision part (nano): a name or path for cogvlm.hub.language_model.
    language_model: str | None = None
    # Rotary tables. "reference": in the dtype of the stored inv_freq, positions too, as the
    # released bfloat16 code computes them; "float32": exact, a different model in bfloat16.
    rotary: Literal["reference", "float32"] = "reference"
    # Whether the experts' query_key_value has a bias (CogVLM2) or none (CogVLM).
    expert_bias: bool = True
    # Which parts of a layer have a second set of weights for image tokens.
    visual_expert: Literal["all", "mlp", "none"] = "all"
    expert_every: int = 1  # only layers 0, n, 2n, ... have an expert
    expert_rank: int | None = None  # None: full weights; r: language weights + rank-r correction
    # Rank of corrections to the attention's language weights for text behind a picture; None: none.
    # Other text never meets them: with no picture the language model stays itself.
    text_rank: int | None = None
    # "shared": one position id for all patches of an image (released); "flat": one each;
    # "rope_tie": two-dimensional (Su 2024, RoPE-Tie), text at (n, n).
    image_positions: Literal["shared", "flat", "rope_tie"] = "shared"
    # "causal": plain causal mask (released); "full": tokens of one image see each other.
    image_attention: Literal["causal", "full"] = "causal"
    vision_config: VisionConfig | dict[str, Any] | None = None  # the tower and the adapter

    def __post_init__(self, **kwargs: Any) -> None:
        check_keys(self, kwargs, "config.json")
        if not isinstance(self.vision_config, VisionConfig):
            self.vision_config = VisionConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)
        check_choice(self.rotary, ("reference", "float32"), "rotary")
        check_choice(self.visual_expert, ("all", "mlp", "none"), "visual_expert")
        check_choice(self.image_positions, ("shared", "flat", "rope_tie"), "image_positions")
        check_choice(self.image_attention, ("causal", "full"), "image_attention")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"config.json: hidden_size {self.hidden_size} is not a multiple of "
                    f"num_attention_heads {self.num_attention_heads}; give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_multi_query_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple "
                f"of num_multi_query_heads {self.num_multi_query_heads}"
            )
        if self.expert_every < 1:
            raise ConfigError(f"config.json: expert_every is {self.expert_every}; give 1 or more")

    def expert_in_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` has any expert weights."""
        return self.visual_expert != "none" and layer % self.expert_every == 0

    @property
    def vision(self) -> VisionConfig:
        """``vision_config``, as the object it always is after construction."""
        assert isinstance(self.vision_config, VisionConfig)
        return self.vision_config
