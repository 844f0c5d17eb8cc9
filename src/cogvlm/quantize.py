"""Weights in eight or four bits: chosen, computed, written to a folder and read back.

Only weights are rounded, activations are not.  What stays as it is: embeddings, the head, norms,
biases, markers, position tables, convolutions, and the two factors of low-rank experts.

========  ==========================================  ==========================
asked     decoder (language layers, experts, cross)   tower and adapter
========  ==========================================  ==========================
int8      int8, one scale a row                       int8, one scale a row
int4      int4, a scale and a zero for 128 weights    int8, one scale a row
int4-all  int4, a scale and a zero for 128 weights    the same
nf4       NF4 of bitsandbytes, a scale for 64         int8, one scale a row
========  ==========================================  ==========================

int4 takes groups of 32 where a row is no multiple of 128, and int8 where it is no multiple of 32
either, or where the matrix has no multiple of 16 rows (the CPU kernel's unit).

A quantised folder is a released one in which ``weight`` of a matrix ``[N, K]`` is replaced by::

    weight_int8   int8[N, K]        weight_scale  float32[N, 1]       w = q * scale
    weight_int4   uint8[N, K / 2]   weight_scale  bfloat16[N, K / g]  w = (q - 8) * scale + zero
                                    weight_zero   bfloat16[N, K / g]  (even columns: low four bits)

and whose config.json says so under :data:`KEY`.  It depends on no device; the layers that compute
with it, and their packing, which differs between devices, are made while loading
(:mod:`cogvlm.linear`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import linear
from .errors import CheckpointError, InputError, ResourceError
from .models import shards
from .models.checkpoint import report
from .packed import kernels
from .tensors import save_tensors

PRECISIONS = ("int8", "int4", "int4-all")
ON_LOADING = (*PRECISIONS, "nf4")  # nf4 is not written: bitsandbytes has files of its own
KEY = "cogvlm_quantization"
LAYOUT = 1

Plan = dict[str, int]
"""Names of the weights that are quantised, to the size of their groups; 0: int8, -1: NF4."""

_INT8 = 0
_NF4 = -1
_GROUPS = (128, 32)
_ROWS = 16  # the CPU kernel of int4 takes so many rows at once
_BLOCK = 1 << 23  # weights that are rounded at once: some 100 MB of float32 beside them
_VISION = re.compile(r"(^|\.)(cross_)?vision\.")  # towers and adapter, not the experts
_PIECE = re.compile(r"(.+\.weight)_(int8|int4|scale|zero)")
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*LICENSE*", "*NOTICE*")
_FILE_SIZE = 4_000_000_000  # bytes of one file of weights that is written
_TINY = 1e-8


def plan(model: nn.Module, precision: str) -> Plan:
    """Which weights of ``model`` (it may be on the meta device) are quantised, and how."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {}
    for name, module in model.named_modules():
        # The exact type: others are factors of low rank, or read by what does not call them.
        if type(module) is nn.Linear and module is not head and ".lora_" not in name:
            found[f"{name}.weight"] = _group(name, module, precision)
    return found


def _group(name: str, module: nn.Linear, precision: str) -> int:
    eight = precision == "int8" or (precision != "int4-all" and _VISION.search(name))
    if eight or module.out_features % _ROWS:
        return _INT8
    if precision == "nf4":
        return _NF4
    return next((size for size in _GROUPS if module.in_features % size == 0), _INT8)


def stored_as(group: int, rows: int, columns: int) -> tuple[str, int]:
    """The number format of a matrix of a plan, and its bytes, scales included."""
    if group == _INT8:
        return "int8", rows * (columns + 4)
    if group == _NF4:
        return "nf4", rows * columns // 2 + 4 * rows * columns // 64
    return "int4", rows * columns // 2 + 4 * rows * columns // group


# --- numbers ---


def pieces(weight: Tensor, group: int) -> dict[str, Tensor]:
    """The tensors that stand for a matrix ``float[N, K]``, see the module."""
    rows = max(1, _BLOCK // weight.shape[1])
    blocks = [_rounded(some.float(), group) for some in weight.split(rows)]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _rounded(weight: Tensor, group: int) -> dict[str, Tensor]:
    if group == _INT8:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / 127
        return {"int8": (weight / scale).round().to(torch.int8), "scale": scale}
    parts = weight.unflatten(1, (-1, group))  # [N, K / g, g]
    low, high = parts.amin(dim=-1), parts.amax(dim=-1)
    scale = ((high - low).clamp(min=_TINY) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    # From the rounded scale and zero, so that their rounding is not added to that of the weights.
    steps = (parts - zero.float()[..., None]) / scale.float()[..., None]
    codes = (steps + 8).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return {"int4": codes[:, ::2] | codes[:, 1::2] << 4, "scale": scale, "zero": zero}


def _shapes(rows: int, columns: int, group: int) -> dict[str, tuple[int, ...]]:
    if group == _INT8:
        return {"int8": (rows, columns), "scale": (rows, 1)}
    groups = (rows, columns // group)
    return {"int4": (rows, columns // 2), "scale": groups, "zero": groups}


# --- into a model ---


def quantise(model: nn.Module, precision: str) -> None:
    """Quantise a filled model where it is, matrix after matrix."""
    types = linear.backend()
    for name, group in plan(model, precision).items():
        weight = model.get_parameter(name).detach()
        install(model, name, weight, group, weight.dtype, types)


def fill(
    model: nn.Module,
    files: Iterable[Path],
    groups: Plan,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give ``model``, on the meta device, the tensors of ``files``, those of ``groups`` quantised.

    Files hold matrices or the pieces of them.  Besides what is filled so far, memory holds the
    matrix at hand, in float32 and in codes.

    Args:
        model: built on the meta device.
        files: their names and shapes have been checked, see :func:`whole`.
        groups: as :func:`plan` gives them.
        dtype: of what is not quantised, and of activations.
        device: of everything.

    Raises:
        CheckpointError: a file is damaged.
        ResourceError: not enough memory, or no torchao.
    """
    files = list(files)
    types = linear.backend()
    shards.fill(model, files, dtype, lambda n: "disk" if _weight(n) in groups else device)
    waiting: dict[str, dict[str, Tensor]] = {}
    for path in files:
        for name, tensor in shards.read(path):
            weight = _weight(name)
            if weight not in groups:
                continue
            with shards.room(device, path, "take a larger device"):
                there = tensor.to(device=device, copy=True)
                if name == weight:
                    install(model, weight, there, groups[weight], dtype, types)
                    continue
                parts = waiting.setdefault(weight, {})
                parts[name.rpartition("_")[2]] = there
                if len(parts) == len(_shapes(1, 1, groups[weight])):
                    _install(model, weight, waiting.pop(weight), dtype, types)


def _weight(name: str) -> str:
    """The weight that a tensor of a file is, or is a piece of."""
    found = _PIECE.fullmatch(name)
    return found[1] if found else name


def install(
    model: nn.Module,
    name: str,
    weight: Tensor,
    group: int,
    dtype: torch.dtype,
    types: linear.Types,
) -> None:
    """Quantise one matrix and put it into ``model``.

    Args:
        model: its other tensors are not looked at.
        name: of the weight, one that :func:`plan` gives.
        weight: ``float[N, K]``, on its device.
        group: as :func:`plan` gives it.
        dtype: of the activations.
        types: what :func:`cogvlm.linear.backend` gives.
    """
    if group != _NF4:
        _install(model, name, pieces(weight, group), dtype, types)
        return
    place = name.removesuffix(".weight")
    plain: Any = model.get_submodule(place)
    _put(model, place, kernels.quantised(plain, weight.to(dtype)))


def _install(
    model: nn.Module,
    name: str,
    parts: Mapping[str, Tensor],
    dtype: torch.dtype,
    types: linear.Types,
) -> None:
    place = name.removesuffix(".weight")
    plain = model.get_submodule(place)
    assert isinstance(plain, nn.Linear)
    _put(model, place, linear.quantised(plain, parts, dtype, types))


def _put(model: nn.Module, place: str, module: nn.Module) -> None:
    parent, _, own = place.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


# --- folders ---


def stored(values: Mapping[str, Any], where: str) -> str | None:
    """The precision that a config.json says its weights are stored in; none: they are plain.

    Raises:
        CheckpointError: a layout that this version does not know.
    """
    note = values.get(KEY)
    if note is None:
        return None
    if not isinstance(note, Mapping) or note.get("layout") != LAYOUT:
        raise CheckpointError(
            f"{where}: {KEY} is {note!r}, this version reads layout {LAYOUT}; install the version "
            "of cogvlm that wrote it, or quantise again"
        )
    precision = note.get("precision")
    if precision not in PRECISIONS:
        raise CheckpointError(
            f"{where}: {KEY} has precision {precision!r}, which is not one of "
            f"{', '.join(PRECISIONS)}; quantise again"
        )
    return str(precision)


def choose(asked: object, kept: str | None, where: str) -> str | None:
    """The precision to load in, from what is asked for and what is stored; none: not quantised.

    Raises:
        InputError: the folder is stored in the other one.
    """
    wanted = asked if isinstance(asked, str) and asked in ON_LOADING else None
    if wanted and kept and wanted != kept:
        raise InputError(
            f"{where} is stored in {kept}, it cannot be loaded in {wanted}; leave the precision "
            "out, or take the folder it was made from"
        )
    return wanted or kept


def refuse(precision: str, device: torch.device) -> None:
    """Raise :class:`ResourceError` if ``device`` has no kernel, or torchao is not installed."""
    if precision in ("int4", "int4-all") and device.type not in ("cpu", "cuda"):
        raise ResourceError(
            f"precision {precision} runs on cpu and cuda, not on {device.type}; take int8, or "
            "device cpu"
        )
    if precision == "nf4":
        kernels.refuse(device)
    linear.backend()


def whole(
    found: Mapping[str, tuple[int, ...]], model: nn.Module, groups: Plan, where: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's tensors, complete sets of pieces as the matrix they stand for.

    Raises:
        CheckpointError: a piece is missing, or of another shape.
    """
    shapes = {name: shape for name, shape in found.items() if _weight(name) not in groups}
    for name, group in groups.items():
        rows, columns = model.get_parameter(name).shape
        if name in found:
            shapes[name] = found[name]
        there = {n: found[n] for n in _names(name) if n in found}
        if not there:
            continue
        needed = {f"{name}_{part}": s for part, s in _shapes(rows, columns, group).items()}
        report(there.keys() - needed.keys(), needed.keys() - there.keys(), where)
        for piece, shape in needed.items():
            if tuple(there[piece]) != shape:
                raise CheckpointError(
                    f"{where}: {piece} is {tuple(there[piece])} in the file, {shape} by "
                    "config.json; quantise the model again"
                )
        shapes[name] = (rows, columns)
    return shapes


def _names(weight: str) -> list[str]:
    return [f"{weight}_{part}" for part in ("int8", "int4", "scale", "zero")]


def write(
    source: Path, model: nn.Module, values: Mapping[str, Any], out: Path, precision: str
) -> Path:
    """Write a released folder again, quantised; ``out`` appears in one step, when it is whole.

    Memory holds one file of it (4 GB) and the matrix at hand.

    Args:
        source: folder in the released layout.
        model: of its configuration, on the meta device.
        values: of its config.json.
        out: must not exist; its parent must.
        precision: one of :data:`PRECISIONS`.

    Raises:
        InputError: ``out`` exists, has no parent, or ``source`` is quantised already.
        CheckpointError: files or tensors of ``source`` are missing, damaged or left over.
        ResourceError: it cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists, and nothing is overwritten; name a new folder")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: {out.absolute().parent} is no folder; make it first")
    if kept := stored(values, f"{source}/config.json"):
        raise InputError(f"{source} is stored in {kept} already; give the folder it was made from")
    files = shards.weight_files(source)
    found = {name: entry.shape for name, entry in shards.survey(files).items()}
    shards.check(model, found, str(source))
    box = out.absolute().with_name(f".{out.name}.part")
    try:
        shutil.rmtree(box, ignore_errors=True)  # of a run that was killed
        box.mkdir()
        for path in _beside(source):
            shutil.copyfile(path, box / path.name)
        note = {**values, KEY: {"layout": LAYOUT, "precision": precision}}
        text = json.dumps(note, indent=2, ensure_ascii=False)
        (box / "config.json").write_text(text + "\n", encoding="utf-8")
        _write_weights(_quantised(files, plan(model, precision)), box)
        box.rename(out)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{out} cannot be written ({' '.join(str(error).split())}); choose another place"
        ) from error
    finally:
        shutil.rmtree(box, ignore_errors=True)
    return out


def _beside(source: Path) -> list[Path]:
    """What is copied: tokenizer, processor and licence files, nothing that holds weights."""
    found = {path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}
    kept = (p for p in found if p.name != "config.json" and not p.name.endswith(".index.json"))
    return sorted(kept)


def _quantised(files: Iterable[Path], groups: Plan) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        for name, tensor in shards.read(path):
            if name not in groups:
                yield name, tensor.clone()
                continue
            for part, piece in pieces(tensor, groups[name]).items():
                yield f"{name}_{part}", piece.contiguous()


def _write_weights(tensors: Iterable[tuple[str, Tensor]], box: Path) -> None:
    files: list[list[str]] = []
    ready: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_tensors(ready, box / f"part-{len(files)}")
        files.append(list(ready))
        ready.clear()

    for name, tensor in tensors:
        if ready and size + tensor.nbytes > _FILE_SIZE:
            flush()
            size = 0
        ready[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(files) == 1:
        (box / "part-0").rename(box / "model.safetensors")
        return
    where: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (box / f"part-{i}").rename(box / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (box / shards.INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
