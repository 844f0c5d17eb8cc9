"""A toy of every family with a processor of its own, and prompts for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import nn

from cogvlm.config import Glm4vConfig, preset, recognise
from cogvlm.load import Loaded
from cogvlm.models.cogagent import CogAgentForCausalLM
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.glm4v import Glm4vForCausalLM
from cogvlm.processor import Encoded, Processor, SquarePixels, get_template, user
from engine.toys import EOS, Bytes

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "intermediate_size": 56,
    "image_size": 56,
    "num_positions": 17,
}
IDS = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 3}
COGAGENT: dict[str, Any] = {
    **IDS,
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "cross_hidden_size": 32,
    "cross_compute_hidden_size": 24,
    "cross_image_size": 70,
    "template_version": "chat",
    "vision_config": {**VISION, "patch_size": 14},
    "cross_vision_config": {"layers": 3, "head_width": 16, "embed_dim": 20},
}
GLM: dict[str, Any] = {
    "padded_vocab_size": 320,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_layers": 3,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "kv_channels": 16,
    "seq_length": 512,
    "boi_token_id": 4,
    "eoi_token_id": 4,
    "pad_token_id": 3,
    "eos_token_id": [EOS],
    "vision_config": VISION,
}
LIKE_COGVLM: dict[str, dict[str, Any]] = {
    "cogvlm2": {},
    "flat": {"image_positions": "flat"},
    "tie": {"image_positions": "rope_tie"},
    "full": {"image_attention": "full"},
    "video": {"visual_expert": "none"},
    "behind": {"text_rank": 4},
    "cogvlm": {
        "expert_bias": False,
        "vision_config": {"adapter": "linear_glu"},
    },
}
FAMILIES = [*LIKE_COGVLM, "glm4v", "cogagent"]


def family(name: str) -> Loaded:
    """Random weights, whose answers depend on every token of the prompt."""
    torch.manual_seed(0)
    merge, model = 2, None
    if name == "cogagent":
        model, merge = CogAgentForCausalLM(recognise(dict(COGAGENT), "here")), 1
    elif name == "glm4v":
        model = Glm4vForCausalLM(Glm4vConfig(**GLM))
    else:
        model = CogVLMForCausalLM(preset("toy", **LIKE_COGVLM[name]))
        merge = 1 if name == "cogvlm" else 2
    _excite(model)
    processor = Processor(
        Bytes(),
        get_template("chat"),
        SquarePixels(56, merge=merge),
        image_token_id=4,
        cross_pixels=SquarePixels(70, patch=1, merge=1) if name == "cogagent" else None,
        max_images=1 if name == "cogagent" else None,
    )
    return Loaded(model.eval(), processor, name)


@torch.no_grad()
def _excite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            fan = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.normal_(std=0.1 if parameter.ndim < 2 else 1.2 * fan**-0.5)


def picture(seed: int) -> PILImage.Image:
    """Noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return PILImage.fromarray(noise)


def prompts(loaded: Loaded) -> list[Encoded]:
    """Eight of different lengths, some with a picture, one with two where that is possible."""
    several = (1,) if loaded.processor.max_images == 1 else (1, 2)
    asked: list[tuple[Any, ...]] = [
        ("Hi",),
        (picture(0), "What is this?"),
        ("Where was the red bus when the blue one left for the river?",),
        (picture(1), "And in this picture, who is standing at the door?"),
        (*(picture(i) for i in several), "Compare."),
        ("Why?",),
        (picture(0), "Is it?"),
        ("Tell me a story about a dog and a cat.",),
    ]
    return [loaded.processor.encode([user(*parts)]) for parts in asked]
