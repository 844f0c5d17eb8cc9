"""Small real models and inputs, the same in every test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogvlm.config import preset
from cogvlm.models.cogvlm import CogVLMForCausalLM


def toy_model(seed: int = 0, **changes: Any) -> CogVLMForCausalLM:
    """A random float32 model whose logits are not nearly equal."""
    torch.manual_seed(seed)
    model = CogVLMForCausalLM(preset("toy", **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            fan = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.normal_(std=0.1 if parameter.ndim < 2 else 1.2 * fan**-0.5)
    return model


def row(model: CogVLMForCausalLM, *parts: int | Tensor) -> dict[str, Any]:
    """A prompt of one row: text of so many tokens, or images ``float[3, H, W]``, in order."""
    ids: list[int] = []
    types: list[int] = []
    images: list[Tensor] = []
    vision = model.config.vision
    for part in parts:
        if isinstance(part, Tensor):
            grid = model.model.vision.grid(*part.shape[-2:])
            rows, cols = vision.token_grid(*grid)
            ids += [3] * (rows * cols + 2)
            types += [1] * (rows * cols + 2)
            images.append(part)
        else:
            ids += [(17 * len(ids) + 29 * i) % 300 + 10 for i in range(part)]
            types += [0] * part
    return {
        "input_ids": torch.tensor([ids]),
        "token_type_ids": torch.tensor([types]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": images or None,
    }


def left_pad(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows joined into one batch, padding on the left."""
    length = max(r["input_ids"].shape[1] for r in rows)
    batch: dict[str, Any] = {}
    for key, fill in (("input_ids", 3), ("token_type_ids", 0), ("attention_mask", 0)):
        padded = [
            torch.nn.functional.pad(r[key], (length - r[key].shape[1], 0), value=fill) for r in rows
        ]
        batch[key] = torch.cat(padded)
    images = [image for r in rows for image in r["pixel_values"] or []]
    return {**batch, "pixel_values": images or None}


def image(seed: int = 0, height: int = 56, width: int = 56) -> Tensor:
    """Random pixels ``float[3, height, width]``."""
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
