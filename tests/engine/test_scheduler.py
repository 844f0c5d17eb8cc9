"""Who joins, who leaves, who fails and who waits: the scheduler with a model of no model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvlm.engine.drafts import Drafts
from cogvlm.engine.sampling import Sampler, Sampling
from cogvlm.engine.scheduler import Request, Scheduler
from cogvlm.engine.ticket import Ticket
from cogvlm.engine.transcript import Transcript
from cogvlm.errors import InputError, ResourceError
from cogvlm.processor import Encoded
from engine.toys import EOS, Bytes

VOCABULARY = 300
OOM = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


class Seat:
    def __init__(self, text: str) -> None:
        self.left = [*Bytes().encode(text), EOS]
        self.text, self.reused = text, 0


class Fake:
    """A model whose prompt is what it answers; ``trouble`` may raise before anything is done."""

    most_ahead = 9

    def __init__(self) -> None:
        self.log: list[str] = []
        self.seated: list[Seat] = []
        self.kept: list[tuple[str, bool]] = []
        self.cleared = 0
        self.trouble: Callable[[str, list[str]], None] = lambda what, texts: None

    def start(self, prompt: Encoded) -> tuple[Seat, Tensor]:
        text = Bytes().decode(prompt.input_ids.tolist())
        self.trouble("start", [text])
        self.log.append(f"start {text}")
        seat = Seat(text)
        self.seated.append(seat)
        return seat, self.scores([seat])[0]

    def step(self, seats: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        texts = [seat.text for seat in seats]
        self.trouble("step", texts)
        assert all(seat in self.seated for seat in seats)
        for seat, token in zip(seats, tokens, strict=True):
            assert seat.left.pop(0) == token
        self.log.append("step " + "+".join(texts))
        return self.scores(seats)

    def ahead(self, seat: Any, tokens: Sequence[int]) -> Tensor:
        self.trouble("ahead", [seat.text])
        assert seat in self.seated and 1 < len(tokens) <= self.most_ahead
        self.log.append(f"ahead {seat.text} {len(tokens)}")
        logits = torch.zeros(len(tokens), VOCABULARY)
        for row in range(len(tokens)):  # behind a wrong token it says anything
            right = seat.left[: row + 1] == list(tokens[: row + 1])
            logits[row, seat.left[row + 1] if right else row] = 9.0
        return logits

    def add(self, seat: Any, token: int) -> None:
        assert seat in self.seated
        assert seat.left.pop(0) == token

    def stop(self, seat: Any, keep: bool = True) -> None:
        self.seated.remove(seat)
        self.kept.append((seat.text, keep))

    def clear(self) -> None:
        self.cleared += 1

    def scores(self, seats: Sequence[Any]) -> Tensor:
        logits = torch.zeros(len(seats), VOCABULARY)
        for row, seat in enumerate(seats):
            logits[row, seat.left[0]] = 9.0
        return logits


class Bench:
    """A scheduler over a fake, and what was asked of it."""

    def __init__(self, slots: int = 2, most: int = 9, prefill: int = 1) -> None:
        self.fake = Fake()
        self.scheduler = Scheduler(self.fake, slots, most, prefill)

    def ask(self, text: str, limit: int = 99, told: str | None = None) -> Ticket:
        """Have ``text`` said; guessed from ``told``, if that is given."""
        ids = np.array(Bytes().encode(text), dtype=np.int64)
        ticket = Ticket(len(ids), self.scheduler.withdraw)
        request = Request(
            Encoded(ids, np.zeros_like(ids), []),
            Sampler(Sampling(), ids.tolist()),
            Transcript(Bytes(), (), True),
            ticket,
            limit,
            Bytes().decode,
            frozenset({EOS}),
            None if told is None else Drafts(Bytes().encode(told), 8),
        )
        if not self.scheduler.submit(request):
            raise ResourceError("full")
        return ticket

    def run(self) -> None:
        for _ in range(1000):
            if not self.scheduler.turn():
                return
        raise AssertionError("it never ends")


def said(ticket: Ticket) -> str:
    """The whole answer, which must be complete; its pieces must be it."""
    assert ticket.complete
    assert "".join(piece.text for piece in ticket) == ticket.answer.text
    return ticket.answer.text


def test_nothing_to_do_is_said() -> None:
    assert Bench().scheduler.turn() is False


def test_one_request_is_answered_piece_by_piece() -> None:
    bench = Bench()
    ticket = bench.ask("abc")
    assert bench.scheduler.turn()
    assert [p.text for p in ticket.poll() or []] == ["a", "b"]  # a prefill and a step a turn
    assert not ticket.complete
    bench.run()
    assert "".join(p.text for p in ticket) == "c"
    answer = ticket.answer
    assert (answer.text, answer.stop, answer.ids) == ("abc", "end", tuple(Bytes().encode("abc")))
    assert answer.first_token_s > 0
    assert ticket.poll() is None
    assert bench.fake.kept == [("abc", True)]


def test_a_newcomer_joins_between_steps_and_a_finished_one_leaves_at_once() -> None:
    bench = Bench(slots=2)
    first = bench.ask("abcd")
    bench.scheduler.turn()
    second, third = bench.ask("x"), bench.ask("yz")
    bench.run()
    assert [said(t) for t in (first, second, third)] == ["abcd", "x", "yz"]
    assert bench.fake.log == [
        "start abcd",
        "step abcd",
        "start x",
        "step abcd+x",  # which ends x, and the next turn has a row for yz
        "start yz",
        "step abcd+yz",
        "step abcd+yz",
    ]
    tally = bench.scheduler.tally
    assert (tally.finished, tally.steps, tally.batched_tokens) == (3, 4, 7)
    assert (tally.prompt_tokens, tally.generated_tokens) == (7, 10)


def test_those_that_wait_are_taken_in_their_order_one_prefill_a_step() -> None:
    bench = Bench(slots=3)
    tickets = [bench.ask(text) for text in ("aaa", "bbb", "ccc", "ddd")]
    bench.run()
    assert [said(t) for t in tickets] == ["aaa", "bbb", "ccc", "ddd"]
    starts = [i for i, line in enumerate(bench.fake.log) if line.startswith("start")]
    assert [bench.fake.log[i][-3:] for i in starts] == ["aaa", "bbb", "ccc", "ddd"]
    assert all(b - a > 1 for a, b in pairwise(starts))


def test_short_ones_join_together_as_far_as_the_budget_goes() -> None:
    bench = Bench(slots=4, prefill=6)
    for text in ("aaa", "bbb", "cc", "ddddddddd", "eee"):
        bench.ask(text)
    bench.scheduler.turn()
    assert bench.fake.log == ["start aaa", "start bbb", "step aaa+bbb"]
    bench.scheduler.turn()  # what does not fit beside cc waits, and nobody overtakes it
    assert bench.fake.log[3:] == ["start cc", "step aaa+bbb+cc"]
    bench.scheduler.turn()  # alone, one may be longer than the budget
    assert bench.fake.log[5] == "start ddddddddd"
    bench.run()
    assert bench.scheduler.tally.finished == 5


def test_what_is_known_from_before_does_not_use_up_the_budget() -> None:
    bench = Bench(slots=4, prefill=6)
    start = bench.fake.start

    def known(prompt: Encoded) -> tuple[Seat, Tensor]:
        seat, scores = start(prompt)
        seat.reused = len(prompt.input_ids) - 1
        return seat, scores

    bench.fake.start = known  # type: ignore[method-assign]
    for text in ("aaaa", "bbbb", "cccc", "dddd"):
        bench.ask(text)
    bench.scheduler.turn()  # 1 + 1 + 4 <= 6 < 3 + 4
    assert bench.fake.log == ["start aaaa", "start bbbb", "start cccc", "step aaaa+bbbb+cccc"]


def test_failing_newcomers_use_up_the_budget_and_cancelled_ones_do_not() -> None:
    bench = Bench(slots=4, prefill=4)

    def trouble(what: str, texts: list[str]) -> None:
        if texts == ["bad"]:
            raise KeyError("from inside")

    bench.fake.trouble = trouble
    bad, good = bench.ask("bad"), bench.ask("good")
    bench.scheduler.turn()
    assert bad.complete
    assert bench.fake.log == []
    bench.run()
    assert said(good) == "good"


def test_the_queue_has_an_end_and_rows_are_never_more_than_slots() -> None:
    bench = Bench(slots=1, most=2)
    bench.ask("ab")
    bench.scheduler.turn()
    bench.ask("c")
    bench.ask("d")
    with pytest.raises(ResourceError, match="full"):
        bench.ask("e")
    bench.run()
    assert not any("+" in line for line in bench.fake.log)
    assert bench.scheduler.tally.finished == 3


def test_cancelled_in_the_queue_it_is_gone_at_once() -> None:
    bench = Bench(slots=1)
    first, second = bench.ask("ab"), bench.ask("cd")
    second.cancel()
    assert second.answer.stop == "cancelled"
    assert list(second) == []
    second.cancel()  # again changes nothing
    bench.run()
    assert said(first) == "ab"
    assert "start cd" not in bench.fake.log
    assert (bench.scheduler.tally.cancelled, bench.scheduler.tally.finished) == (1, 1)


def test_cancelled_in_its_prefill_it_takes_no_step() -> None:
    bench = Bench()
    ticket = bench.ask("ab")
    bench.fake.trouble = lambda what, texts: ticket.cancel() if what == "start" else None
    bench.run()
    assert (said(ticket), ticket.answer.stop) == ("", "cancelled")
    assert bench.fake.log == ["start ab"]
    assert bench.fake.seated == []


def test_cancelled_while_decoding_it_gives_what_there_is() -> None:
    bench = Bench()
    first, second = bench.ask("abcdef"), bench.ask("uvwxyz")
    bench.scheduler.turn()
    bench.scheduler.turn()
    first.cancel()
    bench.run()
    assert (said(first), first.answer.stop) == ("abc", "cancelled")
    assert said(second) == "uvwxyz"
    assert ("abcdef", True) in bench.fake.kept
    first.cancel()  # afterwards changes nothing
    assert first.answer.stop == "cancelled"


def test_a_failing_prefill_fails_its_request_alone() -> None:
    bench = Bench()

    def trouble(what: str, texts: list[str]) -> None:
        if what == "start" and texts == ["bad"]:
            raise KeyError("from inside")

    bench.fake.trouble = trouble
    tickets = [bench.ask(text) for text in ("abc", "bad", "xyz")]
    bench.run()
    assert [said(tickets[0]), said(tickets[2])] == ["abc", "xyz"]
    with pytest.raises(KeyError, match="from inside"):
        list(tickets[1])
    with pytest.raises(KeyError, match="from inside"):
        _ = tickets[1].answer
    assert bench.scheduler.tally.failed == 1


def test_a_failing_step_fails_the_one_that_makes_it_fail() -> None:
    bench = Bench(slots=3)

    def trouble(what: str, texts: list[str]) -> None:
        if what == "step" and "bad" in texts:
            raise RuntimeError("from inside")

    bench.fake.trouble = trouble
    tickets = [bench.ask(text) for text in ("abcdef", "bad", "uvwxyz")]
    bench.run()
    assert [said(tickets[0]), said(tickets[2])] == ["abcdef", "uvwxyz"]
    pieces = iter(tickets[1])
    assert next(pieces).text == "b"  # what was there comes before the error
    with pytest.raises(RuntimeError, match="from inside"):
        next(pieces)
    assert bench.fake.kept.count(("bad", False)) == 1
    assert bench.fake.seated == []


def test_memory_that_does_not_suffice_is_sought_in_what_is_kept_and_then_told() -> None:
    bench = Bench()

    def once(what: str, texts: list[str]) -> None:
        if not bench.fake.cleared:
            raise RuntimeError(OOM)

    bench.fake.trouble = once
    ticket = bench.ask("abc")
    bench.run()
    assert said(ticket) == "abc"
    assert bench.fake.cleared == 1

    def always(what: str, texts: list[str]) -> None:
        if what == "step" and texts == ["big"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(texts) > 1 and "big" in texts:
            raise MemoryError

    bench.fake.trouble = always
    small, big = bench.ask("small"), bench.ask("big")
    bench.run()
    assert said(small) == "small"
    with pytest.raises(ResourceError, match="out of memory with 4 tokens of prompt and answer"):
        list(big)


def test_scores_that_are_no_numbers_fail_their_request_alone() -> None:
    bench = Bench()
    scores = bench.fake.scores

    def broken(seats: Sequence[Any]) -> Tensor:
        logits = scores(seats)
        for row, seat in enumerate(seats):
            if seat.text == "bad" and len(seat.left) < 3:
                logits[row] = torch.nan
        return logits

    bench.fake.scores = broken  # type: ignore[method-assign]
    good, bad = bench.ask("abcd"), bench.ask("bad")
    bench.run()
    assert said(good) == "abcd"
    with pytest.raises(ResourceError, match="not numbers"):
        list(bad)
    assert ("bad", False) in bench.fake.kept


def test_the_limit_and_a_loop_end_an_answer() -> None:
    bench = Bench()
    short, loop = bench.ask("abcdef", limit=3), bench.ask("n" + "xy" * 60, limit=500)
    bench.run()
    assert (said(short), short.answer.stop) == ("abc", "length")
    assert (said(loop), loop.answer.stop) == ("nxy", "repetition")


def test_our_own_mistake_reaches_everybody() -> None:
    bench = Bench(slots=1)
    tickets = [bench.ask("ab"), bench.ask("cd")]
    bench.scheduler.turn()
    bench.scheduler.fail_all(InputError("broken"))
    for ticket in tickets:
        with pytest.raises(InputError, match="broken"):
            list(ticket)
    assert bench.scheduler.turn() is False
    assert bench.fake.seated == []


def test_all_can_be_sent_home() -> None:
    bench = Bench(slots=1)
    tickets = [bench.ask("abcd"), bench.ask("cd")]
    bench.scheduler.turn()
    bench.scheduler.cancel_all()
    assert [said(t) for t in tickets] == ["ab", ""]
    assert {t.answer.stop for t in tickets} == {"cancelled"}
    assert bench.scheduler.turn() is False


def test_who_listens_is_called_and_may_fail() -> None:
    bench = Bench()
    ticket = bench.ask("ab")
    calls: list[str] = []

    def broken() -> None:
        calls.append("broken")
        raise RuntimeError("the loop is closed")

    ticket.on_event(broken)
    ticket.on_event(lambda: calls.append("good"))
    bench.run()
    assert calls.count("broken") == 1
    assert calls.count("good") == 3  # two pieces and the end
    late: list[int] = []
    ticket.on_event(lambda: late.append(1))
    assert late == [1]


def test_an_answer_is_there_only_when_it_is_complete() -> None:
    ticket = Bench().ask("ab")
    with pytest.raises(InputError, match="not complete"):
        _ = ticket.answer
    assert ticket.poll() == []


def test_reading_waits_for_another_thread() -> None:
    bench = Bench()
    ticket = bench.ask("abc")
    thread = threading.Thread(target=bench.run)
    thread.start()
    assert "".join(piece.text for piece in ticket) == "abc"
    thread.join()


SAID = "abcdefghijklmnopqrstuvwxyz"


def test_what_was_told_is_quoted_in_few_steps() -> None:
    bench = Bench()
    ticket = bench.ask(SAID, told=SAID)
    bench.run()
    assert (said(ticket), ticket.answer.stop) == (SAID, "end")
    aheads = [entry for entry in bench.fake.log if entry.startswith("ahead")]
    assert aheads == [f"ahead {SAID} {n}" for n in (4, 8, 9, 9)]
    tally = bench.scheduler.tally
    assert (tally.draft_tokens, tally.accepted_tokens) == (26, 21)
    assert (tally.steps, tally.generated_tokens) == (5, len(SAID) + 1)


@pytest.mark.parametrize("told", ["", "abcXefghi", "ab" * 9, "bcdbcdbce", "yzyz", "abcdefghijklmn"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 11, 99])
def test_wrong_guesses_change_nothing(told: str, limit: int) -> None:
    plain, guessing = Bench(), Bench()
    expected, ticket = plain.ask(SAID, limit), guessing.ask(SAID, limit, told)
    plain.run()
    guessing.run()
    assert said(ticket) == said(expected)
    assert ticket.answer == expected.answer
    tally = guessing.scheduler.tally
    assert tally.generated_tokens == plain.scheduler.tally.generated_tokens
    assert guessing.fake.kept == [(SAID, True)] and not guessing.fake.seated


def test_those_that_are_together_are_not_guessed() -> None:
    bench = Bench()
    tickets = [bench.ask(text, told=text) for text in ("abcdefghij", "klmnopqrstuvw")]
    bench.run()
    assert [said(ticket) for ticket in tickets] == ["abcdefghij", "klmnopqrstuvw"]
    log = bench.fake.log
    first = next(i for i, entry in enumerate(log) if entry.startswith("ahead"))
    assert first > max(i for i, entry in enumerate(log) if "+" in entry)


def test_where_several_tokens_fail_one_goes_on() -> None:
    bench = Bench()

    def trouble(what: str, texts: list[str]) -> None:
        if what == "ahead":
            raise RuntimeError(OOM)

    bench.fake.trouble = trouble
    ticket = bench.ask(SAID, told=SAID)
    bench.run()
    assert said(ticket) == SAID
    assert bench.scheduler.tally.draft_tokens == bench.scheduler.tally.failed == 0


def test_a_guess_beyond_a_stop_is_not_kept() -> None:
    bench = Bench()
    ticket = bench.ask("abab" * 20 + "end", told="")
    bench.run()
    assert ticket.answer.stop == "repetition"
    assert said(ticket) == "ab"
    assert [keep for _, keep in bench.fake.kept] == [True]
