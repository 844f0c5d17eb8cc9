"""Guesses at the next tokens, from what was there before."""

from __future__ import annotations

import numpy as np

from cogvlm.engine.drafts import Drafts


def drafts(prompt: str, answer: str, most: int = 6) -> Drafts:
    made = Drafts([ord(c) for c in prompt], most)
    for c in answer:
        made.add(ord(c))
    return made


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_an_answer_goes_on_as_the_prompt_did() -> None:
    assert text(drafts("Milk 1.20|Bread 2.40|", "Br").guess(9)) == "ead"
    assert text(drafts("Milk 1.20|Bread 2.40|", "Br").guess(2)) == "ea"
    assert text(drafts("", "abcab").guess(9)) == "cab"


def test_where_nothing_speaks_for_it_nothing_is_guessed() -> None:
    for prompt, answer in (("", ""), ("", "a"), ("abc", "xy"), ("abc", "xa"), ("abcd", "cx")):
        assert drafts(prompt, answer).guess(9) == [], (prompt, answer)


def test_the_place_with_more_of_the_same_before_it_is_taken_else_the_last() -> None:
    assert text(drafts("a 12 3|b 12 4|c 12 5|", "b 12 ").guess(1)) == "4"
    assert text(drafts("a 12 3|b 12 4|", "? 12 ").guess(1)) == "4"


def test_right_guesses_grow_and_wrong_ones_ask_for_more() -> None:
    prompt = "abcdefghijklmnopqrstuvwxyz"
    made = drafts(prompt, "ab", most=10)
    lengths = []
    for _ in range(4):
        guess = made.guess(99)
        lengths.append(len(guess))
        made.learn(len(guess), len(guess))
    assert lengths == [3, 7, 10, 10]
    made.learn(4, 10)
    assert len(made.guess(99)) == 5
    made.learn(0, 5)
    assert made.guess(99) == []  # two tokens alike are no longer enough
    made.add(ord("c"))
    assert text(made.guess(99)) == "def"


def test_a_picture_of_a_thousand_equal_tokens_is_no_trouble() -> None:
    made = Drafts([7] * 5000 + [1, 2, 3, 4], 6)
    for token in (7, 7):  # which no model says
        made.add(token)
    assert made.guess(4) == [1, 2, 3]
    for token in (1, 2):
        made.add(token)
    assert made.guess(4) == [3, 4, 7]


def test_guesses_are_always_what_once_followed() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, 400).tolist()
    made, before = Drafts(ids[:50], 5), ids[:50]
    for token in ids[50:]:
        guess = made.guess(9)
        assert len(guess) <= 5
        if guess:
            tail = before[-2:]
            ends = [i for i in range(2, len(before)) if before[i - 2 : i] == tail]
            assert any(before[i : i + len(guess)] == guess for i in ends)
        made.add(token)
        before.append(token)
