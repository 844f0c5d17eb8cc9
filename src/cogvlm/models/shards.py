"""Weights of a folder: found, checked before any of them is read, then read file after file.

Knows nothing about architectures: a model is its ``state_dict`` of names and shapes, on the meta
device until it is filled.  Every complaint that the headers allow (a missing or truncated file, a
tensor missing, left over or of another shape) comes before the first weight is read.

The reader of ``transformers`` 5 was measured first.  It keeps all files mapped until the last
tensor is cast (387 MB of bfloat16 to float32: 1142 MB more, here 788), or makes the weights views
of the files; and it turns stored bfloat16 frequencies into float32, which is another model.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, ResourceError
from .checkpoint import report

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")
_POINTER = b"version https://git-lfs"
_QUANTISED = re.compile(r"\.(absmax|quant_map|quant_state\.\w+|SCB|qweight|qzeros)$")
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format


@dataclass(frozen=True)
class Entry:
    """A tensor as a file's header describes it."""

    file: Path
    dtype: str  # in the words of safetensors: BF16, F32, ...
    shape: tuple[int, ...]


Place = Callable[[str], str | int | torch.device]
"""The device of a tensor by its name; ``"disk"`` leaves it in its file."""


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The files of a folder that hold its weights, in order; pickles only if there is nothing else.

    Raises:
        CheckpointError: there are none, one is missing, which to take is not clear, or they are
            pickles and ``allow_pickle`` is false.
    """
    index = folder / INDEX
    if index.is_file():
        return _present(folder, _indexed(index), index.name)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return _present(folder, _complete([p.name for p in found], folder), "its own numbering")
    pickles = sorted(p for p in folder.iterdir() if _is_weights_pickle(p))
    if not pickles:
        raise CheckpointError(
            f"{folder} has no *.safetensors; give a folder with the weights{_interrupted(folder)}"
        )
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} has pickled weights only ({pickles[0].name}), and a pickle can run code: "
            "take a copy with *.safetensors, or, if you trust its origin, allow it with "
            "--allow-pickle (allow_pickle=True), which reads tensors only"
        )
    return _present(folder, _complete([p.name for p in pickles], folder), "its own numbering")


def _is_weights_pickle(path: Path) -> bool:
    other = ("training_args", "optimizer", "scheduler", "rng_state")
    return path.suffix in PICKLES and not path.name.startswith(other)


def _indexed(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(name) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{index}: damaged or no index of weights ({type(error).__name__}); fetch it again"
        ) from error
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is no *.safetensors beside it")
    return files


def _complete(names: list[str], folder: Path) -> list[str]:
    """All names of a numbered set of which some are there, or the only name."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    sets = {(m[1], m[3], m[4]) for m in matches if m}
    if len(names) == 1 and not sets:
        return names
    if len(sets) != 1 or not all(matches):
        raise CheckpointError(
            f"{folder}: which of {', '.join(names[:4])} are the weights is not clear; keep "
            f"model.safetensors or {INDEX} with its files alone"
        )
    stem, total, suffix = next(iter(sets))
    width = len(total)
    return [f"{stem}-{i + 1:0{width}}-of-{total}.{suffix}" for i in range(int(total))]


def _present(folder: Path, names: list[str], by: str) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} files of weights named by {by} are missing: "
            f"{', '.join(missing[:4])}{more}; fetch them again{_interrupted(folder)}"
        )
    return [folder / name for name in names]


def _interrupted(folder: Path) -> str:
    """What to add to a complaint if a download of this folder was broken off."""
    places = [folder / ".cache" / "huggingface"]
    if folder.parent.name == "snapshots":
        places.append(folder.parents[1] / "blobs")
    parts = [p for place in places if place.is_dir() for p in place.rglob("*.incomplete")]
    if not parts:
        return ""
    return (
        f" (a download was interrupted: {len(parts)} *.incomplete in {parts[0].parent}; run it "
        "again with a network, it goes on where it stopped)"
    )


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of a safetensors file, and whether its size is what they need.

    Raises:
        CheckpointError: truncated, a Git-LFS pointer, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _refuse_pointer(path, start + file.read(200), size)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
        if length > _LONGEST_HEADER:
            raise CheckpointError(
                f"{path}: no safetensors file or a damaged one ({size} bytes); fetch it again"
            )
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(
            f"{path}: truncated, {size} bytes found where its header alone needs {8 + length}; "
            "fetch it again"
        )
    try:
        entries, end = _parse(path, json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its header is damaged ({type(error).__name__}); fetch it again"
        ) from error
    if size != 8 + length + end:
        word = "truncated" if size < 8 + length + end else "damaged"
        raise CheckpointError(
            f"{path}: {word}, {size} bytes found, {8 + length + end} expected from its header; "
            "fetch it again"
        )
    return entries


def _parse(path: Path, values: dict[str, Any]) -> tuple[dict[str, Entry], int]:
    values.pop("__metadata__", None)
    entries = {n: Entry(path, str(v["dtype"]), tuple(v["shape"])) for n, v in values.items()}
    return entries, max((int(v["data_offsets"][1]) for v in values.values()), default=0)


def _refuse_pointer(path: Path, start: bytes, size: int) -> None:
    if start.startswith(_POINTER):
        wanted = re.search(rb"size (\d+)", start)
        real = f" of {int(wanted[1])} bytes" if wanted else ""
        raise CheckpointError(
            f"{path}: a Git-LFS pointer ({size} bytes) in place of the file{real}; run "
            "'git lfs pull' in its folder, or fetch the file itself"
        )


def survey(files: Iterable[Path], packed: bool = False) -> dict[str, Entry]:
    """Every tensor of ``files`` by name; of safetensors the headers alone are read.

    ``packed`` says that tensors of weights that other programs quantised are expected.

    Raises:
        CheckpointError: see :func:`read_header`; or a tensor is in two files, or weights are
            quantised where none are expected.
    """
    found: dict[str, Entry] = {}
    for path in files:
        for name, entry in _entries(path).items():
            if name in found:
                first = found[name].file.name
                raise CheckpointError(
                    f"{path.parent}: tensor {name} is in two files, {first} and {path.name}; "
                    "keep the files of one model only"
                )
            found[name] = entry
    quantised = sorted(n for n in found if _QUANTISED.search(n))
    if quantised and not packed:
        where = found[quantised[0]].file.parent
        raise CheckpointError(
            f"{where}: stored quantised ({quantised[0]}), and its config.json does not say how; "
            "take the config.json that came with the weights, with its quantization_config"
        )
    return found


def _entries(path: Path) -> dict[str, Entry]:
    if path.suffix == ".safetensors":
        return read_header(path)
    tensors = _read_pickle(path, "meta")
    return {n: Entry(path, str(t.dtype), tuple(t.shape)) for n, t in tensors.items()}


def check(model: nn.Module, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes with what ``model`` needs.

    Names that share a tensor of the model need to be there once.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape.
    """
    state = model.state_dict(keep_vars=True)
    there = {id(state[name]) for name in found if name in state}
    missing = [name for name, tensor in state.items() if id(tensor) not in there]
    report([name for name in found if name not in state], missing, where)
    wrong = sorted(n for n, shape in found.items() if tuple(state[n].shape) != tuple(shape))
    if wrong:
        pairs = [
            f"{n} is {tuple(found[n])} in the file, {tuple(state[n].shape)} by config.json"
            for n in wrong[:3]
        ]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors of another shape: {'; '.join(pairs)}{more}; check "
            "that config.json and the weights belong to the same model"
        )


def target_dtype(name: str, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """The dtype that a tensor gets: ``wanted``; but rotary frequencies keep a stored bfloat16.

    Frequencies rounded to bfloat16 are what the model was trained with, whatever it runs in; and
    float16 has too few positions.
    """
    if not stored.is_floating_point:
        return stored
    if name.endswith("inv_freq"):
        return torch.bfloat16 if torch.bfloat16 in (stored, wanted) else torch.float32
    return wanted


def read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file on the CPU, one after another.

    Raises:
        CheckpointError: the file is damaged, or a pickle of more than tensors.
    """
    if path.suffix != ".safetensors":
        yield from _read_pickle(path, "cpu").items()
        return
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({' '.join(str(error).split())[:200]}); fetch it again"
        ) from error


def _read_pickle(path: Path, device: str) -> dict[str, Tensor]:
    with path.open("rb") as file:
        _refuse_pointer(path, file.read(208), path.stat().st_size)
    try:
        values: Any = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: a damaged pickle, or one that holds more than tensors and is never read; "
            "take a copy with *.safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or no pickle; fetch it again") from error
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise CheckpointError(
            f"{path}: not a plain table of tensors; take the weights of the released layout"
        )
    return values


def fill(model: nn.Module, files: Iterable[Path], dtype: torch.dtype, place: Place) -> None:
    """Give ``model``, whose tensors are on the meta device, the tensors of ``files``.

    One file is open at a time, and no tensor refers to it afterwards: memory holds what is
    filled so far and at most one file.  Parameters placed on ``"disk"`` stay on the meta device.

    Args:
        model: built on the meta device.
        files: their names and shapes are those of :func:`check`.
        dtype: of the weights; see :func:`target_dtype`.
        place: the device of each tensor.

    Raises:
        CheckpointError: a file is damaged.
        ResourceError: a device has not enough memory.
    """
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    for path in files:
        ready: dict[str, Tensor] = {}
        for name, tensor in read(path):
            device = place(name)
            if device != "disk":
                moved = _moved(tensor, target_dtype(name, tensor.dtype, dtype), device, path)
                ready.update(dict.fromkeys(names[id(state[name])], moved))
        model.load_state_dict(ready, strict=False, assign=True)


def _moved(
    tensor: Tensor, dtype: torch.dtype, device: str | int | torch.device, path: Path
) -> Tensor:
    with room(device, path, "take a lower precision, or device_map='auto'"):
        # A copy in any case: what still refers to a mapped file breaks when the file changes.
        return tensor.to(device=device, dtype=dtype, copy=True)


@contextmanager
def room(device: str | int | torch.device, path: Path, remedy: str) -> Iterator[None]:
    """Inside, too little memory is a :class:`ResourceError` that names the device and the file."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
            raise ResourceError(
                f"not enough memory on {device} for the weights, at {path.name}; 'cogvlm models' "
                f"says what each needs: {remedy}"
            ) from error
        raise
