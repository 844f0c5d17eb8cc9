"""Decoder layers compiled by torch (``compile: true``), for rows of any length.

A layer's own work is compiled once and serves all layers and all lengths.  For that the cut into
language and vision tokens, which in every batch is made of other spans (and would be compiled anew
for each), becomes two orders of the same tokens, held as tensors.
"""

from __future__ import annotations

import sys
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config import FamilyConfig
from ..config.cogagent import CogAgentConfig
from ..errors import ConfigError
from ..linear import QuantisedLinear
from ..models.language import Step, eager_attention
from ..models.positions import Route


class _Split(torch.autograd.Function):
    """``[B, L, ...]`` -> ``[B * L, ...]`` in another order, and the gradient back again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grouped: Tensor, sequence: Tensor) -> Tensor:
        ctx.save_for_backward(sequence)
        return x.flatten(0, 1)[grouped]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


class _Join(torch.autograd.Function):
    """The other way about."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grouped: Tensor, sequence: Tensor) -> Tensor:
        ctx.save_for_backward(grouped)
        return x[sequence]  # its shape is that of a tensor: no length is worked out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.flatten(0, 1)[ctx.saved_tensors[0]], None, None


@dataclass(frozen=True, eq=False, kw_only=True)
class Ordered(Route):
    """A route whose spans are orders of tokens."""

    grouped: Tensor  # int64[B * L], places in the sequence
    sequence: Tensor  # int64[B, L], places in the group

    @classmethod
    def like(cls, route: Route, device: torch.device) -> Route:
        """The same route."""
        spans = route.spans or ((0, route.batch * route.length, False),)
        spans = tuple(sorted(spans, key=lambda span: span[2]))  # language first, each in order
        order = torch.tensor(list(chain.from_iterable(range(a, b) for a, b, _ in spans)))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        given = vars(route) | {"spans": (), "grouped": order.to(device)}
        return cls(**given, sequence=back.view(route.batch, route.length).to(device))

    def split(self, sequence: Tensor) -> Tensor:
        """See :class:`Route`."""
        return _Split.apply(sequence, self.grouped, self.sequence)  # type: ignore[no-any-return]

    def join(self, grouped: Tensor) -> Tensor:
        """See :class:`Route`."""
        return _Join.apply(grouped, self.grouped, self.sequence)  # type: ignore[no-any-return]


def compile_layers(model: Any) -> bool:
    """Compile the decoder layers of ``model`` for training, in place; answers are left alone.

    The attention kernel is called as it is, from between two compiled pieces.  Where nothing can
    be compiled (no C++ compiler, no Triton), that is said on standard error.

    Args:
        model: with its LoRAs, before :func:`cogvlm.train.compute.recompute`.

    Returns:
        Whether they are compiled.

    Raises:
        ConfigError: quantised layers, whose kernels the compiler does not know; CogAgent.
    """
    if isinstance(model.config, CogAgentConfig):
        raise ConfigError("compile: CogAgent's layers are not compiled; leave compile out")
    for name, module in model.named_modules():
        foreign = type(module).__module__.startswith("bitsandbytes")
        if foreign or isinstance(module, QuantisedLinear):
            raise ConfigError(
                f"compile: {name} is quantised and cannot be compiled; take precision: bfloat16, "
                "or leave compile out"
            )
    if (why := _missing(model.device)) is not None:
        print(
            f"compile: goes on without, nothing compiles here: {why}", file=sys.stderr, flush=True
        )
        return False
    decoder = model.model
    decoder.extend_step = partial(_ordered, decoder.extend_step)
    outside = _kernel_outside(model.config)
    # Dropout meets the chance that it meets uncompiled.
    options: dict[str, Any] = {"fallback_random": True}
    for layer in decoder.layers:
        layer.self_attn.config = outside
        made = torch.compile(layer.forward, dynamic=True, options=options)
        layer.forward = partial(_either, layer.forward, made)
    return True


def _kernel_outside(config: FamilyConfig) -> FamilyConfig:
    """A configuration whose attention kernel is not compiled.

    Of a compiled one, torch 2.13 takes the strides on the CPU for those of the first batch.
    """
    known = config._attn_implementation or "eager"
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(known, eager_attention)
    ALL_ATTENTION_FUNCTIONS.register(f"outside_{known}", torch.compiler.disable(kernel))
    changed = copy(config)
    changed._attn_implementation = f"outside_{known}"
    return changed


def _missing(device: torch.device) -> str | None:
    """Why nothing can be compiled for ``device``; found by trying it."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler, or its absence, raises
        return " ".join(str(error).split())[:200]
    return None


def _ordered(extend_step: Any, step: Step, *rest: Any) -> Step:
    made: Step = extend_step(step, *rest)
    if not torch.is_grad_enabled():
        return made
    return replace(made, route=Ordered.like(made.route, made.cos.device))


def _either(plain: Any, made: Any, *args: Any, **kwargs: Any) -> Any:
    return (made if torch.is_grad_enabled() else plain)(*args, **kwargs)
