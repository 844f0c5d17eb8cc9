"""Compiled layers train as plain ones do, at any length; where none can be made, that is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvlm.errors import ConfigError
from cogvlm.load import load
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.positions import Route, expert_mask
from cogvlm.train import recipe as recipes
from cogvlm.train import tune
from cogvlm.train.compiled import Ordered, compile_layers
from cogvlm.train.compute import recompute
from engine.families import family
from fakes import image, row, toy_model
from train import toys

COMPILERS = ("g++", "c++", "clang++")
SHAPES = ((2, 5), (3, 40))  # rows and tokens of text behind a picture


def batch(model: CogVLMForCausalLM, rows: int, text: int) -> dict[str, Any]:
    """Rows with a picture each, of which the first is padded."""
    made = [row(model, 2, image(i), text) for i in range(rows)]
    names = ("input_ids", "token_type_ids")
    given: dict[str, Any] = {n: torch.cat([one[n] for one in made]) for n in names}
    given["pixel_values"] = [picture for one in made for picture in one["pixel_values"]]
    given["labels"] = torch.full_like(given["input_ids"], -100)
    given["labels"][:, -3:] = 7
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, 0] = 0
    return given


def gradients(model: CogVLMForCausalLM, given: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    named = model.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_loss_and_gradients_are_those_of_plain_layers() -> None:
    torch._dynamo.reset()  # of other tests
    plain, made = (toy_model(num_hidden_layers=1) for _ in range(2))
    assert compile_layers(made)
    recompute(made)
    for rows, text in SHAPES:
        wanted, found = (gradients(m, batch(m, rows, text)) for m in (plain, made))
        assert wanted.keys() == found.keys() and float(wanted["loss"]) > 1
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=name)
    with torch.no_grad():  # answers are made by the plain layers
        given = batch(plain, 2, 9)
        del given["labels"]
        assert torch.equal(made(**given).logits, plain(**given).logits)


def test_an_order_is_the_route_that_it_was_made_of() -> None:
    types = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    for one in (types, types[2:]):
        route = Route.of(expert_mask(one))
        made = Ordered.like(route, torch.device("cpu"))
        x = torch.randn(*one.shape, 4, requires_grad=True)
        grouped = made.split(x)
        assert torch.equal(grouped, route.split(x)) and made.n_language == route.n_language
        assert torch.equal(made.join(grouped), x)
        weights = torch.randn_like(grouped)
        (found,) = torch.autograd.grad((made.split(x) * weights).sum(), x)
        (wanted,) = torch.autograd.grad((route.split(x) * weights).sum(), x)
        assert torch.equal(found, wanted)


def test_where_nothing_compiles_it_is_said_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", fails)
    model = toy_model(num_hidden_layers=1)
    before = model.model.layers[0].forward
    assert not compile_layers(model) and model.model.layers[0].forward == before
    said = capsys.readouterr().err
    assert said == "compile: goes on without, nothing compiles here: no compiler was found\n"


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_what_is_not_compiled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CogAgent's layers are not compiled"):
        compile_layers(family("cogagent").model)
    pytest.importorskip("torchao")
    model = load(toys.write_model(tmp_path / "model"), "int8", "cpu").model
    with pytest.raises(ConfigError, match=r"is quantised and cannot be compiled; take precision"):
        compile_layers(model)


def test_a_recipe_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(tune, "compile_layers", asked.append)
    path = toys.write_recipe(
        tmp_path / "r.yaml", tmp_path, tmp_path, parts={"experts": {}}, compile=True
    )
    for settings in ([], ["compile=false"]):
        made = recipes.load(path, settings)
        assert isinstance(made, recipes.TuneRecipe)
        tune.make_ready(toy_model(), made)
    assert len(asked) == 1
