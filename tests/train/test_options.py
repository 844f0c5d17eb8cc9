"""Recipe keys that save memory or time: eight bits of state, small pictures first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvlm.errors import ConfigError
from cogvlm.train import recipe as recipes
from cogvlm.train.loop import Loop, Schedule
from cogvlm.train.rows import at_resolution
from cogvlm.train.run import prepare
from engine.families import family
from train import toys


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    toys.write_model(folder / "model")
    toys.write_data(folder / "data")
    return folder


def loop_of(place: Path, out: Path, **changes: Any) -> Loop:
    changes = {"parts": {"experts": {}}, **changes}
    labels = place / "data" / "labels.jsonl"
    path = toys.write_recipe(out.with_suffix(".yaml"), place / "model", labels, **changes)
    return prepare(recipes.load(path), out)


# --- eight bits ---


def states(loop: Loop) -> dict[torch.dtype, int]:
    found: dict[torch.dtype, int] = {}
    for state in loop.optimizers[0].state.values():
        for key in ("state1", "state2"):
            found[state[key].dtype] = found.get(state[key].dtype, 0) + state[key].numel()
    return found


def test_eight_bit_states_learn_like_whole_ones_and_resume_exactly(
    place: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    small = {"schedule": {"optimizer": "adamw8bit", "lr": 2e-2}}
    loop_of(place, tmp_path / "whole", schedule={"lr": 2e-2}).run()
    unbroken = loop_of(place, tmp_path / "small", **small)
    unbroken.run()
    kinds = states(unbroken)
    assert kinds[torch.uint8] > 5 * kinds.get(torch.float32, 0)
    wanted, found = toys.losses(tmp_path / "whole"), toys.losses(tmp_path / "small")
    assert found[6] < 0.9 * found[1]
    assert found[6] == pytest.approx(wanted[6], rel=0.1) and found != wanted
    broken = loop_of(place, tmp_path / "again", **small)
    batches = broken.objective.batches(0)
    for _ in range(4):
        broken.one_step(next(batches))
    broken.save()
    resumed = loop_of(place, tmp_path / "again", **small)
    assert resumed.resume() and resumed.step == 4
    resumed.run()
    again = toys.losses(tmp_path / "again")
    assert {step: again[step] for step in (5, 6)} == {step: found[step] for step in (5, 6)}


def test_optimisers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'adam8' is not adamw, adamw8bit or muon"):
        Schedule(steps=1, optimizer="adam8")
    path = toys.write_recipe(
        tmp_path / "r.yaml",
        tmp_path,
        tmp_path,
        parts={"experts": {}},
        parallel="fsdp",
        schedule={"optimizer": "adamw8bit"},
    )
    with pytest.raises(ConfigError, match="adamw8bit needs whole matrices"):
        recipes.load(path)


# --- resolution ---


def sides(loop: Loop, start: int, count: int) -> list[set[int]]:
    batches = loop.objective.batches(start)
    return [
        {p.shape[-1] for piece in next(batches).pieces for p in piece.batch.pixel_values}
        for _ in range(count)
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_are_small_first_and_large_later(
    place: Path, tmp_path: Path, workers: int
) -> None:
    loop = loop_of(place, tmp_path / "a", resolution={0: 28, 2: 56}, workers=workers)
    assert sides(loop, 0, 4) == [{28}, {28}, {56}, {56}]
    assert sides(loop, 1, 2) == [{28}, {56}] and sides(loop, 3, 1) == [{56}]
    same = loop_of(place, tmp_path / "b", workers=workers)
    for start in (0, 1, 2, 3):  # the records and their order stay what they were
        mine, its = (next(one.objective.batches(start)) for one in (loop, same))
        words = [sorted(p.batch.labels.max(1).tolist() for p in b.pieces) for b in (mine, its)]
        assert words[0] == words[1]
    tokens = [
        [one.one_step(next(one.objective.batches(i)))["tokens"] for i in (0, 2)]
        for one in (loop, same)
    ]
    assert tokens[0][0] < tokens[1][0] and tokens[0][1] == tokens[1][1]
    one = loop_of(place, tmp_path / "c", resolution=28)
    assert sides(one, 5, 1) == [{28}]


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        (84, "takes at most 56 pixels a side"),
        (30, "no multiple of patch"),
        ({5: 28}, "from step 0 on"),
        ({0: "28"}, "from step 0 on"),
        (0, "from step 0 on"),
        (-28, "from step 0 on"),
        ("low", "from step 0 on"),
    ],
)
def test_a_resolution_that_cannot_be_is_refused(
    place: Path, tmp_path: Path, resolution: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loop_of(place, tmp_path / "a", resolution=resolution)


def test_models_of_one_size_take_no_resolution(place: Path, tmp_path: Path) -> None:
    other = family("glm4v")
    steps: Any = loop_of(place, tmp_path / "a").objective
    steps = replace(steps.steps, processor=other.processor)
    with pytest.raises(ConfigError, match="pictures of its own sizes only"):
        at_resolution(steps, other.model.config, 28)
