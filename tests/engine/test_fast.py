"""Steps with few operators against the model's own ``forward``.

Tolerances, of scores with a standard deviation of 1.2: rounding of another order of additions.  In
bfloat16 that is a few of its steps (2**-8 at one), a third of what bfloat16 itself is away from
float32 in these models (0.13 to 0.2 at most); where the kernels are the same, both ways are equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from cogvlm.engine import fast
from cogvlm.engine.runner import ModelRunner
from cogvlm.linear import FEW
from cogvlm.load import Loaded
from cogvlm.quantize import quantise
from engine.families import FAMILIES, LIKE_COGVLM, family, prompts

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def scores(loaded: Loaded, together: bool, own: bool, rows: int = 4) -> torch.Tensor:
    """Of three steps of some conversations, together or one by one: ``float32[3, rows, V]``."""
    runner = ModelRunner(loaded, rows, 0, 0)
    if own:
        runner._fast = None
    asked = prompts(loaded)
    seats = [runner.start(asked[row % len(asked)])[0] for row in range(rows)]
    found = []
    for number in range(3):
        tokens = [40 + 7 * i + number for i in range(rows)]
        if together:
            found.append(runner.step(seats, tokens))
        else:
            alone = zip(seats, tokens, strict=True)
            found.append(torch.cat([runner.step([seat], [token]) for seat, token in alone]))
    return torch.stack(found)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", LIKE_COGVLM)
def test_scores_are_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    loaded = family(name)
    loaded.model.to(dtype=dtype)
    assert fast.is_known(loaded.model)
    tolerance = TOLERANCES[dtype]
    for together in (True, False):
        expected = scores(loaded, together, own=True)
        assert float(expected.std()) > 0.5
        assert_close(scores(loaded, together, own=False), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
@pytest.mark.parametrize("rows", [FEW - 1, FEW])
def test_few_rows_and_many_go_different_ways(precision: str | None, rows: int) -> None:
    loaded = family("behind")
    if precision:
        quantise(loaded.model, precision)
    expected = scores(loaded, True, own=True, rows=rows)
    tolerance = TOLERANCES[torch.bfloat16 if precision else torch.float32]
    assert_close(scores(loaded, True, own=False, rows=rows), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_the_head_of_a_quantised_model_is_multiplied_in_float16(precision: str | None) -> None:
    """Where the CPU has the kernel; the head of another model stays as it is."""
    loaded = family("cogvlm2")
    if precision:
        quantise(loaded.model, precision)
    steps, exact = fast.Steps(loaded.model), fast.Steps(loaded.model)
    exact._half = None
    assert precision or steps._half is None
    runner = ModelRunner(loaded, 1, 0, 0)
    seat, _ = runner.start(prompts(loaded)[1])
    tokens, places = torch.tensor([50]), torch.tensor([seat.position()])
    with torch.inference_mode():
        found, expected = (one(tokens, places, seat.view, None) for one in (steps, exact))
    # Eleven bits of each weight; none more is lost, and without the kernel nothing.
    assert_close(found, expected, rtol=0, atol=2**-9 if steps._half is not None else 0.0)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="laid out for MKL")
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_that_lie_the_other_way_are_the_same(tied: bool, tmp_path: Path) -> None:
    loaded = family("cogvlm2")
    model: Any = loaded.model
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner = ModelRunner(loaded, 4, 0, 0)
    linear = model.model.layers[1].mlp.language_mlp.down_proj
    assert linear.weight.t().is_contiguous()
    assert model.model.embed_tokens.weight.is_contiguous()
    assert model.lm_head.weight.is_contiguous() == tied
    assert runner._fast is not None and (runner._fast._head is None) != tied
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    other = family("cogvlm2")
    if tied:
        other.model.lm_head.weight = other.model.model.embed_tokens.weight
    found, expected = (
        scores(one, together=True, own=own) for one, own in ((loaded, False), (other, True))
    )
    assert_close(found, expected, rtol=0, atol=TOLERANCES[torch.float32])
    model.save_pretrained(tmp_path)  # as it was, too
    kept = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    assert len(kept) > 10


def changed(name: str, change: Any) -> Any:
    model: Any = family(name).model
    change(model)
    return model


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("glm4v", lambda model: None),
        ("cogagent", lambda model: None),
        ("cogvlm2", lambda model: model.half()),
        ("cogvlm2", lambda model: model.set_attn_implementation("eager")),
        ("cogvlm2", lambda model: setattr(model, "hf_device_map", {"": "cpu"})),
    ],
)
def test_what_is_not_known_goes_its_own_way(name: str, change: Any) -> None:
    assert name in FAMILIES
    assert not fast.is_known(changed(name, change))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_several_tokens_of_one_as_step_by_step(name: str, own: bool) -> None:
    loaded = family(name)
    runner, plain = ModelRunner(loaded, 2, 0, 0), ModelRunner(loaded, 2, 0, 0)
    if runner.most_ahead < 2:
        assert name == "cogagent"
        return
    if own:
        runner._fast = plain._fast = None
    for prompt in prompts(loaded)[:4]:
        seat, _ = runner.start(prompt)
        other, _ = plain.start(prompt)
        for tokens, kept in (
            ([50, 61, 72, 83], 2),
            ([91, 52, 63], 3),
            ([44, 55], 0),
            ([66, 77], 1),
        ):
            expected = torch.cat([plain.step([other], [token]) for token in tokens])
            for _ in range(2):  # looking changes nothing
                found = runner.ahead(seat, tokens)
                assert_close(found, expected, rtol=0, atol=1e-4)
            for token in tokens[:kept]:
                runner.add(seat, token)
            plain.stop(other)
            other, _ = plain.start(prompt)
            for token in seat.added:
                plain.step([other], [token])
        plain.stop(other)
        runner.stop(seat)
