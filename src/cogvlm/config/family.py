"""Which model of the family a ``config.json`` describes, told from its keys alone.

============================  =======================================  ==================
released class                told by                                  here
============================  =======================================  ==================
``CogVLMForCausalLM`` (2)     ``num_multi_query_heads``                ``CogVLMConfig``
``CogVLMForCausalLM`` (1)     ``vision_config`` without the above      ``CogVLMConfig``
``CogVLMVideoForCausalLM``    its name in ``architectures``            ``CogVLMConfig``
``CogAgentForCausalLM``       ``cross_image_size``                     ``CogAgentConfig``
``ChatGLMForConditional-      ``multi_query_group_num``                ``Glm4vConfig``
Generation`` (GLM-4V,
CogAgent-9B)
============================  =======================================  ==================

The two generations share a class name, and the released files leave out what the code of each
took for granted; :func:`recognise` adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ..errors import CheckpointError
from .cogagent import CogAgentConfig
from .cogvlm import CogVLMConfig
from .glm4v import Glm4vConfig

FamilyConfig: TypeAlias = CogVLMConfig | Glm4vConfig

_VIDEO = "CogVLMVideoForCausalLM"


def recognise(values: Mapping[str, Any], where: str) -> FamilyConfig:
    """The configuration that the values of a ``config.json`` describe; ``where`` names the file.

    Raises:
        CheckpointError: the file is of no model of the family.
        ConfigError: unknown keys or impossible values.
    """
    vision = values.get("vision_config")
    if not isinstance(vision, Mapping):
        raise CheckpointError(f"{where} has no vision_config: not a model of the CogVLM family")
    if "multi_query_group_num" in values:
        return Glm4vConfig(**values)
    if _VIDEO in (values.get("architectures") or ()):
        return CogVLMConfig(**{"visual_expert": "none", **values})
    if "cross_image_size" in values:
        return CogAgentConfig(**_first_generation(values, vision))
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
        # Defaults of the released configuration class, which differ from the second generation's.
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return {**taken_for_granted, **values, "vision_config": {"adapter": "linear_glu", **vision}}
