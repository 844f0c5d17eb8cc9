"""The loss on pictures: right places, exact sums, learnt, and gone from what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cogvlm.errors import ConfigError
from cogvlm.train import recipe as recipes
from cogvlm.train.distributed import World
from cogvlm.train.loop import Loop
from cogvlm.train.run import objective, prepare
from cogvlm.train.sight import HEAD, Sight, add_head
from fakes import image, left_pad, row, toy_model
from train import toys

NATIVE = {"grid": "native", "max_rows": 4, "max_cols": 6, "num_positions": 25}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sight")
    toys.write_model(folder / "model")
    toys.write_data(folder / "data")
    return folder


def path_of(place: Path, out: Path, **changes: Any) -> Path:
    changes = {"parts": {"experts": {}}, "image_loss": 0.5, **changes}
    labels = place / "data" / "labels.jsonl"
    return toys.write_recipe(out.with_suffix(".yaml"), place / "model", labels, **changes)


def test_each_image_token_says_what_the_tower_saw_at_the_next() -> None:
    model = toy_model(vision_config=NATIVE)
    add_head(model)
    sight = Sight(model)
    pictures = [image(1, 56, 56), image(2, 28, 84), image(3, 56, 56)]  # two sizes, not in turn
    rows = [row(model, 2, pictures[0], 3, pictures[1], 2), row(model, 1, pictures[2], 4)]
    given = left_pad(rows)
    with torch.no_grad():
        model(**given)
        found = sight.loss(given["token_type_ids"], given["pixel_values"])
        states = model.model(**given).last_hidden_state
        total = torch.zeros(())
        head = model.get_submodule(HEAD)
        hidden = [
            h for s, r in zip(states, rows, strict=True) for h in s[-r["input_ids"].shape[1] :]
        ]
        types = [int(t) for r in rows for t in r["token_type_ids"][0]]
        tokens = iter([h for h, t in zip(hidden, types, strict=True) if t == 1])
        for picture in pictures:
            patches, (tall, wide) = model.model.vision.patches(picture[None])
            grid = patches[0].view(tall, wide, -1)
            block = [next(tokens) for _ in range(tall * wide // 4 + 2)]
            for i in range(tall * wide // 4):
                y, x = divmod(i, wide // 2)
                aim = grid[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(0, 1))
                total += (head(block[i]) - F.layer_norm(aim, aim.shape)).square().mean()
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-4)


def test_without_a_picture_there_is_nothing_to_learn() -> None:
    model = toy_model()
    add_head(model)
    sight = Sight(model)
    given = row(model, 5)
    model(**given)
    assert float(sight.loss(given["token_type_ids"], None)) == 0.0


def gradients(loop: Loop) -> dict[str, torch.Tensor]:
    loop.one_step(next(loop.objective.batches(0)))
    named = loop.objective.trained.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}


def test_its_sum_is_exact_however_a_step_is_divided(place: Path, tmp_path: Path) -> None:
    found = []
    for size, times in ((8, 1), (2, 4)):
        path = path_of(place, tmp_path / f"{size}", batch_size=size, accumulate=times)
        loop = prepare(recipes.load(path, ["schedule.clip=1e9"]), tmp_path / f"{size}")
        found.append(gradients(loop))
    assert f"{HEAD}.weight" in found[0]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_it_is_learnt_logged_resumed_and_not_exported(place: Path, tmp_path: Path) -> None:
    path = path_of(place, tmp_path / "a", schedule={"steps": 12, "lr": 2e-2})
    loop = prepare(recipes.load(path), tmp_path / "a")
    loop.run()
    figures = toys.losses(tmp_path / "a", "image_loss")
    assert figures[12] < 0.8 * figures[1]
    names = load_file(tmp_path / "a" / "parts.safetensors").keys()
    assert names and not any(HEAD in name for name in names)
    again = prepare(recipes.load(path), tmp_path / "a")
    assert again.resume() and again.step == 12


def test_what_cannot_have_it_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no place in the picture"):
        add_head(toy_model(vision_config={"adapter": "qformer"}))
    path = path_of(place, tmp_path / "a")
    with pytest.raises(ConfigError, match="known in one process only"):
        objective(recipes.load(path), World(0, 2))
    with pytest.raises(ConfigError, match="image_loss is -1"):
        recipes.load(path, ["image_loss=-1"])
