"""Several processes train one model: what they tell each other, and how they share its weights.

Knows nothing about recipes or data.  ``torchrun`` (or anything that sets the same variables)
starts the processes; torch's own engines do the work::

    kind    weights, gradients, optimiser        torch's name                  DeepSpeed's
    ddp     whole in every process               DistributedDataParallel       -
    zero2   cut; weights whole while a step      fully_shard without           ZeRO-2
            goes forward and back                reshard_after_forward
    fsdp    cut; whole one layer at a time       fully_shard                   ZeRO-3
    tensor  cut inside layers; never whole       transformers' tp_plan         -

With ``tensor`` all processes take every row together, see :mod:`cogvlm.models.parallel`.  With the
others they divide the rows, and every process must ask for the same weights in the same order, or
all wait for ever.  What a process asks for depends on whether its rows have a picture, so
:func:`in_step` gives each as many micro-batches as the others have, and one row with a blank
picture where only others have any: it has no label, so its gradients are zero, and the step is the
one that a single process makes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ..errors import ConfigError, ResourceError
from ..linear import QuantisedLinear
from ..processor import Encoded
from .compute import KINDS as NUMBERS
from .compute import layers

KINDS = ("ddp", "zero2", "fsdp", "tensor")
T = TypeVar("T")

# Saving a large checkpoint keeps the others waiting; torchrun ends them if one of them fails.
_PATIENCE = timedelta(hours=2)
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "remote process")


@dataclass
class World:
    """The processes of a run; of one alone, nothing is sent."""

    rank: int = 0
    size: int = 1
    stop: bool = False  # whether one of them was asked to stop; all know at the end of a step

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def firsts(self, value: T) -> T:
        """The value of the first process."""
        if self.size == 1:
            return value
        sent = [value]
        dist.broadcast_object_list(sent, src=0)
        return sent[0]

    def add(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures of a step, of all processes together."""
        total: dict[str, float] = {}
        told = self.gather((dict(figures), self.stop))
        for one, _ in told:
            for key, value in one.items():
                total[key] = total.get(key, 0.0) + value
        self.stop = any(stop for _, stop in told)
        return total

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Inside, Ctrl-C and a polite kill of one process stop all of them after their step.

        One process alone is interrupted at once, as ever.
        """
        if self.size == 1:
            yield
            return
        own = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != own:  # a process that prepares rows
                raise KeyboardInterrupt
            self.stop = True

        kept = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def started() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """The device of this process, of those a recipe means: its own GPU, or the CPU.

    Raises:
        ConfigError: a device that processes cannot share out, or fewer GPUs than processes.
    """
    if started() == 1 or device == "cpu":
        return device
    if device not in ("auto", "cuda"):
        raise ConfigError(f"device {device!r} and several processes: give auto, cuda or cpu")
    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    mine, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if mine >= count:
        raise ConfigError(
            f"process {mine} of this machine has no GPU, there are {count}; start no more than "
            "that (--nproc-per-node), or set device=cpu"
        )
    return f"cuda:{mine}"


@contextmanager
def processes(device: str) -> Iterator[World]:
    """Connect the processes; all but the first write nothing to standard output from then on.

    Args:
        device: of this process.

    Raises:
        ResourceError: they cannot be connected, or, inside, another one has ended.
    """
    size = started()
    if size == 1:
        yield World()
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"{size} processes cannot be connected ({str(error).splitlines()[0]}); start them with "
            "torchrun"
        ) from error
    world = World(dist.get_rank(), size)
    if not world.first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end
    try:
        yield world
    except RuntimeError as error:
        if any(sign in str(error) for sign in _LOST):
            raise ResourceError(
                f"process {world.rank} of {size}: another one has ended; see what that one said"
            ) from error
        raise
    dist.destroy_process_group()  # not where one has failed: it could wait for the others


# --- weights ---


def share_of(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """What this process holds of a tensor, in the same memory; plain, so that it is quick.

    Args:
        tensor: a parameter, or its gradient.
        like: the parameter of a gradient, which may come cut in another way; all must ask then.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local().detach()


def cut_along(like: Tensor) -> int | None:
    """The dimension in which the processes hold different parts of a parameter, if any."""
    if not isinstance(like, DTensor):
        return None
    return next((p.dim % like.ndim for p in like.placements if isinstance(p, Shard)), None)


def whole(value: Tensor, like: Tensor, keep: bool = True) -> Tensor | None:
    """The shares of all processes together, on the CPU; all must ask.

    Args:
        value: this process's share.
        like: the parameter that is cut as ``value`` is; where it is not, ``value`` is whole.
        keep: whether this process wants it; otherwise it only gives its share.
    """
    dim = cut_along(like)
    if dim is None:
        return value
    assert isinstance(like, DTensor)
    mesh, own = like.device_mesh, value.movedim(dim, 0)
    rows = -(-like.shape[dim] // mesh.size())  # in every share; at the end there may be fewer
    mine = value.new_zeros(rows, *own.shape[1:])
    mine[: len(own)] = own
    found = value.new_empty(rows * mesh.size(), *own.shape[1:])
    dist.all_gather_into_tensor(found, mine, group=mesh.get_group())
    if not keep:
        return None
    return found[: like.shape[dim]].movedim(0, dim).to("cpu", copy=True).contiguous()


def part(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, cut as the parameter ``like`` is."""
    dim = cut_along(like)
    if dim is None:
        return value
    assert isinstance(like, DTensor)
    pieces = value.chunk(like.device_mesh.size(), dim=dim)
    rank = like.device_mesh.get_local_rank()
    return pieces[rank] if rank < len(pieces) else value.narrow(dim, 0, 0)


def each(
    state: dict[str, Any], likes: Sequence[Tensor], change: Callable[[Tensor, Tensor], Any]
) -> dict[str, Any]:
    """The state of an optimiser, with ``change(tensor, its parameter)`` for every tensor in it."""
    entries = {
        index: {
            key: change(value, likes[index]) if isinstance(value, Tensor) and value.ndim else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def widen(module: nn.Module) -> None:
    """Make what trains float32."""
    wide: dict[nn.Parameter, nn.Parameter] = {}  # tied ones are one
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.requires_grad or parameter.dtype is torch.float32:
                continue
            if isinstance(parameter, DTensor):  # whose data cannot be exchanged
                if parameter not in wide:
                    wide[parameter] = nn.Parameter(parameter.detach().float())
                setattr(owner, name, wide[parameter])
            else:
                parameter.data = parameter.data.float()


@dataclass
class Shared:
    """A model that processes share."""

    world: World
    model: nn.Module
    forward: Callable[..., Any]  # the model as it is called in training
    kind: str = "ddp"

    def piece(self, last: bool) -> AbstractContextManager[None]:
        """What a micro-batch goes forward and back in; gradients are summed after the last."""
        if isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return nullcontext()

    @property
    def cut(self) -> bool:
        """Whether this process holds a share of the weights only."""
        return self.world.size > 1 and self.kind != "ddp"

    @property
    def apart(self) -> bool:
        """Whether, while :meth:`measuring`, this process may ask what others do not."""
        return not self.cut or self.kind == "zero2"

    @property
    def rows(self) -> World:
        """The processes that divide the rows of a step."""
        return dividing(self.world, self.kind)

    def add(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures of a step, of all its rows; every process knows then whether one is to stop."""
        if self.rows is self.world:
            return self.world.add(figures)
        self.world.add({})
        return dict(figures)

    def norm(self, own: Sequence[Tensor], alike: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients.

        Args:
            own: of which each process has a share.
            alike: that are the same in every process.
        """
        norms = [torch.nn.utils.get_total_norm(list(grads)).square() for grads in (own, alike)]
        if self.cut:
            dist.all_reduce(norms[0])
        return (norms[0] + norms[1].to(norms[0])).sqrt()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, the model answers: what is asked of it beside ``forward`` is whole too.

        With ``zero2`` all of it is, from the beginning: nothing is asked of other processes.  With
        ``tensor`` it answers as it is, all processes together.
        """
        if self.cut and self.kind != "tensor":
            for module in _divided(self.model) if self.apart else [self.model]:
                module.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            if self.cut and self.kind != "tensor":
                _gather_no_more(self.model)


def _gather_no_more(model: nn.Module) -> None:
    """Let go of weights that are whole: those that come next may be others."""
    for module in _divided(model):
        module.reshard()


def _divided(model: nn.Module) -> list[Any]:
    """The modules whose weights are gathered together."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def dividing(world: World, kind: str) -> World:
    """Those of the processes that divide the rows of a step: with ``tensor`` each has them all."""
    return World() if kind == "tensor" else world


def alone(model: nn.Module) -> Shared:
    """The model of one process."""
    return Shared(World(), model, model)


def share(model: Any, kind: str, world: World, numbers: str) -> Shared:
    """Let the processes of ``world`` train ``model``, in place; what trains is float32 then.

    Args:
        model: the same in every process; what trains is chosen.
        kind: one of :data:`KINDS`; for ``tensor`` it has been loaded cut.
        world: of one process, nothing happens.
        numbers: what is computed in, see :data:`cogvlm.train.compute.KINDS`.

    Raises:
        ConfigError: a model, or numbers, that cannot be cut.
    """
    if world.size == 1 or kind in ("ddp", "tensor"):
        widen(model)
    if kind == "tensor":
        if world.size > 1 and numbers == "fp16":  # each process knows its own overflows alone
            raise ConfigError("parallel tensor: compute fp16 is not known there; take bf16 or fp32")
        return Shared(world, model, model, kind)
    if world.size == 1 or not any(p.requires_grad for p in model.parameters()):
        return Shared(world, model, model)
    if kind == "ddp":
        engine = nn.parallel.DistributedDataParallel
        names = signature(engine).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {buffers: False}  # they do not change
        forward = engine(
            model,
            find_unused_parameters=True,  # the experts, in a step without a picture
            init_sync=False,  # all read the same files; and weights of four bits cannot be sent
            gradient_as_bucket_view=True,
            **options,
        )
        return Shared(world, model, forward)
    _cut(model, kind, world, numbers)
    return Shared(world, model, model, kind)


def _cut(model: Any, kind: str, world: World, numbers: str) -> None:
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    quantised = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantisedLinear) or type(module).__module__.startswith("bitsandbytes")
    ]
    if quantised:
        raise ConfigError(
            f"parallel {kind}: {quantised[0]} is quantised and cannot be cut over processes; take "
            "parallel: ddp, or precision: bfloat16"
        )
    if numbers == "fp16":
        raise ConfigError(f"parallel {kind}: compute fp16 is not known there; take bf16 or fp32")
    mesh = init_device_mesh(model.device.type, (world.size,))
    # Autocast goes on as in one process; the weights come in its numbers already, at half the size.
    half = NUMBERS[numbers] if numbers == "bf16" else None
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    vision = model.model.vision
    # Pictures of several sizes go through the tower one size after the other, which another
    # process may have fewer of: then tower and adapter are put together once, as one.
    one_size = getattr(model.config.vision, "grid", "square") == "square"
    inside = set(vision.modules())
    parts = [part for part in layers(model) if one_size or part not in inside]
    for part in (*parts, vision, model):
        widen(part)
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=kind == "fsdp")
    register_fsdp_forward_method(vision, "encode")


# --- rows ---


def in_step(
    world: World, groups: Sequence[list[Encoded]], count: int, blank: Callable[[bool], Encoded]
) -> tuple[list[list[Encoded]], int]:
    """Micro-batches that go in step with those of the other processes.

    Args:
        world: of one process, nothing changes.
        groups: rows of the micro-batches of this process.
        count: of its labels.
        blank: a row without labels, with or without a picture.

    Returns:
        The micro-batches, as many as in every process; and the labels of all processes.
    """
    if world.size == 1:
        return list(groups), count
    seen = [any(row.pixel_values for row in rows) for rows in groups]
    told = world.gather((count, seen))
    made = []
    for i, flags in enumerate(zip_longest(*(flags for _, flags in told), fillvalue=False)):
        rows = list(groups[i]) if i < len(groups) else []
        picture = any(flags)
        if not rows or (picture and not seen[i]):
            rows.append(blank(picture))
        made.append(rows)
    return made, sum(counts for counts, _ in told)
