"""In what numbers a step is computed: the one place that knows autocast and loss scaling.

Trained parameters are float32 always; the rest keeps the dtype it was loaded in.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import CheckpointError, ConfigError

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Compute:
    """Forward, backward and update of one step in ``fp32``, ``bf16`` or ``fp16``.

    ``fp16`` scales the loss, and leaves out an update whose gradient is not finite.
    """

    def __init__(self, device: torch.device, kind: str = "fp32") -> None:
        if kind not in KINDS:
            raise ConfigError(f"compute {kind!r} is not one of {', '.join(KINDS)}")
        self.device, self.kind = device, kind
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")

    def forward(self) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        return torch.autocast(self.device.type, KINDS[self.kind], enabled=self.kind != "fp32")

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        self.scaler.scale(loss).backward()

    def update(
        self, optimizers: Sequence[torch.optim.Optimizer], params: list[Tensor], clip: float
    ) -> float | None:
        """Clip and step; the gradient's norm before that, or none where it was not finite.

        Raises:
            CheckpointError: ``fp16``, and not finite however small the loss is scaled.
        """
        if not any(p.grad is not None for p in params):  # a batch with nothing to learn
            return 0.0
        for optimizer in optimizers:
            if any(p.grad is not None for g in optimizer.param_groups for p in g["params"]):
                self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            for optimizer in optimizers:
                optimizer.step()
        if self.scaler.is_enabled():
            scale = self.scaler.get_scale() * (1.0 if finite else 0.5)
            if scale < 2.0**-10:
                raise CheckpointError("compute fp16 overflows at every scale; take bf16 or fp32")
            self.scaler.update(None if finite else scale)
        return float(norm) if finite else None

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return dict(self.scaler.state_dict())

    def resume(self, state: dict[str, Any]) -> None:
        """What :meth:`state` gave."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def recompute(model: nn.Module) -> int:
    """Keep no activations inside the layers of decoder and towers: the backward computes them anew.

    Returns:
        How many layers there are.
    """
    count = 0
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "blocks"):
            for layer in layers:
                layer.forward = partial(_recomputed, layer.forward)
                count += 1
    return count


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
