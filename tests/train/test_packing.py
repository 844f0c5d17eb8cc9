"""Rows packed into one sequence: the loss and gradients of rows apart, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvlm.errors import ConfigError, InputError
from cogvlm.models import positions
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.processor import Encoded
from cogvlm.train import recipe as recipes
from cogvlm.train.packing import bins
from cogvlm.train.run import prepare
from engine.families import family
from fakes import image, row, toy_model
from train import toys

NATIVE = {"grid": "native", "max_rows": 4, "max_cols": 6, "num_positions": 25}
OPTIONS: dict[str, dict[str, Any]] = {
    "released": {},
    "flat": {"image_positions": "flat"},
    "rope_tie": {"image_positions": "rope_tie", "vision_config": NATIVE},
    "full": {"image_attention": "full"},
    "none": {"visual_expert": "none"},
}


def labelled_rows(model: CogVLMForCausalLM) -> list[dict[str, Any]]:
    """A picture, text alone, and two pictures; the last tokens of each are learnt."""
    small = model.config.vision.grid == "native"
    height = 28 if small else 56  # grids of different shapes where the model takes them
    made = [
        row(model, 2, image(1), 5),
        row(model, 7),
        row(model, 1, image(2, height), 2, image(3), 4),
    ]
    for i, one in enumerate(made):
        one["input_ids"] = torch.where(
            one["token_type_ids"] == 0, one["input_ids"] + 7 * i, one["input_ids"]
        )
        one["labels"] = torch.full_like(one["input_ids"], -100)
        one["labels"][:, -3:] = one["input_ids"][:, -3:]
    return made


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("input_ids", "token_type_ids", "labels")
    made: dict[str, Any] = {name: torch.cat([r[name] for r in rows], 1) for name in names}
    places = [torch.arange(r["input_ids"].shape[1]) for r in rows]
    made["pixel_values"] = [p for r in rows for p in r["pixel_values"] or []]
    return {**made, "sequence_positions": torch.cat(places)[None]}


def gradients(model: CogVLMForCausalLM, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    model.zero_grad()
    losses = [model(**r, num_items_in_batch=9).loss for r in rows]
    total = sum(losses, torch.zeros(()))
    total.backward()
    named = model.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None} | {"loss": total.detach()}


@pytest.mark.parametrize("option", [*OPTIONS, "glm4v"])
def test_packed_rows_give_the_loss_and_gradients_of_rows_apart(option: str) -> None:
    model = family(option).model if option == "glm4v" else toy_model(**OPTIONS[option])
    rows = labelled_rows(model)
    apart, together = gradients(model, rows), gradients(model, [joined(rows)])
    assert apart.keys() == together.keys() and float(apart["loss"]) > 1
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value, rtol=2e-4, atol=2e-5, msg=name)


def test_packed_rows_are_routed_and_placed_as_apart() -> None:
    model = toy_model()
    rows = labelled_rows(model)
    whole = joined(rows)
    types, places = whole["token_type_ids"], whole["sequence_positions"]
    found = model.model.packed_position_ids(types, places, whole["pixel_values"])
    wanted = [model.model.position_ids(r["token_type_ids"], None, None) for r in rows]
    assert found.tolist() == torch.cat(wanted, 1).tolist()
    experts = [positions.expert_mask(r["token_type_ids"]) for r in rows]
    assert positions.expert_mask(types).tolist() == torch.cat(experts, 1).tolist()


def test_what_a_row_says_changes_nothing_in_its_neighbour() -> None:
    model = toy_model()
    rows = labelled_rows(model)
    whole = joined(rows)
    del whole["labels"]
    length = rows[0]["input_ids"].shape[1]
    before = model(**whole).logits
    whole["input_ids"][0, 0] += 1
    after = model(**whole).logits
    assert not torch.equal(before[:, :length], after[:, :length])
    assert torch.equal(before[:, length:], after[:, length:])


def test_a_packed_row_takes_no_padding_and_no_cache() -> None:
    model = toy_model()
    rows = labelled_rows(model)
    whole = joined(rows)
    with pytest.raises(InputError, match="no attention_mask and no cache"):
        model(**whole, attention_mask=torch.ones_like(whole["input_ids"]))
    with pytest.raises(InputError, match="no attention_mask and no cache"):
        model(**whole, use_cache=True)
    with pytest.raises(InputError, match="does not begin with the first token"):
        model(**{**whole, "sequence_positions": whole["sequence_positions"] + 1})
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="takes no mask; take sdpa"):
        model(**whole)


# --- a run ---


def encoded(length: int) -> Encoded:
    ids = np.zeros(length, np.int64)
    return Encoded(ids, ids, [], ids)


def test_rows_go_where_they_fit_and_none_is_lost() -> None:
    lengths = [3, 9, 4, 7, 2, 2]
    groups = bins([encoded(n) for n in lengths], 10)
    found = [[len(r.input_ids) for r in group] for group in groups]
    assert found == [[9], [7, 3], [4, 2, 2]]
    assert bins([], 10) == []


def test_a_packed_step_is_the_unpacked_step(tmp_path: Path) -> None:
    toys.write_model(tmp_path / "model")
    labels = toys.write_data(tmp_path / "data")
    steps = []
    for packing in (False, True):
        path = toys.write_recipe(
            tmp_path / f"{packing}.yaml",
            tmp_path / "model",
            labels,
            parts={"experts": {}, "adapter": {}},
            packing=packing,
            max_tokens=128,
            accumulate=2,
            schedule={"clip": 1e9},
        )
        loop = prepare(recipes.load(path), tmp_path / str(packing))
        figures = loop.one_step(next(loop.objective.batches(0)))
        named = loop.objective.trained.named_parameters()
        steps.append((figures, {n: p.grad for n, p in named if p.grad is not None}))
    (apart, wanted), (together, found) = steps
    assert together["rows"] == apart["rows"] == 8
    assert together["answer_tokens"] == apart["answer_tokens"]
    assert together["tokens"] < apart["tokens"]  # no padding
    assert together["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert wanted.keys() == found.keys() and len(wanted) > 10
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(ConfigError, match="packing needs max_tokens"):
        recipes.load(path, ["max_tokens=null"])
