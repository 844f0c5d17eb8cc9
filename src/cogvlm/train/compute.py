"""In what numbers a step is computed: the one place that knows autocast and loss scaling.

Trained parameters are float32 always; the rest keeps the dtype it was loaded in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        params: list[Tensor],
        clip: float,
        together: Callable[[list[Tensor]], Tensor] | None = None,
    ) -> float | None:
        """Clip and step; the gradient's norm before that, or none where it was not finite.

        Args:
            optimizers: of ``params``.
            params: some of which have gradients.
            clip: the largest norm.
            together: the norm of the gradients of these parameters in all processes; none where
                this is one.

        Raises:
            CheckpointError: ``fp16``, and not finite however small the loss is scaled.
        """
        if not any(p.grad is not None for p in params):  # a batch with nothing to learn
            return 0.0
        for optimizer in optimizers:
            if any(p.grad is not None for g in optimizer.param_groups for p in g["params"]):
                self.scaler.unscale_(optimizer)
        learnt = [p for p in params if p.grad is not None]
        if together is not None:
            norm = together(learnt)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in learnt if p.grad is not None])
        finite = bool(torch.isfinite(norm))
        if finite:
            torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
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


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of decoder and towers."""
    return [
        layer
        for name, found in model.named_modules()
        if isinstance(found, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "blocks")
        for layer in found
    ]


def recompute(model: nn.Module) -> int:
    """Keep no activations inside the layers of decoder and towers: the backward computes them anew.

    Returns:
        How many layers there are.
    """
    found = layers(model)
    for layer in found:
        layer.forward = partial(_recomputed, layer.forward)
    return len(found)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
