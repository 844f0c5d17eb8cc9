"""A model over several devices: ``device_map`` to a device for each tensor, hooks by accelerate.

A tower layer and a decoder layer are never cut; anything else may lie anywhere.  What is placed
on the CPU beside an accelerator, or on ``"disk"``, is moved in for its own forward only; on disk
means in the safetensors files themselves, nothing is written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, InputError, ResourceError, refuse_unknown
from .shards import Entry, Place, target_dtype

DeviceMap = str | Mapping[str, str | int | torch.device]
"""``"auto"``, or module names to devices: ``{"": 0, "model.layers.0": "disk"}``."""

Plan = dict[str, str | int | torch.device]

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
# Modules that use the weights of a part without calling it, and are not cut either.
_WHOLE = ("PatchEmbedding", "QFormer", "CrossAttention", "CrossVisionModel")
# The markers are joined to what the adapter gives, so they lie where it does.
_FOLLOWS = {"boi": "linear_proj", "eoi": "linear_proj"}


def _accelerate() -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise ResourceError(
            "device_map needs accelerate: pip install accelerate, or name one device instead"
        ) from error
    return accelerate


def plan(model: nn.Module, device_map: DeviceMap, dtype: torch.dtype) -> Plan:
    """Module names to devices, every tensor of ``model`` (on the meta device) in one entry.

    Raises:
        ConfigError: a name of ``device_map`` is no module of the model, or inside one that is not
            cut.
        InputError: an unknown word, or a part of the model is in no entry.
        ResourceError: accelerate is not installed.
    """
    accelerate = _accelerate()
    if isinstance(device_map, str):
        if device_map not in _AUTOMATIC:
            raise InputError(
                f"device_map {device_map!r} is not one of {', '.join(_AUTOMATIC)}; give one of "
                "them, or a table of module names and devices"
            )
        whole = {"no_split_module_classes": _uncut(model)}
        room = None
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            room = accelerate.utils.get_balanced_memory(model, dtype=dtype, low_zero=low, **whole)
        made = dict(accelerate.infer_auto_device_map(model, room, dtype=dtype, **whole))
        return _expand(model, made, "")
    known = {name for name, _ in model.named_modules()} | set(model.state_dict())
    refuse_unknown(device_map, known, "device_map")
    place = by_name(device_map)
    left = [name for name in model.state_dict() if place(name) is None]
    if left:
        raise InputError(
            f"device_map says nothing about {len(left)} tensors, the first is {left[0]}; add its "
            "module, or '' for all that is not named"
        )
    return _expand(model, dict(device_map), "")


def _uncut(model: nn.Module) -> list[str]:
    return [*(getattr(model, "_no_split_modules", None) or ()), *_WHOLE]


def _expand(model: nn.Module, table: Plan, prefix: str) -> Plan:
    """Entries under ``prefix``, none inside another: accelerate's hooks do not take those."""
    module, find = model.get_submodule(prefix), by_name(table)
    start = f"{prefix}." if prefix else ""
    inside = [key for key in table if key != prefix and key.startswith(start)]
    if all(table[key] == find(prefix) for key in inside):
        return {prefix: find(prefix)}
    if type(module).__name__ in _uncut(model):
        raise ConfigError(
            f"device_map cuts {prefix} ({type(module).__name__}) at {inside[0]!r}; it lies on one "
            f"device as a whole: name {prefix!r} instead"
        )
    found: Plan = {}
    for name, _ in module.named_children():
        found |= _expand(model, table, start + name)
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, _ in own:
        device = find(start + _FOLLOWS.get(name, name))
        found[start + name] = str(main_device(table)) if device == "disk" else device
    return found


def by_name(table: Mapping[str, str | int | torch.device]) -> Any:
    """A function from a tensor's name to the device of the longest entry that holds it, or none."""

    def place(name: str) -> str | int | torch.device | None:
        while name not in table:
            if not name:
                return None
            name = name.rpartition(".")[0]
        return table[name]

    return place


def main_device(table: Plan) -> torch.device:
    """Where the inputs go: the first accelerator of a plan, else the CPU."""
    for device in table.values():
        if str(device) not in ("cpu", "disk"):
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cpu")


def placing(model: nn.Module, table: Plan) -> Place:
    """The device of each tensor by name; buffers are never left on disk."""
    find, main = by_name(table), main_device(table)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def place(name: str) -> str | int | torch.device:
        device: str | int | torch.device = find(name)
        return main if device == "disk" and name in buffers else device

    return place


def dispatch(model: nn.Module, table: Plan, found: Mapping[str, Entry], dtype: torch.dtype) -> None:
    """Attach the hooks that bring inputs and weights together.

    Raises:
        InputError: something is placed on disk whose file is a pickle.
    """
    place = placing(model, table)
    on_disk = {name: entry for name, entry in found.items() if place(name) == "disk"}
    index = {name: _offloaded(name, entry, dtype) for name, entry in on_disk.items()}
    if len(set(map(str, table.values()))) == 1 and not index:
        return
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns that what was placed elsewhere is elsewhere
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys", UserWarning)
            _accelerate().dispatch_model(
                model,
                table,
                main_device=str(main_device(table)),
                offload_index=index or None,
                skip_keys=getattr(model, "_skip_keys_device_placement", None),
                preload_module_classes=list(_WHOLE),
            )
    finally:
        logger.setLevel(before)


def _offloaded(name: str, entry: Entry, dtype: torch.dtype) -> dict[str, str]:
    if entry.file.suffix != ".safetensors":
        raise InputError(
            f"device_map puts {name} on disk, but {entry.file.name} is a pickle, which is read "
            "only as a whole; take a copy with *.safetensors, or put it on the cpu"
        )
    wanted = target_dtype(name, torch.float32, dtype)
    return {
        "safetensors_file": str(entry.file),
        "weight_name": name,
        "dtype": str(wanted).removeprefix("torch."),
    }
