"""What a training step takes besides its weights: the step itself, on tensors without memory.

The model of a recipe is made with fewer layers, of torch's fake tensors, and takes a step through
the code that trains; every block is counted from its making to its end.  What one more layer adds
gives the figures of the whole.  So nothing here knows what a layer keeps.

Not counted: scratch space inside kernels, what an allocator loses between blocks, the driver.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import memory, quantize
from ..config import FamilyConfig
from ..linear import QuantisedLinear
from ..models.build import skeleton
from ..models.cogvlm import CogVLMForCausalLM
from .compute import KINDS
from .sight import HEAD, Sight

MOMENTS = ("tower", "decoder", "loss", "backward", "tower backward")


@dataclass(frozen=True)
class Shape:
    """What is in memory at one time."""

    rows: int
    images: int  # of a row
    image_tokens: int  # of an image, markers included
    text: int  # tokens of a row beside its images
    answers: int  # of them, that are learnt
    side: tuple[int, int]  # pixels of an image, height and width
    packed: int = 1  # sequences in a row that do not see each other

    @property
    def tokens(self) -> int:
        """Of a row."""
        return self.images * self.image_tokens + self.text


@dataclass(frozen=True)
class Way:
    """How a step is computed, so far as it is not in the model."""

    compute: str  # fp32 | bf16 | fp16
    accumulates: bool  # gradients of an earlier piece are there already
    cuda: bool  # autocast has other rules there


@dataclass(frozen=True)
class Moment:
    """Bytes beside weights, optimiser and mean: at most, and when it ends."""

    peak: float
    end: float

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.peak + other.peak, self.end + other.end)

    def __sub__(self, other: Moment) -> Moment:
        return self + other * -1

    def __mul__(self, times: float) -> Moment:
        return Moment(self.peak * times, self.end * times)


class Live(TorchDispatchMode):
    """Counts the blocks that are alive, and the most at one time in each moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.name = 0, MOMENTS[0]
        self.peaks: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self._blocks: dict[int, weakref.ref[Any]] = {}

    def begin(self, name: str) -> None:
        """A moment ends, the next begins."""
        self.ends[self.name] = self.now
        self.name = name
        self.peaks[name] = max(self.peaks.get(name, 0), self.now)

    def add(self, tensor: Tensor, counts: bool = True) -> None:
        """A tensor whose block may be new."""
        block = tensor.untyped_storage()
        key = block._cdata
        if (known := self._blocks.get(key)) is not None and known() is block:
            return
        size = block.nbytes() if counts else 0

        def gone(_: Any) -> None:
            self.now -= size
            self._blocks.pop(key, None)

        self._blocks[key] = weakref.ref(block, gone)
        self.now += size
        self.peaks[self.name] = max(self.peaks.get(self.name, 0), self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out


def _wide_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Autocast on CUDA gives layer norms in float32, on the CPU it leaves them."""
    weight, bias = (None if t is None else t.float() for t in (module.weight, module.bias))
    return F.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)


class _Standin(QuantisedLinear):
    """Takes the room that a quantised layer takes while it works; its weights are counted apart."""

    def __init__(self, plain: nn.Linear, restores: bool) -> None:
        super().__init__(plain, plain.weight.data)
        self.restores = restores

    def by_kernel(self, x: Tensor) -> Tensor:
        """The kernels of NF4 and int8 make the matrix whole."""
        return F.linear(x.to(self.weight.dtype), self.weight.clone(), self.bias).to(x.dtype)

    def restorable(self) -> bool:
        """On the CPU a slab at a time."""
        return self.restores

    def restored(self, first: int, last: int) -> Tensor:
        """A slab."""
        return self.weight[first:last].float().t()


def quantised(model: nn.Module, precision: str, cuda: bool) -> None:
    """Put stand-ins where ``precision`` has quantised layers; in place."""
    for name in quantize.plan(model, precision):
        module = name.removesuffix(".weight")
        parent, _, last = module.rpartition(".")
        plain = model.get_submodule(module)
        assert isinstance(plain, nn.Linear)
        setattr(model.get_submodule(parent), last, _Standin(plain, restores=not cuda))


def step(
    config: FamilyConfig, made: Callable[[FamilyConfig], CogVLMForCausalLM], shape: Shape, way: Way
) -> dict[str, Moment]:
    """Forward and backward of one piece: what each of :data:`MOMENTS` takes.

    Args:
        config: of the whole model.
        made: a model of a configuration without memory, ready to train.
        shape: of the piece.
        way: of the computation.
    """
    whole: Any = config
    layers, tower = whole.num_hidden_layers, whole.vision.num_hidden_layers
    every = int(getattr(config, "expert_every", 1))
    if layers % every or layers < 2 * every or tower < 2:  # too few to tell what one more adds
        return _step(made(config), shape, way)
    # The first layer is not like the others: what goes into it may have another dtype.
    model = made(memory.shallow(config, 2 * every, 2))
    named = model.named_parameters()
    keeps = any(p.requires_grad and memory.part_of(name) == "tower" for name, p in named)
    base = _step(model, shape, way)
    deep = _step(made(memory.shallow(config, 3 * every, 2)), shape, way)
    # Of a tower that does not train, nothing is kept: more of its layers take no more.
    tall = _step(made(memory.shallow(config, 2 * every, 3)), shape, way) if keeps else base
    return {
        name: base[name]
        + (deep[name] - base[name]) * (layers / every - 2)
        + (tall[name] - base[name]) * (tower - 2)
        for name in base
    }


def _step(model: CogVLMForCausalLM, shape: Shape, way: Way) -> dict[str, Moment]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _forget(model, mode)
    live = Live()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.add(tensor, counts=False)
    if way.accumulates:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = _empty(mode, tuple(parameter.shape), parameter.dtype)
                live.add(parameter.grad)
    given = _inputs(model, shape, mode)
    for value in tree_leaves(given):
        if isinstance(value, Tensor):
            live.add(value)
    _watch(model, live)
    sight = Sight(model) if hasattr(model, HEAD) else None
    model.train()
    if way.cuda and way.compute != "fp32":
        for norm in [m for m in model.modules() if isinstance(m, nn.LayerNorm)]:
            norm.forward = partial(_wide_norm, norm)  # type: ignore[method-assign]
    with live:
        # Tensors without memory call themselves the CPU's.
        with torch.autocast("cpu", KINDS[way.compute], enabled=way.compute != "fp32"):
            loss = model(**given, num_items_in_batch=shape.rows).loss
            if sight is not None and shape.images:
                loss = loss + sight.loss(given["token_type_ids"], list(given["pixel_values"]))
        live.begin("backward")
        with mode, live:  # what the backward pass makes itself is fake too
            loss.backward()
        del loss
        live.begin("end")
    return {m: Moment(live.peaks.get(m, 0), live.ends.get(m, 0)) for m in MOMENTS}


def _empty(mode: FakeTensorMode, shape: tuple[int, ...], dtype: torch.dtype) -> FakeTensor:
    return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))


def _forget(model: nn.Module, mode: FakeTensorMode) -> None:
    """Make every tensor a fake one."""
    cpu = torch.device("cpu")
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fake: Any = FakeTensor(mode, parameter.data, cpu)
                    fakes[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer, cpu)


def _inputs(model: CogVLMForCausalLM, shape: Shape, mode: FakeTensorMode) -> dict[str, Any]:
    """Types and labels are real: their values decide on shapes."""
    between = shape.text // (shape.images + 1)
    block = [0] * between + [1] * shape.image_tokens
    row = (block * shape.images + [0] * shape.text)[: shape.tokens]
    types = torch.tensor([row] * shape.rows)
    labels = torch.full_like(types, -100)
    if shape.answers:
        labels[:, -shape.answers :] = 0
    pixels = (shape.rows * shape.images, 3, *shape.side)
    given: dict[str, Any] = {
        "input_ids": _empty(mode, tuple(types.shape), torch.long),
        "token_type_ids": types,
        "pixel_values": _empty(mode, pixels, torch.float32) if shape.images else None,
        "labels": labels,
    }
    if shape.packed > 1:
        length = -(-types.shape[1] // shape.packed)
        places = torch.arange(types.shape[1]) % length
        given["sequence_positions"] = places.expand_as(types)
    if (cross := getattr(model.config, "cross_vision", None)) is not None and shape.images:
        large = (shape.rows, 3, cross.image_size, cross.image_size)
        given["cross_pixel_values"] = _empty(mode, large, torch.float32)
    return given


def _watch(model: CogVLMForCausalLM, live: Live) -> None:
    """Tell ``live`` where a step is."""

    def into_decoder(_: Any, args: tuple[Any, ...]) -> None:
        if live.name == "tower":
            live.begin("decoder")
            if args[0].requires_grad:
                args[0].register_hook(lambda _: live.begin("tower backward"))

    def into_loss(_: Any, args: tuple[Any, ...]) -> None:
        if live.name == "decoder":
            live.begin("loss")

    model.model.layers[0].register_forward_pre_hook(into_decoder)
    model.lm_head.register_forward_pre_hook(into_loss)


def fresh(config: FamilyConfig, dtype: torch.dtype) -> CogVLMForCausalLM:
    """A model without memory in ``dtype``."""
    made: Any = skeleton(config).to(dtype)  # type: ignore[arg-type]
    return made  # type: ignore[no-any-return]
