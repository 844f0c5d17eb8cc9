"""Named configurations."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .cogvlm import CogVLMConfig


def _toy(**changes: Any) -> dict[str, Any]:
    """Small numbers for tests: every dimension differs from every other."""
    vision = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "intermediate_size": 80,
        "image_size": 56,
        "num_positions": 17,
    }
    base: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_multi_query_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "vision_config": {**vision, **changes.pop("vision_config", {})},
    }
    return {**base, **changes}


_NANO: dict[str, Any] = {
    # SmolLM2-135M-Instruct
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_multi_query_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rotary": "float32",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "template_version": "chatml",
    "language_model": "smollm2-135m-instruct",
    "expert_rank": 16,
    "image_positions": "flat",
    "vision_config": {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_heads": 6,
        "intermediate_size": 768,
        "grid": "native",
        "max_rows": 4,
        "max_cols": 64,
        "num_positions": 257,
        "adapter_merge": (4, 1),  # a token is a column of a line of print, about one character
        "adapter_intermediate_size": 2048,
    },
}


def _nano(**changes: Any) -> dict[str, Any]:
    """Nano: a tower for strips of print, SmolLM2-135M and low-rank experts."""
    vision = {**_NANO["vision_config"], **changes.pop("vision_config", {})}
    return {**_NANO, "vision_config": vision, **changes}


def _cogvlm(**changes: Any) -> dict[str, Any]:
    """CogVLM-17B: Vicuna-7B, no convolution, one key and value head for every query head."""
    vision = {"image_size": 490, "num_positions": 1226, "adapter": "linear_glu"}
    base: dict[str, Any] = {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_multi_query_heads": 32,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "expert_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vision_config": {**vision, **changes.pop("vision_config", {})},
    }
    return {**base, **changes}


def _video(**changes: Any) -> dict[str, Any]:
    """CogVLM2-Video and -Caption: frames of 224 pixels, no visual expert."""
    vision = {"image_size": 224, "num_positions": 257}
    base: dict[str, Any] = {
        "visual_expert": "none",
        "max_position_embeddings": 2048,
        "vision_config": {**vision, **changes.pop("vision_config", {})},
    }
    return {**base, **changes}


def preset(name: str, **changes: Any) -> CogVLMConfig:
    """A named configuration; ``changes`` override fields.

    ``cogvlm2`` (19B), ``cogvlm2-video`` (12B), ``cogvlm`` (17B at 490 pixels), ``nano``, ``toy``.

    Raises:
        ConfigError: no preset of that name.

    >>> preset("cogvlm2").vision.num_hidden_layers
    63
    """
    made = {
        "cogvlm": _cogvlm,
        "cogvlm2": dict,
        "cogvlm2-video": _video,
        "nano": _nano,
        "toy": _toy,
    }
    if name not in made:
        raise ConfigError(f"no preset {name!r}; known: {', '.join(sorted(made))}")
    return CogVLMConfig(**made[name](**changes))
