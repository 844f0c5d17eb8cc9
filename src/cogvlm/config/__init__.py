"""Configuration of every model of the family, and named presets."""

from __future__ import annotations

from .cogagent import CogAgentConfig, CrossVisionConfig
from .cogvlm import CogVLMConfig, VisionConfig
from .family import FamilyConfig, recognise
from .glm4v import Glm4vConfig, Glm4vVisionConfig
from .presets import preset

__all__ = [
    "CogAgentConfig",
    "CogVLMConfig",
    "CrossVisionConfig",
    "FamilyConfig",
    "Glm4vConfig",
    "Glm4vVisionConfig",
    "VisionConfig",
    "preset",
    "recognise",
]
