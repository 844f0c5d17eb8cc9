"""Choosing a token: every setting against a plain reference, and refused where impossible."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cogvlm.engine.grammar import Grammar
from cogvlm.engine.sampling import Sampler, Sampling, keep_likely, logprob_of
from cogvlm.errors import ConfigError, ResourceError

V = 60


def scores(seed: int = 0, size: int = V) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range: give 1 or more"),
        ({"temperature": math.nan}, "temperature=nan is out of range"),
        ({"top_p": 0}, "top_p=0 leaves no token"),
        ({"top_p": "x"}, "top_p='x' is not a number"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"min_p": 1.1}, "min_p=1.1 is out of range: give 0 to 1"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"seed": True}, "seed=True is not a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is out of range"),
        ({"presence_penalty": math.inf}, "presence_penalty=inf is out of range"),
        ({"frequency_penalty": None}, "frequency_penalty=None is not a number"),
        ({"logit_bias": [1]}, "logit_bias=[1] is not a table"),
        ({"logit_bias": {"1": 2.0}}, "logit_bias: token='1' is not a whole number"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias: token=-1 is out of range"),
        ({"logit_bias": {1: "2"}}, "logit_bias[1]='2' is not a number"),
        ({"stop": "end"}, "stop='end' is not a tuple of texts"),
        ({"stop": ("a", "")}, "none of them empty"),
        ({"stop": tuple("a" * i for i in range(1, 67))}, "stop has 66 texts"),
        ({"logprobs": -1}, "logprobs=-1 is out of range"),
        ({"logprobs": 101}, "logprobs=101 is out of range: give 0 to 100"),
        ({"repetition_stop": 1}, "repetition_stop=1 is not true or false"),
    ],
)
def test_impossible_settings_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        ("lark", "start: a", "'lark' is not one of json_schema, json_object, regex"),
        ("json_object", {}, "json_object takes no value"),
        ("json_schema", None, "None is not a schema"),
        ("regex", None, "None is not a text"),
    ],
)
def test_impossible_grammars_are_refused_by_name(kind: Any, value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Grammar(kind, value)
    assert named in str(caught.value)


def test_greedy_is_the_likeliest_and_changes_nothing() -> None:
    logits = scores()
    before = logits.clone()
    assert Sampler(Sampling(), []).choose(logits) == int(logits.argmax())
    warm = Sampling(temperature=2.0, seed=1, repetition_penalty=2.0, logit_bias={1: 5.0})
    Sampler(warm, [3, 4]).choose(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"top_p": 0.999},
        {"top_k": 500},
    ],
)
@pytest.mark.parametrize("size", [V, 3000])  # 3000: more than what is sorted at first
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_what_is_kept_is_what_transformers_keeps(
    values: dict[str, Any], size: int, spread: float
) -> None:
    logits = spread * scores(size, size)
    sampling = Sampling(temperature=0.7, **values)
    theirs = TemperatureLogitsWarper(0.7)(None, logits[None])
    if sampling.top_k:
        theirs = TopKLogitsWarper(sampling.top_k)(None, theirs)
    if sampling.top_p < 1:
        theirs = TopPLogitsWarper(sampling.top_p)(None, theirs)
    if sampling.min_p:
        theirs = MinPLogitsWarper(sampling.min_p)(None, theirs)
    odds = keep_likely(logits / 0.7, sampling)
    expected = theirs[0].softmax(0)
    # Sums in another order: a token at the very edge of top-p may differ.
    assert ((odds > 0) != (expected > 0)).sum() <= (1 if sampling.top_p < 1 else 0)
    both = (odds > 0) & (expected > 0)
    torch.testing.assert_close((odds / odds.sum())[both], expected[both], rtol=2e-2, atol=1e-6)


def test_draws_have_the_probabilities_of_the_model() -> None:
    logits = scores()
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [])
    drawn = Counter(sampler.choose(logits) for _ in range(4000))
    expected = logits.softmax(0)
    for token in expected.topk(5).indices.tolist():
        p = float(expected[token])
        # Four standard deviations of a count.
        assert abs(drawn[token] - 4000 * p) < 4 * math.sqrt(4000 * p * (1 - p))


def test_a_seed_decides_and_no_other_generator_does() -> None:
    logits = scores()

    def draws(seed: int | None, noise: int = 0) -> list[int]:
        torch.manual_seed(noise)
        sampler = Sampler(Sampling(temperature=2.0, seed=seed), [])
        return [sampler.choose(logits) for _ in range(20)]

    assert draws(5, 0) == draws(5, 1)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_rounding_of_the_scores_does_not_change_what_is_drawn() -> None:
    logits = scores()
    near = logits + 1e-6 * scores(1)
    pair = [Sampler(Sampling(temperature=1.5, seed=2), []) for _ in range(2)]
    assert [pair[0].choose(logits) for _ in range(200)] == [
        pair[1].choose(near) for _ in range(200)
    ]


def test_repetition_penalty_is_that_of_transformers() -> None:
    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    ids = [4, 9, 9, 31]
    sampler = Sampler(Sampling(repetition_penalty=1.7), ids)
    for seed in range(20):
        logits = scores(seed)
        expected = int(theirs(torch.tensor([ids]), logits[None].clone())[0].argmax())
        token = sampler.choose(logits)
        assert token == expected
        ids = [*ids, token]


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    sampler = Sampler(Sampling(presence_penalty=0.9, frequency_penalty=0.4), [5, 5, 5])
    answer: list[int] = []
    logits = scores()
    for _ in range(60):
        expected = logits.tolist()
        for token, count in Counter(answer).items():
            expected[token] -= 0.9 + 0.4 * count
        best = max(range(V), key=lambda i: expected[i])
        assert sampler.choose(logits) == best
        answer.append(best)
    assert len(set(answer)) > 3


def test_bias_forbids_and_forces() -> None:
    logits = scores()
    best = int(logits.argmax())
    assert Sampler(Sampling(logit_bias={best: -100.0}), []).choose(logits) != best
    assert Sampler(Sampling(logit_bias={7: 100.0}), []).choose(logits) == 7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_told(bad: float) -> None:
    logits = scores()
    logits[3] = bad
    with pytest.raises(ResourceError, match="not numbers"):
        Sampler(Sampling(temperature=1.0), []).choose(logits)


def test_logprobs_are_log_softmax() -> None:
    logits = scores()
    found = logprob_of(logits, 8, 4, lambda ids: f"<{ids[0]}>")
    logs = logits.log_softmax(0)
    assert (found.id, found.text) == (8, "<8>")
    assert found.logprob == pytest.approx(float(logs[8]))
    order = logs.argsort(descending=True)[:4].tolist()
    assert [(i, text) for i, text, _ in found.top] == [(i, f"<{i}>") for i in order]
    assert [p for *_, p in found.top] == pytest.approx(logs[order].tolist())
    assert len(logprob_of(logits, 8, 100, str).top) == V
