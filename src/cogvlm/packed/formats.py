"""The forms in which other programs store quantised weights: told apart, checked, made layers.

====================  ====================================================================
stored by             instead of ``X.weight[N, K]``
====================  ====================================================================
bitsandbytes, 4 bit   ``X.weight`` (two weights a byte), ``.absmax``, ``.quant_map``,
                      ``.quant_state.bitsandbytes__nf4`` or ``__fp4`` (JSON in bytes); with
                      double quantisation ``.nested_absmax``, ``.nested_quant_map``
bitsandbytes, 8 bit   ``X.weight`` int8, ``X.SCB`` (127 steps of each row)
GPTQ, AutoRound       ``X.qweight``, ``X.qzeros`` (int32), ``X.scales``, ``X.g_idx``
====================  ====================================================================

Sources: ``QuantState`` and ``Linear8bitLt`` of bitsandbytes; the packing of AutoGPTQ, whose first
version stores zeros less one; AutoRound's list of packings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.shards import Entry
from .layers import BlockLinear, GroupLinear, Nested, PackedLinear, join, split

KEY = "quantization_config"
_READ = "bitsandbytes in 4 and 8 bits, GPTQ and AutoRound in 2, 4 and 8"
_REMEDY = "take the full weights, with --precision int4 or int8 where memory is short"
_BITS = (2, 4, 8)
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class Format:
    """How the matrices of a folder are stored, by its config.json."""

    name: str  # for messages; "nf4" and "fp4" are also what may be asked for
    pattern: re.Pattern[str]  # of the tensors of a matrix: module, part
    required: tuple[str, ...]
    make: Callable[[Format, nn.Linear, dict[str, Tensor], str], PackedLinear]
    keeps_weight: bool = True  # ``X.weight`` is one of its tensors
    shift: int = 0  # what stored zeros lack
    symmetric: bool = False  # zeros are in the middle


def stored(values: Mapping[str, Any], where: str) -> Format | None:
    """The form that a config.json says its weights have; none: they are plain.

    Raises:
        CheckpointError: a form that is not read; with the name of it.
    """
    note = values.get(KEY)
    if note is None:
        return None
    if not isinstance(note, Mapping):
        raise CheckpointError(f"{where}: {KEY} is {note!r}, no table of settings; fetch it again")
    four, eight = (bool(note.get(f"load_in_{bits}bit")) for bits in (4, 8))
    method = str(note.get("quant_method") or ("bitsandbytes" if four or eight else "unnamed"))
    kind = method.lower().removeprefix("intel/").replace("_", "-")
    if kind == "bitsandbytes":
        return _bitsandbytes(note, four, eight, where)
    if kind in ("gptq", "auto-round"):
        return _groups(note, kind, where)
    raise CheckpointError(
        f"{where}: the weights are stored by {method!r}, which is not read ({_READ} are); {_REMEDY}"
    )


def _bitsandbytes(note: Mapping[str, Any], four: bool, eight: bool, where: str) -> Format | None:
    if eight:
        return Format("bitsandbytes int8", _ROWS, ("SCB",), _make_rows)
    if not four:
        return None
    kind = note.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("fp4", "nf4"):
        raise CheckpointError(
            f"{where}: bnb_4bit_quant_type is {kind!r}; fp4 and nf4 are read: {_REMEDY}"
        )
    return Format(str(kind), _BLOCKS, ("absmax", "quant_map", "quant_state"), _make_blocks)


# Stored zeros lack one in the first; ``auto_round:gptq:...`` is how early AutoRound wrote it.
_LESS_ONE = re.compile(r"gptq|auto_round:(auto_)?gptq(:.*)?")
_AS_THEY_ARE = re.compile(r"gptq_v2|auto_round(:gptqmodel|:exllamav2|:tritonv?2?)?")


def _groups(note: Mapping[str, Any], kind: str, where: str) -> Format:
    if kind == "gptq":
        packing = note.get("checkpoint_format") or note.get("format") or "gptq"
    else:
        packing = note.get("packing_format") or note.get("backend") or "auto_round"
    packing = str(packing).replace("autoround", "auto_round").replace("auto-round", "auto_round")
    less_one = _LESS_ONE.fullmatch(packing)
    if not less_one and not _AS_THEY_ARE.fullmatch(packing):
        raise CheckpointError(
            f"{where}: the weights are stored by {kind} as {packing!r}, which is not read "
            f"({_READ}, in the packing of GPTQ, are); {_REMEDY}"
        )
    if note.get("data_type", "int") != "int" or (note.get("act_bits") or 16) < 16:
        raise CheckpointError(
            f"{where}: {kind} with data_type {note.get('data_type')!r} and act_bits "
            f"{note.get('act_bits')!r}; whole numbers for weights alone are read: {_REMEDY}"
        )
    if note.get("bits") not in _BITS:
        raise CheckpointError(
            f"{where}: {kind} with bits {note.get('bits')!r}; 2, 4 and 8 are read: {_REMEDY}"
        )
    return Format(
        kind,
        _GROUPS,
        ("qweight", "qzeros", "scales"),
        _make_groups,
        keeps_weight=False,
        shift=1 if less_one else 0,
        symmetric=bool(note.get("sym", False)),
    )


def refuse_gguf(folder: Path) -> None:
    """Raise :class:`CheckpointError` if ``folder`` holds a model for llama.cpp."""
    if found := sorted(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{found[0]}: GGUF files are for llama.cpp and are not read here; {_REMEDY}"
        )


# --- names and shapes ---

_BLOCKS = re.compile(
    r"(.+)\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state)(?:\.\w+)?"
)
_ROWS = re.compile(r"(.+)\.(SCB|weight_format)")
_GROUPS = re.compile(r"(.+)\.(qweight|qzeros|scales|g_idx)")

Sets = dict[str, dict[str, str]]
"""Modules to the tensors of their matrix: part to name."""


def sets(names: Iterable[str], model: nn.Module, form: Format) -> Sets:
    """Which tensors belong together; only for linear layers of ``model``."""
    modules = dict(model.named_modules())
    found: Sets = {}
    for name in names:
        match = form.pattern.fullmatch(name)
        if match and isinstance(modules.get(match[1]), nn.Linear):
            found.setdefault(match[1], {})[match[2]] = name
    if form.keeps_weight:
        for module, parts in found.items():
            parts["weight"] = f"{module}.weight"
    return found


def whole(
    found: Mapping[str, Entry], model: nn.Module, form: Format, where: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's tensors, complete sets as the matrix they stand for.

    Raises:
        CheckpointError: a tensor of a set is missing or of another shape; or there is no set.
    """
    groups = sets(found, model, form)
    if not groups:
        raise CheckpointError(
            f"{where}: {KEY} in config.json says {form.name}, but no tensor is stored so; delete "
            "it from config.json to load the weights as they are"
        )
    inside = {name for parts in groups.values() for name in parts.values()}
    shapes = {name: entry.shape for name, entry in found.items() if name not in inside}
    for module, parts in groups.items():
        needed = [*form.required, *(["weight"] if form.keeps_weight else [])]
        if "nested_absmax" in parts or "nested_quant_map" in parts:
            needed += ["nested_absmax", "nested_quant_map"]
        missing = [part for part in needed if parts.get(part) not in found]
        if missing:
            raise CheckpointError(
                f"{where}: {module} is stored as {form.name} without {', '.join(missing)}; fetch "
                "the folder again"
            )
        layer: Any = model.get_submodule(module)
        rows, columns = layer.out_features, layer.in_features
        entries = {part: found[name] for part, name in parts.items()}
        _check(entries, rows, columns, form, f"{where}: {module}")
        shapes[f"{module}.weight"] = (rows, columns)
    return shapes


def _check(parts: Mapping[str, Entry], rows: int, columns: int, form: Format, where: str) -> None:
    if form.pattern is _BLOCKS:
        entry = parts["weight"]
        # Two weights a byte, however many bytes make an item (bnb_4bit_quant_storage).
        size = _numel(entry.shape) * _SIZES.get(entry.dtype, 0)
        if size != -(-rows * columns // 2):
            raise _wrong(where, "weight", entry, (-(-rows * columns // 2), 1))
        _expect(where, parts, "quant_map", (16,))
    elif form.pattern is _ROWS:
        _expect(where, parts, "weight", (rows, columns))
        _expect(where, parts, "SCB", (rows,))
    else:
        _check_groups(parts, rows, columns, where)


def _check_groups(parts: Mapping[str, Entry], rows: int, columns: int, where: str) -> None:
    words = parts["qweight"].shape[0]
    bits = 32 * words // columns
    groups = parts["scales"].shape[0]
    if bits not in _BITS or 32 * words != columns * bits:
        raise _wrong(where, "qweight", parts["qweight"], (columns * 4 // 32, rows))
    if not groups or columns % groups:
        raise CheckpointError(
            f"{where}: {groups} groups of {columns} columns are not of equal size; {_REMEDY}"
        )
    _expect(where, parts, "qweight", (words, rows))
    _expect(where, parts, "scales", (groups, rows))
    _expect(where, parts, "qzeros", (groups, -(-rows * bits // 32)))
    if "g_idx" in parts:
        _expect(where, parts, "g_idx", (columns,))


def _expect(where: str, parts: Mapping[str, Entry], part: str, shape: tuple[int, ...]) -> None:
    if tuple(parts[part].shape) != shape:
        raise _wrong(where, part, parts[part], shape)


def _wrong(where: str, part: str, entry: Entry, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{where}: {part} is {entry.dtype} {tuple(entry.shape)} in the file, {shape} by "
        "config.json; check that config.json and the weights belong to the same model"
    )


def _numel(shape: Iterable[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


# --- numbers ---


def _make_blocks(
    form: Format, plain: nn.Linear, parts: dict[str, Tensor], where: str
) -> PackedLinear:
    state = read_state(parts["quant_state"], where)
    shape, block = state.get("shape"), state.get("blocksize")
    wanted = [plain.out_features, plain.in_features]
    if shape != wanted or type(block) is not int or block < 2 or block % 2:
        raise CheckpointError(
            f"{where}: its quant_state has shape {shape} and blocksize {block!r}, config.json "
            f"wants shape {wanted}; check that both belong to the same model"
        )
    blocks = -(-plain.out_features * plain.in_features // block)
    nested = None
    if "nested_absmax" in parts:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(size) is not int or size < 1 or not isinstance(offset, int | float):
            raise CheckpointError(
                f"{where}: its quant_state has nested_blocksize {size!r} and nested_offset "
                f"{offset!r}; fetch the folder again"
            )
        _count(where, "nested_absmax", parts["nested_absmax"], -(-blocks // size))
        _count(where, "nested_quant_map", parts["nested_quant_map"], 256)
        table, scales = parts["nested_quant_map"].float(), parts["nested_absmax"].float()
        nested = Nested(table, scales, size, float(offset))
    _count(where, "absmax", parts["absmax"], blocks)
    scales = parts["absmax"].flatten()
    if nested is not None and scales.dtype != torch.uint8:
        raise CheckpointError(
            f"{where}: absmax is {scales.dtype}, not the codes that "
            "nested_absmax needs; fetch the folder again"
        )
    return BlockLinear(
        plain,
        parts["weight"].contiguous().view(torch.uint8).flatten(),
        scales if nested else scales.float(),
        parts["quant_map"].float(),
        block,
        nested,
    )


def read_state(blob: Tensor, where: str) -> dict[str, Any]:
    """What bitsandbytes writes as JSON in a tensor of bytes.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state = json.loads(bytes(blob.flatten().tolist()))
    except ValueError as error:
        raise CheckpointError(f"{where}: its quant_state is damaged; fetch it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: its quant_state is no table; fetch it again")
    return state


def _count(where: str, part: str, tensor: Tensor, wanted: int) -> None:
    if tensor.numel() != wanted:
        raise CheckpointError(
            f"{where}: {part} has {tensor.numel()} numbers where its shape and blocksize need "
            f"{wanted}; fetch the folder again"
        )


def _make_rows(
    form: Format, plain: nn.Linear, parts: dict[str, Tensor], where: str
) -> PackedLinear:
    order = parts.get("weight_format")
    if parts["weight"].dtype != torch.int8 or (order is not None and int(order) != 0):
        raise CheckpointError(
            f"{where}: weight is {parts['weight'].dtype} in weight_format "
            f"{order if order is None else int(order)}; int8 in rows (0) is read: {_REMEDY}"
        )
    codes = (parts["weight"].short() + 128).to(torch.uint8)
    scales = parts["SCB"].float()[:, None] / 127
    zeros = torch.full_like(scales, 128, dtype=torch.uint8)
    return GroupLinear(plain, codes, scales, zeros, 8)


def _make_groups(
    form: Format, plain: nn.Linear, parts: dict[str, Tensor], where: str
) -> PackedLinear:
    words = parts["qweight"]
    if words.dtype != torch.int32 or parts["qzeros"].dtype != torch.int32:
        raise CheckpointError(
            f"{where}: qweight is {words.dtype} and qzeros {parts['qzeros'].dtype}; both as int32 "
            f"are read: {_REMEDY}"
        )
    rows, columns, groups = plain.out_features, plain.in_features, len(parts["scales"])
    bits = 32 * len(words) // columns
    # Bytes of a word hold its lowest bits first, as does a byte.
    numbers = _numbers(words.t(), bits)  # [N, K]
    zeros = _numbers(parts["qzeros"], bits)[:, :rows]  # [G, N]
    middle = 2 ** (bits - 1)
    # Symmetric zeros say themselves whether one was taken away.
    if not (form.symmetric and bool((zeros == middle).all())):
        zeros = (zeros + form.shift) & (2**bits - 1)
    order = None
    index = parts.get("g_idx")
    if index is not None and not torch.equal(
        index.int(), _in_order(columns, groups).to(index.device)
    ):
        order = index.argsort(stable=True)
        if not torch.equal(index[order].int(), _in_order(columns, groups).to(index.device)):
            raise CheckpointError(f"{where}: g_idx has groups of unequal size; {_REMEDY}")
        numbers = numbers[:, order]
    codes = join(numbers, bits)
    scales = parts["scales"].t().contiguous()
    return GroupLinear(plain, codes, scales, zeros.t().contiguous(), bits, order)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """``int32[A, B]`` -> ``uint8[A, B * 32 / bits]``."""
    return split(words.contiguous().view(torch.uint8), bits).flatten(1)


def _in_order(columns: int, groups: int) -> Tensor:
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)
