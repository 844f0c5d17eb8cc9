"""Files of tensors have the permissions of the user's other files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvlm.tensors import save_tensors


@pytest.mark.skipif(sys.platform == "win32", reason="other permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_other_files(tmp_path: Path, mask: int) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "other"
    before = os.umask(mask)
    try:
        other.write_bytes(b"")
        save_tensors({"a": torch.ones(2, 3)}, path)
        save_tensors({"a": torch.zeros(2, 3)}, path)  # and again, in its place
    finally:
        os.umask(before)
    assert path.stat().st_mode == other.stat().st_mode
    assert torch.equal(load_file(path)["a"], torch.zeros(2, 3))
