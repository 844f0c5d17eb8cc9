"""Strips that a model's head reads: once, and remembered."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvlm.errors import CheckpointError
from cogvlm.processor.encode import Strips
from cogvlm.reader import StripReader
from fakes import toy_model
from train.bars import NATIVE


def strip(value: float, width: int = 28) -> np.ndarray:
    return np.full((3, 28, width), value, np.float32)


class Counted:
    """Says how wide and how bright a strip is; counts what it was shown."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, strips: Strips) -> list[str]:
        self.seen.append(len(strips))
        return [f"{s.shape[2]}:{s[0, 0, 0]:.0f}" for s in strips]


def test_a_strip_is_read_once() -> None:
    spell = Counted()
    read = StripReader(spell)
    assert read([strip(1), strip(2), strip(1)]) == ["28:1", "28:2", "28:1"]
    assert read([strip(2), strip(3)]) == ["28:2", "28:3"] and read([]) == []
    assert spell.seen == [2, 1]


def test_the_oldest_is_forgotten() -> None:
    spell = Counted()
    read = StripReader(spell, most=2)
    read([strip(1), strip(2)])
    read([strip(1)])
    assert read([strip(3)]) == ["28:3"]
    assert read([strip(1), strip(2)]) == ["28:1", "28:2"]
    assert spell.seen == [2, 1, 1]


def test_another_process_can_have_it() -> None:
    vision = toy_model(vision_config=NATIVE | {"ctc_hidden": 8}).model.vision
    read = StripReader(partial(vision.spell, sure=0.0))
    strips: Sequence[np.ndarray] = [strip(0.3), strip(-1.0, 56)]
    assert pickle.loads(pickle.dumps(read))(strips) == read(strips) != ["", ""]


def test_a_model_reads_strips_of_any_width() -> None:
    model = toy_model(vision_config=NATIVE | {"ctc_hidden": 8})
    with torch.no_grad():
        head = model.model.vision.ctc
        for parameter in head.parameters():
            parameter.zero_()
        head.leave.bias[34] = 9.0  # class 34 of the first step of a column, "A"
    read = StripReader.of(model, Path("toy"))
    assert read([strip(0.0, 28), strip(0.0, 56)]) == ["AA", "AAAA"]
    with torch.no_grad():
        head.leave.bias[34] = 1.0  # the likeliest of 96 still, but hardly likely
    assert StripReader.of(model, Path("toy"))([strip(0.0, 28)]) == [""]
    assert model.model.vision.spell([strip(0.0, 28)], sure=0.0) == ["AA"]
    with pytest.raises(CheckpointError, match=r"toy: .*no head for that"):
        StripReader.of(toy_model(), Path("toy"))
