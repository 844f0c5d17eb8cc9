"""Folders that other programs quantised, read as they are.

config.json alone says how (:func:`stored`); the numbers are kept as stored and restored when they
are used (:mod:`.layers`), so that nothing is rounded twice.  On CUDA, kernels of bitsandbytes take
their place where it is installed (:mod:`.kernels`).  Knows nothing about architectures.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import shards
from . import kernels
from .formats import KEY, Format, refuse_gguf, sets, stored, whole

__all__ = ["KEY", "Format", "fill", "kernels", "refuse_gguf", "stored", "whole"]


def fill(
    model: nn.Module,
    files: Iterable[Path],
    form: Format,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give ``model``, on the meta device, the tensors of ``files``; linear layers are replaced.

    Besides what is filled so far, memory holds one file and the matrix at hand.

    Args:
        model: built on the meta device.
        files: their names and shapes have been checked, see :func:`whole`.
        form: as :func:`stored` gives it.
        dtype: of what is not quantised, and of activations.
        device: of everything.

    Raises:
        CheckpointError: a file is damaged, or numbers do not fit each other.
        ResourceError: not enough memory.
    """
    files = list(files)
    groups = sets(shards.survey(files, packed=True), model, form)
    inside = {
        name: (module, part) for module, parts in groups.items() for part, name in parts.items()
    }
    shards.fill(model, files, dtype, lambda name: "disk" if name in inside else device)
    waiting: dict[str, dict[str, Tensor]] = {}
    for path in files:
        for name, tensor in shards.read(path):
            if name not in inside:
                continue
            module, part = inside[name]
            parts = waiting.setdefault(module, {})
            with shards.room(device, path, "take a larger device"):
                parts[part] = tensor.to(device=device, copy=True)
                if len(parts) == len(groups[module]):
                    _install(model, module, waiting.pop(module), form, path)


def _install(
    model: nn.Module, module: str, parts: dict[str, Tensor], form: Format, path: Path
) -> None:
    plain = model.get_submodule(module)
    assert isinstance(plain, nn.Linear)
    made: nn.Module = form.make(form, plain, parts, f"{path}: {module}")
    if form.name in kernels.KINDS and kernels.usable(parts["weight"].device):
        made = kernels.from_stored(plain, parts)
    parent, _, own = module.rpartition(".")
    setattr(model.get_submodule(parent), own, made)
