"""Files of tensors, written as other files are."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that those may read who may read the user's other files.

    safetensors itself makes its files readable by their owner alone, and a server that runs as
    somebody else could not load what was trained.

    Args:
        tensors: contiguous, on the CPU, no two of them sharing memory.
        path: replaced where it exists.

    Raises:
        OSError: the file cannot be written; of a full disk safetensors raises its own error.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
