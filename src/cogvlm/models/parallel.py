"""A model cut over several processes: tensor parallelism by transformers' own plan and loader.

Each process holds its share of every large matrix; all run the same forward in step and exchange
what the shares give (gloo on the CPU, NCCL on CUDA).  The rules stand with the model classes, as
``_tp_plan``.  Knows nothing about how processes are started: ``torchrun`` does that.

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.distributed.configuration_utils import DistributedConfig
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
    # transformers gives buffers the dtype they were made with; what ours get depends on the file.
    found = shards.survey(shards.weight_files(folder))
    for name, buffer in model.named_buffers():
        stored = torch.bfloat16 if found[name].dtype == "BF16" else buffer.dtype
        buffer.data = buffer.to(shards.target_dtype(name, stored, dtype))
    return model


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
