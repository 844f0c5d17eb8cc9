"""Which model of the family a ``config.json`` describes, told from its keys alone.

============================  =======================================  ==================
released class                told by                                  here
============================  =======================================  ==================
``CogVLMForCausalLM`` (2)     ``num_multi_query_heads``                ``CogVLMConfig``
``CogVLMForCausalLM`` (1)     ``vision_config`` without the above      ``CogVLMConfig``
``CogVLMVideoForCausalLM``    its name in ``architectures``            ``CogVLMConfig``
============================  =======================================  ==================

The two generations share a class name, and the released files leave out what the code of each
took for granted; :func:`recognise` adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .cogvlm import CogVLMConfig

FamilyConfig = CogVLMConfig

_UNSUPPORTED = {  # keys of config.json that only another architecture has
    "cross_image_size": "CogAgent",
    "multi_query_group_num": "GLM-4V",
}
_VIDEO = "CogVLMVideoForCausalLM"


def recognise(values: Mapping[str, Any], where: str) -> FamilyConfig:
    """The configuration that the values of a ``config.json`` describe; ``where`` names the file.

    Raises:
        CheckpointError: the file is of no model of the family.
        ConfigError: unknown keys or impossible values.
    """
    for key, family in _UNSUPPORTED.items():
        if key in values:
            raise CheckpointError(f"{where} is of a {family} model, which this version cannot run")
    vision = values.get("vision_config")
    if not isinstance(vision, Mapping):
        raise CheckpointError(f"{where} has no vision_config: not a model of the CogVLM family")
    if _VIDEO in (values.get("architectures") or ()):
        return CogVLMConfig(**{"visual_expert": "none", **values})
    if "num_multi_query_heads" not in values:
        return CogVLMConfig(**_first_generation(values, vision))
    return CogVLMConfig(**values)


def _first_generation(values: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """CogVLM-17B: a key and value head for every query head, no convolution, no expert bias."""
    heads = values.get("num_attention_heads", 32)
    taken_for_granted = {
        "num_multi_query_heads": heads,
        "expert_bias": False,
        "rope_theta": 10000.0,
    }
    return {**taken_for_granted, **values, "vision_config": {"adapter": "linear_glu", **vision}}
