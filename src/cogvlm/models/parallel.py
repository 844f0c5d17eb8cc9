"""A model cut over several processes: tensor parallelism by transformers' own plan and loader.

Each process holds its share of every large matrix; all run the same forward in step and exchange
what the shares give (gloo on the CPU, NCCL on CUDA).  The rules stand with the model classes, as
``_tp_plan``.  A cut model answers, and trains.  Knows nothing about how processes are started:
``torchrun`` does that.

::

    query | key | value    one fused matrix: each process makes a share of the columns, and all
                           get the whole; attention and its cache are whole in every process
    gate, up / down        a share of the inner width stays in its process from end to end
    experts                as the language weights beside them
    tower, adapter         their MLPs are cut, which are four fifths of the tower's weights
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.utils import logging as progress

from ..errors import CheckpointError, InputError
from . import shards


def processes(tp_plan: str) -> int:
    """How many processes ``torchrun`` started.

    Raises:
        InputError: another plan than ``"auto"``, or there is one process only.
    """
    if tp_plan != "auto":
        raise InputError(f"tp_plan {tp_plan!r} is not known; give 'auto', the model's own plan")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        raise InputError(
            "tp_plan cuts a model over processes, but there is one: start the program with "
            "torchrun --nproc-per-node 2 (or more), or leave tp_plan out"
        )
    return count


def load(build: Any, folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """This process's share of a folder, whose names and shapes have been checked.

    Args:
        build: class of the model.
        folder: released layout, safetensors only.
        config: of the model.
        dtype: of the weights.

    Raises:
        CheckpointError: transformers cannot read the folder.
    """
    with _quiet():
        try:
            model = build.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                generation_config=GenerationConfig(),
                distributed_config=DistributedConfig(tp_plan="auto"),
            )
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0][:200]
            raise CheckpointError(
                f"{folder} cannot be cut over processes ({why}); load it without tp_plan"
            ) from error
    _let_go(model)
    # transformers gives buffers the dtype they were made with; what ours get depends on the file.
    found = shards.survey(shards.weight_files(folder))
    for name, buffer in model.named_buffers():
        stored = torch.bfloat16 if found[name].dtype == "BF16" else buffer.dtype
        buffer.data = buffer.to(shards.target_dtype(name, stored, dtype))
    return model


def _let_go(model: nn.Module) -> None:
    """Copy shares that are views: on the CPU transformers leaves the whole matrix behind them."""
    copies: dict[nn.Parameter, nn.Parameter] = {}  # tied ones are one
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(parameter, DTensor):
                continue
            share = parameter.to_local().detach()
            if share.untyped_storage().nbytes() > share.nbytes:
                if parameter not in copies:
                    own = DTensor.from_local(
                        share.clone(), parameter.device_mesh, parameter.placements,
                        run_check=False, shape=parameter.shape, stride=parameter.stride(),
                    )  # fmt: skip
                    copies[parameter] = nn.Parameter(own, parameter.requires_grad)
                setattr(owner, name, copies[parameter])


@contextmanager
def looking_whole(model: nn.Module) -> Iterator[None]:
    """Inside, the weights of linear layers that are cut have their whole shapes, and no memory.

    What is made beside them, a LoRA, comes out as it would beside a model that is not cut.
    """
    cut = {
        module: module._parameters.pop("weight")
        for module in model.modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor)
    }
    mesh = vars(model).pop("_device_mesh", None)  # by which peft knows
    for module, weight in cut.items():
        share: Any = weight
        empty = share.to_local().new_empty(()).expand(share.shape)
        module._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in cut.items():
            module._parameters["weight"] = weight
        if mesh is not None:
            vars(model)["_device_mesh"] = mesh


def style_of(model: Any, name: str) -> str | None:
    """How a module is cut, in transformers' words; none where it is whole in every process."""
    found: str | None = model.tp_plan.get(re.sub(r"\.\d+\.", ".*.", name))
    return found


def cut_pairs(model: Any) -> None:
    """Cut fresh LoRAs as the layers that they stand beside are, in place.

    Where a layer gives this process a share of its outputs, B does; where it takes a share of its
    inputs, A does.  Beside layers that take and give all, a LoRA is whole in every process.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Linear) or not isinstance(base.weight, DTensor):
            continue
        style = style_of(model, name)
        if style not in ("colwise", "rowwise"):
            continue
        rule = ALL_PARALLEL_STYLES[style]
        for linear in getattr(module, "lora_B" if style == "colwise" else "lora_A").values():
            rule.shard_param(linear, "weight", base.weight.device_mesh)
            rule.install_forward(linear, base.weight.device_mesh)


@contextmanager
def _quiet() -> Iterator[None]:
    """No list of what stays whole, and one progress bar, not one a process."""
    logger, bar = logging.getLogger("transformers"), progress.is_progress_bar_enabled()
    before = logger.level
    logger.setLevel(logging.ERROR)
    if int(os.environ.get("RANK", "0")):
        progress.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if bar:
            progress.enable_progress_bar()
