"""Tokens to pieces: what is held back, where an answer is cut, and that pieces are the whole."""

from __future__ import annotations

import itertools

import pytest

from cogvlm.engine.sampling import TokenLogprob
from cogvlm.engine.transcript import Piece, Transcript
from engine.toys import Bytes


def play(said: str, *stop: str, repetition: bool = False) -> tuple[list[Piece], Transcript, str]:
    """Say it byte by byte: pieces as they come, the transcript, and why it ended."""
    text = Transcript(Bytes(), stop, repetition)
    pieces: list[Piece] = []
    why = "length"
    for token in Bytes().encode(said):
        found = text.add(token, TokenLogprob(token, "", -1.0, ()))
        if found is not None:
            why = found
            break
        piece = text.fresh()
        pieces += [piece] if piece is not None else []
    if why == "length" and text.finish():
        why = "stop"
    last = text.fresh(last=True)
    pieces += [last] if last is not None else []
    assert "".join(p.text for p in pieces) == text.text
    assert [i for p in pieces for i in p.ids] == text.ids
    assert [n.id for p in pieces for n in p.logprobs] == text.ids
    return pieces, text, why


def test_characters_are_never_split() -> None:
    said = "Öl 公 🚌!"
    pieces, text, why = play(said)
    assert (text.text, why) == (said, "length")
    assert len(pieces) == len(said)


@pytest.mark.parametrize(
    ("said", "stop", "shown"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("one STSTOP two", ("STOP",), "one ST"),
        ("one STO two", ("STOP",), "one STO two"),
        ("aab", ("ab",), "a"),
        ("abcd", ("cd", "bc"), "a"),
        ("abcd", ("bcd", "c"), "ab"),
        ("STOP", ("STOP",), ""),
        ("über公车bar", ("公车",), "über"),
        ("one two STO", ("STOP",), "one two STO"),
        ("\n\nx", ("\n\n",), ""),
    ],
)
def test_an_answer_ends_before_the_first_stop_string(
    said: str, stop: tuple[str, ...], shown: str
) -> None:
    pieces, text, why = play(said, *stop)
    assert text.text == shown
    assert why == ("length" if shown == said else "stop")
    assert text.ids == Bytes().encode(shown)
    assert all(s not in "".join(p.text for p in pieces) for s in stop)


def test_every_cut_of_short_texts_is_that_of_the_plain_rule() -> None:
    """All texts of six letters out of two, all stop strings of up to three: 64 x 14."""
    stops = ["".join(s) for n in (1, 2, 3) for s in itertools.product("ab", repeat=n)]
    for letters in itertools.product("ab", repeat=6):
        said = "".join(letters)
        for stop in stops:
            _, text, why = play(said, stop)
            cut, found, _ = said.partition(stop)
            assert (text.text, why) == (cut, "stop" if found else "length")


def test_what_may_be_surplus_is_held_and_one_copy_is_kept() -> None:
    pieces, text, why = play("see>" + "red bus, " * 30, repetition=True)
    assert (text.text, why) == ("see>red bus, ", "repetition")
    assert "".join(p.text for p in pieces) == "see>red bus, "


def test_a_stop_string_among_held_tokens_ends_at_once() -> None:
    _, text, why = play("ab ab ab END ab", "END", repetition=True)
    assert (text.text, why) == ("ab ab ab ", "stop")


def test_repetition_that_is_none_is_all_given() -> None:
    said = "row row row your boat, row row row"
    assert play(said, repetition=True)[1].text == said


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    text = Transcript(Bytes(), (), False)
    for token in Bytes().encode("a公")[:-1]:
        text.add(token)
    assert not text.finish()
    piece = text.fresh(last=True)
    assert piece is not None
    assert text.text == "a" + "\N{REPLACEMENT CHARACTER}"
    assert piece.text == text.text


def test_tokens_without_text_still_arrive() -> None:
    text = Transcript(Bytes(), (), False)
    text.add(1)  # a special token
    assert text.fresh() is None
    assert text.fresh(last=True) == Piece("", (1,))
    assert text.fresh(last=True) is None
