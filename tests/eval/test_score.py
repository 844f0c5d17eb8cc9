"""Metrics, against the definitions of their benchmarks."""

from __future__ import annotations

import pytest

from cogvlm.score import (
    METRICS,
    anls,
    boxes,
    contains,
    iou,
    letter,
    plain_words,
    relaxed,
    vqa,
    yes,
)


def test_cer_takes_the_nearest_truth() -> None:
    assert METRICS["cer"](["abc", "xy"], [("abd", "abcc"), ("xy",)]) == {"cer": 1 / 5, "exact": 0.5}


@pytest.mark.parametrize(
    ("said", "right", "value"),
    [
        ("hello", ("hello",), 1.0),
        ("HELLO  world", ("hello world",), 1.0),
        ("helo", ("hello",), 0.8),
        ("h", ("hello",), 0.0),  # 0.2 is under the threshold
        ("ab", ("abcd",), 0.5),  # the threshold itself counts
        ("", ("hello",), 0.0),
        ("x", ("y", "xx"), 0.5),
    ],
)
def test_anls(said: str, right: tuple[str, ...], value: float) -> None:
    assert anls(said, right) == pytest.approx(value)


@pytest.mark.parametrize(
    ("said", "right", "same"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("1,050", "1000", True),
        ("45%", "0.45", True),
        ("45%", "45", True),
        ("0.45", "45%", True),
        ("$12.", "12", True),
        ("-5", "5", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("North America", "north america", True),
        ("North", "north america", False),
        ("about 100", "100", False),
    ],
)
def test_relaxed_accuracy(said: str, right: str, same: bool) -> None:
    assert relaxed(said, (right,)) is same


@pytest.mark.parametrize(
    ("agreeing", "value"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_is_that_of_the_challenge(agreeing: int, value: float) -> None:
    people = ("Yes.",) * agreeing + ("maybe",) * (10 - agreeing)
    assert vqa("yes", people) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("A dog", "dog"),
        ("two dogs, one cat", "2 dogs 1 cat"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("It's THE end.", "it's end"),
        ("red/green", "red green"),
        ("", ""),
    ],
)
def test_words_are_made_plain(text: str, plain: str) -> None:
    assert plain_words(text) == plain


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        ("(C) the cat", "C"),
        ("D: a dog", "D"),
        ("The answer is A", "A"),
        ("the correct option is (B).", "B"),
        ("Apples", ""),
        ("A dog stands there", ""),
        ("", ""),
    ],
)
def test_letters(said: str, name: str) -> None:
    assert letter(said) == name


def test_yes_and_no() -> None:
    assert [yes(t) for t in ("yes", "Yes, it is.", "Sure. No doubt.", "No", "There is not.")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    found = METRICS["yes_no"](["yes", "yes", "no", "no"], [("yes",), ("no",), ("yes",), ("no",)])
    assert found == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes": 0.5}
    assert METRICS["yes_no"](["no"], [("yes",)])["f1"] == 0


def test_boxes() -> None:
    assert boxes("[[100,200,300,400;500,600,700,800]] and [[1,2,3]]") == [
        (0.1, 0.2, 0.3, 0.4),
        (0.5, 0.6, 0.7, 0.8),
    ]
    assert boxes("nowhere") == []
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert iou((0.5, 0, 0.5, 1), (0, 0, 1, 1)) == 0  # no area
    said = ["[[000,000,500,500]]", "[[000,000,100,100]]", "no box"]
    found = METRICS["box"](said, [("[[000,000,500,600]]",)] * 3)
    assert found["iou_0.5"] == pytest.approx(1 / 3)
    assert found["iou"] == pytest.approx((5 / 6 + 1 / 30) / 3)


def test_contained_and_common_words() -> None:
    assert contains("total:  12.50\nEUR", ("12.50 eur",))
    assert not contains("12.5", ("12.50",))
    found = METRICS["jaccard"](["the red car", "a"], [("red car",), ("a",)])
    assert found == {"jaccard": pytest.approx(5 / 6), "exact": 0.5}


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_answer_is_wrong_and_no_error(name: str) -> None:
    truth = {"box": "[[000,000,500,500]]", "choice": "B", "yes_no": "no"}.get(name, "truth")
    found = METRICS[name]([""], [(truth,)])
    good = {k: v for k, v in found.items() if k not in ("cer", "yes")}
    assert set(good.values()) == {0.0} and found.get("cer", 1.0) == 1.0
