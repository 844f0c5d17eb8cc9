"""Muon: momentum whose matrices are made orthogonal before they are applied.

torch has the same optimiser, but computes in bfloat16, which on a processor without bfloat16 units
takes longer than the rest of the step; this one keeps the dtype of the weights.

Sources: Keller Jordan, github.com/KellerJordan/Muon; scale of the update: Moonlight,
arXiv 2502.16982 (an update has the root mean square that AdamW's has, so one learning rate
serves both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values towards 1


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly ``U V^T`` of ``matrix = U S V^T``: singular values between about 0.7 and 1.2.

    >>> u = orthogonal(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    >>> bool((u.diagonal() > 0.6).all()), bool((u - u.diagonal().diag()).abs().max() < 1e-6)
    (True, True)
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices alone; give other parameters to AdamW.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: of the gradient, applied the Nesterov way.
        weight_decay: decoupled, per step and unit of learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                held = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(held, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
