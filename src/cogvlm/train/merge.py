"""A model's folder and an adapter's to one folder of the same layout.  Needs no model in memory.

Every tensor is read, changed if the adapter says so (``W + s B A`` in float32, rounded once to the
dtype of ``W``), and written; memory holds one file of the model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from .. import adapter
from ..errors import InputError, ResourceError
from ..hub import resolve
from ..load import stored_precision
from ..models import shards
from ..models.checkpoint import is_vision, report
from ..tensors import save_tensors

_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".py", ".gguf")


def merge(name: str | Path, folder: str | Path, out: str | Path) -> Path:
    """Write ``out``: the model ``name`` with the adapter of ``folder`` in its weights.

    Args:
        name: ``nano``, a folder or a hub name; the one that the adapter was trained on.
        folder: of the adapter, see :mod:`cogvlm.adapter`.
        out: must not exist; its parent must.

    Raises:
        InputError: ``out`` exists, the model is quantised, or the adapter changes a language model
            that is stored elsewhere.
        CheckpointError: the adapter belongs to another model, or files are damaged.
        ResourceError: it cannot be written.
    """
    source, out = resolve(name), Path(out)
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists, and nothing is overwritten; name a new folder")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: {out.absolute().parent} is no folder; make it first")
    if kept := stored_precision(source):
        raise InputError(
            f"{source} is stored in {kept}; merge into the folder with the full weights, then "
            "quantise that (cogvlm quantize)"
        )
    stored = adapter.read(folder)
    files = shards.weight_files(source)
    _check(stored, {n: e.shape for n, e in shards.survey(files).items()}, source)
    box = out.absolute().with_name(f".{out.name}.part")
    try:
        shutil.rmtree(box, ignore_errors=True)  # of a run that was killed
        box.mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in _LEFT:
                shutil.copyfile(path, box / path.name)
        for path in files:
            tensors = {n: _merged(n, t, stored) for n, t in shards.read(path)}
            save_tensors(tensors, box / path.name)
        box.rename(out)
    except OSError as error:
        raise ResourceError(
            f"{out} cannot be written ({' '.join(str(error).split())}); choose another place"
        ) from error
    finally:
        shutil.rmtree(box, ignore_errors=True)
    return out


def _check(stored: adapter.Stored, found: dict[str, tuple[int, ...]], source: Path) -> None:
    """Raise where the adapter is not for these tensors."""
    pairs = {f"{n}.weight": (len(ab["B"]), ab["A"].shape[1]) for n, ab in stored.pairs.items()}
    wanted = {**{n: tuple(t.shape) for n, t in stored.parts.items()}, **pairs}
    missing = [n for n in wanted if n not in found]
    if missing and all(is_vision(n) for n in found):
        raise InputError(
            f"{stored.folder} changes the language model ({missing[0]}), which {source.name} takes "
            "from elsewhere: use it unmerged with --adapter, or train vision parts only (lora "
            "targets adapter, tower; parts experts)"
        )
    wrong = [n for n, shape in wanted.items() if n in found and found[n] != shape]
    report([*missing, *wrong], (), f"{stored.folder}, for {source}")


def _merged(name: str, tensor: Tensor, stored: adapter.Stored) -> Tensor:
    value = stored.parts.get(name, tensor)
    if pair := stored.pairs.get(name.removesuffix(".weight")):
        value = value.float() + stored.scale * (pair["B"].float() @ pair["A"].float())
    # A copy: what was read may lie in the file's own pages.
    return torch.empty_like(tensor).copy_(value)
