"""Counters and histograms in Prometheus' text format.  Knows neither engine nor routes.

Format: the text exposition format 0.0.4; names end in their unit, counters in ``_total``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_RATES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)

_OF_ENGINE = (  # name, kind, field of the engine's stats, help
    ("queue_length", "gauge", "queued", "Prompts that wait for a place."),
    ("running", "gauge", "running", "Answers under way."),
    ("slots", "gauge", "slots", "Places: answers that can be under way at once."),
    ("prompt_tokens_total", "counter", "prompt_tokens", "Tokens of prompts."),
    ("reused_tokens_total", "counter", "reused_tokens", "Of these, found in the prefix cache."),
    ("generated_tokens_total", "counter", "generated_tokens", "Tokens of answers."),
    ("image_cache_hits_total", "counter", "image_hits", "Pictures found in the cache."),
    ("image_cache_misses_total", "counter", "image_misses", "Pictures that were encoded."),
    ("answers_finished_total", "counter", "finished", "Answers that came to their end."),
    ("answers_cancelled_total", "counter", "cancelled", "Answers that were stopped from outside."),
    ("answers_failed_total", "counter", "failed", "Answers that ended with an error."),
    ("steps_total", "counter", "steps", "Steps of the model; one gives a token to each answer."),
    ("batched_tokens_total", "counter", "batched_tokens", "Answers in all these steps together."),
    ("draft_tokens_total", "counter", "draft_tokens", "Tokens of answers that were guessed."),
    ("accepted_tokens_total", "counter", "accepted_tokens", "Of these, what the model says too."),
)


class Histogram:
    """How often a value was up to each bound."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self.bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        """The text of this histogram."""
        yield from _head(self.name, "histogram", self.text)
        total = 0
        for bound, count in zip([*self.bounds, "+Inf"], self._counts, strict=True):
            total += count
            yield f'cogvlm_{self.name}_bucket{{le="{bound}"}} {total}'
        yield f"cogvlm_{self.name}_sum {self._sum:.6f}"
        yield f"cogvlm_{self.name}_count {total}"


class Metrics:
    """What a server counts itself; the rest comes from its engine."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()  # method, route, status
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request to its first token.", _SECONDS
        )
        self.answer = Histogram("answer_seconds", "From a request to its last token.", _SECONDS)
        self.speed = Histogram(
            "answer_tokens_per_second", "Of one answer, after its first token.", _RATES
        )

    def text(self, stats: Any, inflight: int) -> str:
        """Everything, ready to be sent; ``stats`` is the desk's."""
        lines = [*_head("requests_total", "counter", "Requests by route and status.")]
        for (method, route, status), count in sorted(self.requests.items()):
            labels = f'method="{method}",route="{route}",status="{status}"'
            lines.append(f"cogvlm_requests_total{{{labels}}} {count}")
        lines += _single("requests_in_flight", "gauge", "Requests for answers.", inflight)
        for name, kind, key, text in _OF_ENGINE:
            if hasattr(stats, key):  # a server elsewhere does not tell all of them
                lines += _single(name, kind, text, getattr(stats, key))
        if hasattr(stats, "steps"):
            mean = stats.batched_tokens / stats.steps if stats.steps else 0.0
            lines += _single("batch_size", "gauge", "Answers in a step, on the average.", mean)
        for histogram in (self.first_token, self.answer, self.speed):
            lines += histogram.lines()
        return "\n".join(lines) + "\n"


def _single(name: str, kind: str, text: str, value: float) -> list[str]:
    return [*_head(name, kind, text), f"cogvlm_{name} {value}"]


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP cogvlm_{name} {text}", f"# TYPE cogvlm_{name} {kind}"
