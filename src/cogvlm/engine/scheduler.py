"""Which request takes which step: a queue, rows that are being decoded, and turns.

Knows neither model nor threads of its own; ``turn`` is called by one thread, ``submit`` and
``withdraw`` by any. A turn::

    leave    cancelled requests give their row back
    join     the oldest that wait, as rows are free, are prefilled and have their first tokens
    step     every row gets one token, a row alone perhaps several, which are guessed and checked
             (drafts.py); those at their end leave at once

Those that decode wait in a turn for one newcomer, or for several that are short together: a long
prompt delays them by itself alone, and a burst of short ones does not leave rows empty.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from ..errors import ResourceError
from ..processor import Encoded
from .drafts import Drafts
from .generate import Answer, Stop, is_memory_error
from .runner import Runner, Seat
from .sampling import Sampler, logprob_of
from .ticket import Ticket
from .transcript import Transcript

T = TypeVar("T")

PREFILL = 512  # tokens


@dataclass(eq=False)
class Request:
    """One request on its way."""

    prompt: Encoded
    sampler: Sampler
    transcript: Transcript
    ticket: Ticket
    limit: int  # tokens of the answer
    decode: Callable[[list[int]], str]
    end: frozenset[int]
    drafts: Drafts | None = None
    seat: Seat | None = None
    token: int = 0  # the newest, which the model has not seen yet
    first_token_s: float = 0.0

    def take(self, logits: Tensor, best: int) -> Stop | None:
        """Choose the next token of ``float32[V]``; why the answer ends, if it does."""
        sampling = self.sampler.sampling
        token = self.sampler.choose(logits, best)
        if not self.first_token_s:
            self.first_token_s = time.monotonic() - self.ticket.created
        if token in self.end:
            return "end"
        self.token = token
        if self.drafts is not None:
            self.drafts.add(token)
        wanted = sampling.logprobs
        note = None if wanted is None else logprob_of(logits, token, wanted, self.decode)
        found = self.transcript.add(token, note)
        if found is not None:
            return "stop" if found == "stop" else "repetition"
        constraint = self.sampler.constraint
        if constraint is not None and constraint.take(token):
            return "end"
        return "length" if len(self.transcript.ids) >= self.limit else None

    def guess(self) -> list[int]:
        """Tokens that may come after the newest one, fewer than there is room for."""
        room = self.limit - len(self.transcript.ids) - 1
        return self.drafts.guess(room) if self.drafts is not None and room > 0 else []

    def unwanted(self) -> bool:
        """Whether it was cancelled, which another thread may do at any time."""
        return self.ticket.cancelled

    def show(self) -> None:
        """Hand out what is certain."""
        piece = self.transcript.fresh()
        if piece is not None:
            self.ticket.give(piece)

    def finish(self, stop: Stop) -> None:
        """Hand out the rest, and the answer."""
        text = self.transcript
        if stop not in ("stop", "repetition") and text.finish():
            stop = "stop"
        piece = text.fresh(last=True)
        if piece is not None:
            self.ticket.give(piece)
        reused = self.seat.reused if self.seat is not None else 0
        self.ticket.close(
            Answer(
                text.text, tuple(text.ids), stop, reused, self.first_token_s, tuple(text.logprobs)
            )
        )


@dataclass(frozen=True)
class Tally:
    """What was done so far."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    reused_tokens: int = 0
    steps: int = 0
    batched_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass
class Scheduler:
    """See the module.

    Args:
        runner: of the model.
        slots: rows at once.
        most: requests that may wait.
        prefill: tokens of prompts that newcomers of one turn may have together; one alone may have
            more. Those that the runner had from before do not count, once that is known.
    """

    runner: Runner
    slots: int
    most: int
    prefill: int = PREFILL
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def submit(self, request: Request) -> bool:
        """Put a request into the queue; false if that is full."""
        with self.changed:
            if len(self.waiting) >= self.most:
                return False
            self.waiting.append(request)
            self.changed.notify_all()
        return True

    def withdraw(self, ticket: Ticket) -> None:
        """End a request that waits; one that runs leaves in the next turn."""
        with self.changed:
            found = next((r for r in self.waiting if r.ticket is ticket), None)
            if found is not None:
                self.waiting.remove(found)
            self.changed.notify_all()
        if found is not None:
            self._end(found, "cancelled")

    def turn(self) -> bool:
        """See the module; false if there was nothing to do."""
        for request in [r for r in self.running if r.ticket.cancelled]:
            self._leave(request, "cancelled")
        joined = self._admit()
        busy = joined or bool(self.running)
        if self.running:
            self._step()
        return busy

    def fail_all(self, error: BaseException) -> None:
        """Our own mistake: everybody hears of it, and nothing is left."""
        with self.changed:
            waiting = list(self.waiting)
            self.waiting.clear()
        for request in [*self.running, *waiting]:
            self._fail(request, error)

    def cancel_all(self) -> None:
        """Nothing goes on: everybody gets what there is."""
        with self.changed:
            waiting = list(self.waiting)
            self.waiting.clear()
        for request in waiting:
            self._end(request, "cancelled")
        for request in list(self.running):
            self._leave(request, "cancelled")

    def _admit(self) -> bool:
        """Let newcomers join; whether there was one."""
        left: float = math.inf  # for the first
        joined = False
        while (newcomer := self._next(left)) is not None:
            left = min(left, self.prefill) - self._join(newcomer)
            joined = True
        return joined

    def _next(self, tokens: float) -> Request | None:
        """The oldest that waits, if there is a row for it and it has no more than ``tokens``."""
        with self.changed:
            if not self.waiting or len(self.running) >= self.slots:
                return None
            if len(self.waiting[0].prompt.input_ids) > tokens:
                return None
            newcomer = self.waiting.popleft()
            self.running.append(newcomer)  # at once: no moment in which it is nowhere
        return newcomer

    def _join(self, request: Request) -> int:
        """Prefill; how many tokens that took."""
        tokens = len(request.prompt.input_ids)
        if request.unwanted():
            self._leave(request, "cancelled")
            return 0
        try:
            seat, logits = self._with_memory(lambda: self.runner.start(request.prompt))
        except Exception as error:
            self._fail(request, error)
            return tokens
        request.seat = seat
        if request.unwanted():
            self._leave(request, "cancelled")
            return tokens - seat.reused
        self._count(prompt_tokens=tokens, reused_tokens=seat.reused)
        self._choose([request], logits[None])
        return tokens - seat.reused

    def _step(self) -> None:
        together = list(self.running)
        if len(together) == 1 and self._ahead(together[0]):
            return
        logits = None
        if len(together) > 1:
            with contextlib.suppress(Exception):
                logits = self._decode(together)
        if logits is not None:
            self._choose(together, logits)
            return
        # Where it failed, it may be one of them or all together: each alone shows which.
        for request in together:
            try:
                alone = self._with_memory(lambda r=request: self._decode([r]))  # type: ignore[misc]
            except Exception as error:
                self._fail(request, error)
            else:
                self._choose([request], alone)

    def _ahead(self, request: Request) -> bool:
        """Several tokens of one that is alone; false if nothing was guessed, or it failed."""
        seat, drafts, guess = request.seat, request.drafts, request.guess()
        if seat is None or drafts is None or not guess:
            return False
        tokens = [request.token, *guess]
        try:
            logits = self.runner.ahead(seat, tokens)
        except Exception:  # alone and token by token it may go on, or says what is wrong
            request.drafts = None
            return False
        self._count(steps=1, batched_tokens=1)
        right = -1
        for token, scores in zip(tokens, logits, strict=True):
            if token != request.token:
                break
            right += 1
            self.runner.add(seat, token)
            self._choose([request], scores[None])
            if request not in self.running:
                break
        drafts.learn(right, len(guess))
        self._count(draft_tokens=len(guess), accepted_tokens=right)
        return True

    def _decode(self, requests: list[Request]) -> Tensor:
        seats = [r.seat for r in requests if r.seat is not None]
        logits = self.runner.step(seats, [r.token for r in requests])
        self._count(steps=1, batched_tokens=len(requests))
        return logits

    def _choose(self, requests: list[Request], logits: Tensor) -> None:
        """Give every request its next token of ``float32[b, V]``."""
        highest, best = logits.max(dim=-1)
        usable = (~highest.isnan()).tolist()
        rows = zip(requests, logits, best.tolist(), usable, strict=True)
        for request, scores, likeliest, good in rows:
            self._count(generated_tokens=1)
            try:
                if not good:
                    raise ResourceError(
                        "the model's scores are not numbers; load it in another precision, "
                        "for example --precision float32"
                    )
                stop = request.take(scores, likeliest)
                if stop is None:
                    request.show()
            except Exception as error:
                self._fail(request, error)
                continue
            if stop is not None:
                self._leave(request, stop)

    def _with_memory(self, work: Callable[[], T]) -> T:
        """Do it; where memory does not suffice, once more without what is only kept."""
        try:
            return work()
        except Exception as error:
            if not is_memory_error(error):
                raise
        self.runner.clear()
        return work()

    def _leave(self, request: Request, stop: Stop) -> None:
        """Out of its row, then to its end: who waits for the answer finds the row free."""
        try:
            self._stand_up(request, keep=True)
        finally:
            self._end(request, stop)

    def _end(self, request: Request, stop: Stop) -> None:
        if stop == "cancelled":
            self._count(cancelled=1)
        else:
            self._count(finished=1)
        request.finish(stop)

    def _fail(self, request: Request, error: BaseException) -> None:
        if is_memory_error(error):
            length = len(request.prompt.input_ids) + len(request.transcript.ids)
            told = ResourceError(
                f"out of memory with {length} tokens of prompt and answer; use smaller or fewer "
                "pictures, fewer slots, --precision bfloat16, or another device"
            )
            told.__cause__ = error.with_traceback(None)  # which would keep tensors alive
            error = told
        with contextlib.suppress(Exception):  # the first error is the one to tell
            self._stand_up(request, keep=False)
        self._count(failed=1)
        request.ticket.close(None, error)

    def _stand_up(self, request: Request, keep: bool) -> None:
        if request in self.running:
            self.running.remove(request)
        if request.seat is not None:
            self.runner.stop(request.seat, keep)

    def _count(self, **more: int) -> None:
        with self.changed:
            now = {name: getattr(self.tally, name) + count for name, count in more.items()}
            self.tally = replace(self.tally, **now)
