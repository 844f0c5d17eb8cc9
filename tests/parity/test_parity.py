"""The checker passes on the recorded numbers, and fails when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from .check import main

FOLDER = Path(__file__).parent / "cogvlm2"


def test_cogvlm2_matches_the_released_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FOLDER) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    for name in ("image.logits", "long_text.hidden_states.3", "batch_image.image_features"):
        assert tensors[name]["abs"] < 5e-4
    for name in ("image.greedy", "text.greedy", "image.vision_expert_mask", "rope_bfloat16"):
        assert tensors[name]["abs"] == 0.0


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("cogvlm", ("image.greedy", "image.logits", "image.loss", "image_last.logits")),
        ("cogvlm2_video", ("chat.greedy", "base.greedy", "batch_mixed.hidden_states.3")),
    ],
)
def test_the_relatives_match_the_released_code(
    folder: str, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(FOLDER.parent / folder) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert set(names) <= set(tensors)
    assert len(tensors) >= 15


@pytest.mark.parametrize(
    "tensor", ["model.vision.eoi", "model.layers.1.mlp.vision_mlp.up_proj.weight"]
)
def test_a_changed_weight_is_noticed(
    tensor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(FOLDER, folder)
    weights = load_file(folder / "model.safetensors")
    weights[tensor] = weights[tensor] + 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(folder) == 1
    rows = json.loads(capsys.readouterr().out)["tensors"]
    assert not rows["image.logits"]["ok"]
    assert rows["text.logits"]["ok"]  # with no image no vision weight matters


def test_a_folder_that_cannot_be_checked_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path) == 2
    assert "no config.json" in json.loads(capsys.readouterr().out)["error"]
