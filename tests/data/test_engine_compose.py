"""Questions and answers: right by the truth, varied, and usable for training."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cogvlm.data.engine.compose import Compose
from cogvlm.data.engine.questions import about, questions
from cogvlm.data.engine.step import Fact, Item, Picture, Piece, Reject, Sample, Truth
from cogvlm.data.sft.record import check_turns
from cogvlm.processor.lines import place
from data.engine_parts import dot


def composed(samples: list[Sample], **settings: float) -> list[Sample]:
    quiet = {"negatives": 0.0, "text_only": 0.0, "pairs": 0.0, **settings}
    items: list[Item] = list(samples)
    out = list(Compose(**quiet)(items))  # type: ignore[arg-type]
    return [item for item in out if isinstance(item, Sample)]


def dots(count: int = 40) -> list[Sample]:
    return [dot(f"d{i}", i) for i in range(count)]


def test_places_are_thousandths_and_never_over() -> None:
    assert place((0, 0, 448, 336), (448, 336)) == "[[000,000,999,999]]"
    assert place((-3, 33.6, 44.8, 400), (448, 336)) == "[[000,100,100,999]]"


def test_every_sample_is_a_conversation_that_trains() -> None:
    made = composed(dots(), negatives=0.5, text_only=0.5, pairs=0.5)
    for sample in made:
        messages = sample.record().messages
        check_turns(messages)
        assert len(sample.tasks) == sum(m.role == "user" for m in messages)
        assert sum(len(m.images) for m in messages) == len(sample.pictures)
    kinds = Counter(len(s.pictures) for s in made)
    assert set(kinds) == {0, 1, 2}
    assert len({s.id for s in made}) == len(made)


def test_answers_are_those_of_the_truth() -> None:
    seen = set()
    for sample in composed(dots(120)):
        truth = sample.pictures[0].truth
        at = place(truth.items[0].box, sample.pictures[0].size)
        for task, question, answer in asked(sample):
            seen.add(task)
            if task == "where is":
                assert at in answer
            elif task == "what is at":
                assert at in question and answer == "dot"
            elif task == "read":
                assert answer == truth.text
            elif task in ("value", "document"):
                assert "1.20" in answer
            elif task == "caption":
                assert answer == "A black dot."
    assert {"where is", "what is at", "read", "value", "document", "caption"} <= seen


def test_lines_that_stand_there_once_have_a_place() -> None:
    texts = ("Milk", "Milk", "Thank you", "a line that is too long to be asked for by its words")
    lines = tuple(Piece(t, (10, 20 * i, 90, 20 * i + 15), "line") for i, t in enumerate(texts))
    lines += (Piece("a | b", (10, 80, 90, 95), "row"),)
    picture = Picture(b"", (100, 100), Truth(lines=lines))
    for seed in range(20):
        pool = questions(picture, np.random.default_rng(seed))
        (ask,) = [a for a in pool if a.task == "where is a line"]
        assert 'the line "Thank you"' in ask.question and ask.short == "[[100,400,900,550]]"


def asked(sample: Sample) -> list[tuple[str, str, str]]:
    turns = iter(sample.turns)
    return [(task, next(turns).text, next(turns).text) for task in sample.tasks]


def test_neighbours_are_those_of_the_page() -> None:
    texts = ("Opening hours", "Monday to Friday", "nine to five", "closed on Sunday")
    lines = tuple(
        Piece(text, (20.0, 20.0 + 30 * i, 180.0, 40.0 + 30 * i), "line")
        for i, text in enumerate(texts)
    )
    far = Piece("elsewhere", (400.0, 300.0, 440.0, 320.0), "line")
    truth = Truth("\n".join((*texts, far.text)), (), (*lines, far))
    below = {f'"{a}"': b for a, b in itertools.pairwise(texts)}
    above = {f'"{b}"': a for a, b in itertools.pairwise(texts)}
    words = " ".join((*texts, far.text)).split()
    seen: Counter[str] = Counter()
    for seed in range(30):
        for ask in questions(Picture(b"", (448, 336), truth), np.random.default_rng(seed)):
            if ask.task == "next line":
                up = re.search("above|before|over", ask.question)
                known = re.search('"[^"]+"', ask.question)
                assert known and ask.short == (above if up else below)[known[0]]
                seen["above" if up else "below"] += 1
            elif ask.task == "word there":
                word = ask.question.split('"')[1]
                there = any(word.lower() in other.lower() for other in words)
                assert ask.short == ("yes" if there else "no")
                seen[ask.short] += 1
    assert min(seen[key] for key in ("above", "below", "yes", "no")) > 20


def test_short_answers_are_short_and_full_ones_hold_them() -> None:
    rng = np.random.default_rng(0)
    facts = [Fact("total", "12.50"), Fact("price", "1.20", "milk"), Fact("number of items", "3")]
    facts += [Fact("ticked", "no", "Sounds"), Fact("highest", "Oslo"), Fact("Name", "", "")]
    for fact in (*facts, Fact("next step", "b", "a")):
        ask = about(fact, rng)
        assert ask is not None and ask.full.endswith(".") and len(ask.short) < len(ask.full)
        if fact.value and fact.name != "ticked":
            assert fact.value == ask.short and fact.value in ask.full


def test_the_same_sample_gets_the_same_questions_whatever_came_before() -> None:
    first = composed(dots(6))
    alone = [composed([sample])[0] for sample in dots(6)]
    assert first == alone
    assert composed([dot("d1", 1)])[0].turns != composed([dot("d1", 99)])[0].turns


def test_what_is_not_there_is_not_there() -> None:
    found = 0
    for sample in composed(dots(60), negatives=1.0):
        for task, question, answer in asked(sample):
            if task == "not there":
                found += 1
                assert re.search(r"\bno\b|not in the picture", answer.lower())
                assert "dot" not in question and "milk" not in question
    assert found > 20


def test_text_alone_has_the_text_and_an_answer_from_it() -> None:
    made = [s for s in composed(dots(40), text_only=1.0) if not s.pictures]
    assert made
    for sample in made:
        assert sample.turns[0].text.startswith("Read this:\nshop ")
        assert all("1.20" in t.text for t in sample.turns if t.role == "assistant")


def test_pairs_tell_the_pictures_apart() -> None:
    others = [replace(s, kind="table") if i % 2 else s for i, s in enumerate(dots(60))]
    pairs = [s for s in composed(others, pairs=1.0) if len(s.pictures) == 2]
    assert pairs
    checked = 0
    for sample in pairs:
        names = sample.kind.split(" and ")
        for task, question, answer in asked(sample):
            if task == "which picture":
                checked += 1
                place_ = "first" if "first" in answer else "second"
                shown = names[place_ == "second"]
                assert f"a {shown}" in question
            elif task == "read one of two":
                which = 0 if "first" in question else 1
                assert answer == sample.pictures[which].truth.text
    assert checked


def test_a_table_is_asked_for_its_sums_and_comparisons() -> None:
    table = (("City", "Sales"), ("Oslo", "1,200"), ("Rome", "300"))
    picture = Picture(b"", (100, 100), Truth(table=table))
    pool = [q for seed in range(10) for q in questions(picture, np.random.default_rng(seed))]
    said = {(q.task, q.short) for q in pool}
    assert {("sum", "1500"), ("compare", "Oslo"), ("difference", "900")} <= said
    assert ("table", "City | Sales\nOslo | 1,200\nRome | 300") in said


def test_things_with_two_places_are_asked_for_all_of_them() -> None:
    pieces = (Piece("cat", (0, 0, 10, 10), "object"), Piece("cat", (50, 0, 60, 10), "object"))
    picture = Picture(b"", (100, 100), Truth(items=pieces))
    pool = questions(picture, np.random.default_rng(0))
    assert [q.short for q in pool] == ["[[000,000,100,100;500,000,600,100]]"]


@pytest.mark.parametrize("text", ["", "   "])
def test_nothing_to_ask_is_refused(text: str) -> None:
    empty = replace(dot("e"), pictures=(Picture(b"", (10, 10), Truth(text)),))
    (item,) = Compose()([empty])
    assert isinstance(item, Reject) and item.reason == "nothing to ask"


def test_text_that_looks_like_a_place_of_a_picture_is_refused() -> None:
    truth = Truth(facts=(Fact("value", "3", "<image>"),))
    sample = replace(dot("e"), pictures=(Picture(b"", (10, 10), truth),))
    (item,) = Compose(negatives=0, text_only=0)([sample])
    assert isinstance(item, Reject) and item.reason == "holds a picture mark"


def test_turns_that_are_there_stay() -> None:
    sample = composed(dots(1))[0]
    assert composed([sample]) == [sample]


def test_all_of_the_text_is_asked_for_last_or_first() -> None:
    where: dict[float, Counter[str]] = {}
    for first in (0.0, 0.5, 1.0):
        made = [s.tasks for s in composed(dots(60), turns=12, first=first) if len(s.tasks) > 1]
        made = [tasks for tasks in made if "read" in tasks]
        where[first] = Counter(
            "first" if tasks[0] == "read" else "last" if tasks[-1] == "read" else "between"
            for tasks in made
        )
        assert len(made) > 20
    assert set(where[0.0]) == {"last"} and set(where[1.0]) == {"first"}
    assert set(where[0.5]) == {"first", "last"}
