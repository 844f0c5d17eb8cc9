"""The class of each configuration, built without memory.  Knows nothing about files."""

from __future__ import annotations

from typing import Any

import torch

from ..config import CogAgentConfig, CogVLMConfig, FamilyConfig, Glm4vConfig
from .cogagent import CogAgentForCausalLM
from .cogvlm import CogVLMForCausalLM
from .glm4v import Glm4vForCausalLM

_CLASSES: dict[type[FamilyConfig], type[CogVLMForCausalLM]] = {
    CogVLMConfig: CogVLMForCausalLM,
    CogAgentConfig: CogAgentForCausalLM,
    Glm4vConfig: Glm4vForCausalLM,
}


def skeleton(config: FamilyConfig) -> CogVLMForCausalLM:
    """A model whose tensors have shapes but no memory."""
    build: Any = _CLASSES[type(config)]  # each takes its own configuration
    with torch.device("meta"):
        model: CogVLMForCausalLM = build(config)
    return model
