"""Configuration of every model of the family, and named presets."""

from __future__ import annotations

from .cogvlm import CogVLMConfig, VisionConfig
from .family import FamilyConfig, recognise
from .presets import preset

__all__ = ["CogVLMConfig", "FamilyConfig", "VisionConfig", "preset", "recognise"]
