"""The engine: one model, one thread that runs it, and any number of callers.

::

    submit (any thread) -> queue -> Scheduler (the model's thread) -> Ticket -> caller

Knows prompts as the processor encodes them, nothing of their form or of any protocol.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

from ..errors import ConfigError, InputError, ResourceError
from ..linear import FEW
from ..load import Loaded
from ..processor import Encoded
from ..settings import require
from .drafts import Drafts
from .generate import Answer, end_ids, room_left
from .grammar import Grammar, Grammars
from .runner import ModelRunner
from .sampling import Sampler, Sampling, TokenLogprob
from .scheduler import Request, Scheduler
from .ticket import Ticket
from .transcript import Piece, Transcript

__all__ = [
    "Answer",
    "Busy",
    "Engine",
    "EngineStats",
    "Grammar",
    "Piece",
    "Sampling",
    "Ticket",
    "TokenLogprob",
]

MIB = 2**20
DRAFTS = FEW - 2  # with the newest token, as many as every kernel for a few rows takes


class Busy(ResourceError):
    """The engine takes no request now: its queue is full, or it is closing."""


@dataclass(frozen=True)
class EngineStats:
    """What the engine does and did, at one moment.

    ``batched_tokens / steps`` is the mean number of answers that went on together.
    """

    slots: int
    queued: int
    running: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    generated_tokens: int  # those that end an answer are counted too
    reused_tokens: int  # of the prompt tokens, those that were not computed again
    image_hits: int  # pictures that did not have to be encoded
    image_misses: int
    steps: int
    batched_tokens: int
    draft_tokens: int  # see engine/drafts.py
    accepted_tokens: int


class Engine:
    """Answers many requests with one model, together.

    Args:
        loaded: model and processor; nobody else may run the model while the engine is open.
        slots: answers at once.
        queue: requests that may wait.
        context: tokens that one prompt and its answer may have; none: what the model allows.
        prefix_bytes: memory for keys and values of earlier prompts and answers.
        image_bytes: memory for features of earlier pictures.
        drafts: tokens that may be guessed and checked together while one answer is alone (see
            ``engine/drafts.py``); 0: none.

    Raises:
        ConfigError: a value is out of its range.
        InputError: the model's attention cannot be used.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        slots: int = 8,
        queue: int = 64,
        context: int | None = None,
        prefix_bytes: int = 512 * MIB,
        image_bytes: int = 256 * MIB,
        drafts: int = DRAFTS,
    ) -> None:
        require("slots", slots, int, 1, 1024)
        require("queue", queue, int, 1, math.inf)
        require("prefix_bytes", prefix_bytes, int, 0, math.inf)
        require("image_bytes", image_bytes, int, 0, math.inf)
        require("drafts", drafts, int, 0, DRAFTS)
        if context is not None:
            require("context", context, int, 2, math.inf)
        self._loaded, self._context = loaded, context
        self._end = end_ids(loaded)
        self._vocabulary = loaded.model.model.embed_tokens.num_embeddings
        self._grammars = Grammars(loaded.processor.tokenizer, self._vocabulary, self._end)
        self._runner = ModelRunner(loaded, slots, prefix_bytes, image_bytes)
        self._scheduler = Scheduler(self._runner, slots, queue)
        self._drafts = min(drafts, self._runner.most_ahead - 1)
        self._closing = self._stopped = self._over = False
        self._thread = threading.Thread(target=self._work, name="cogvlm-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Encoded, sampling: Sampling | None = None) -> Ticket:
        """Take a request; returns at once.

        Args:
            prompt: of this model's processor.
            sampling: how to answer; default greedy, 256 tokens.

        Raises:
            Busy: the queue is full, or the engine is closing.
            InputError: the prompt leaves no room for an answer, a biased token does not exist, or
                the grammar cannot be compiled, or not for this tokenizer.
            ResourceError: a grammar is asked for, and llguidance is not installed.
        """
        sampling = sampling or Sampling()
        limit = self._limit(prompt, sampling)
        self._check_bias(sampling)
        # Before compiling, which takes long; the queue may still fill until the end of it.
        if self._closing:
            raise Busy("the engine is closing and takes no more requests")
        constraint = None if sampling.grammar is None else self._grammars.compile(sampling.grammar)
        processor = self._loaded.processor
        ticket = Ticket(len(prompt.input_ids), self._scheduler.withdraw)
        ids = prompt.input_ids.tolist()
        request = Request(
            prompt=prompt,
            sampler=Sampler(sampling, ids, constraint),
            transcript=Transcript(processor.tokenizer, sampling.stop, sampling.repetition_stop),
            ticket=ticket,
            limit=limit,
            decode=processor.decode,
            end=self._end,
            drafts=Drafts(ids, self._drafts) if self._drafts else None,
        )
        with self._scheduler.changed:
            if self._closing:
                raise Busy("the engine is closing and takes no more requests")
            if not self._scheduler.submit(request):
                raise Busy(
                    f"{self._scheduler.most} requests are waiting already, which is the limit; "
                    "try again in a moment"
                )
        return ticket

    def close(self, wait: float = 0.0) -> None:
        """Take no more requests, give those that are here ``wait`` seconds, cancel the rest.

        Cancelled ones have an answer: what there is, with ``stop="cancelled"``. May be called
        again, from any thread.
        """
        changed = self._scheduler.changed
        deadline = time.monotonic() + wait
        with changed:
            self._closing = True
            changed.notify_all()
            while not self._over and (left := deadline - time.monotonic()) > 0:
                changed.wait(min(left, 1.0))
            self._stopped = True
            changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> EngineStats:
        """Numbers of this moment."""
        scheduler = self._scheduler
        with scheduler.changed:
            counts, tally = self._runner.counts, scheduler.tally
            return EngineStats(
                slots=scheduler.slots,
                queued=len(scheduler.waiting),
                running=len(scheduler.running),
                image_hits=counts.image_hits,
                image_misses=counts.image_misses,
                **vars(tally),
            )

    def _limit(self, prompt: Encoded, sampling: Sampling) -> int:
        """Tokens that the answer may have."""
        tokens = len(prompt.input_ids)
        room = room_left(self._loaded, self._loaded.processor.batch([prompt]))
        limit = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room)
        if self._context is None:
            return limit
        if tokens >= self._context:
            raise InputError(
                f"the prompt has {tokens} tokens, the engine takes {self._context} for prompt and "
                "answer; shorten the text or give fewer or smaller pictures"
            )
        return min(limit, self._context - tokens)

    def _check_bias(self, sampling: Sampling) -> None:
        wrong = [token for token in sampling.logit_bias if token >= self._vocabulary]
        if wrong:
            raise ConfigError(
                f"logit_bias: there is no token {wrong[0]}; the model has {self._vocabulary}"
            )

    def _work(self) -> None:
        """The model's thread."""
        scheduler = self._scheduler
        while not self._stopped:
            try:
                busy = scheduler.turn()
            except BaseException as error:  # our own mistake; whoever waits must hear of it
                scheduler.fail_all(error)
                continue
            with scheduler.changed:
                if busy or self._stopped or scheduler.waiting:
                    continue
                if self._closing:
                    break
                scheduler.changed.wait(timeout=60.0)
        try:
            scheduler.cancel_all()
        except BaseException as error:
            scheduler.fail_all(error)
        with scheduler.changed:
            self._over = True
            scheduler.changed.notify_all()
