"""How the next token of one answer is chosen from the model's scores.

Knows token ids and scores, neither text nor other answers.  ``V`` vocabulary.

The scores of a step go through, in this order::

    repetition penalty -> presence, frequency -> bias -> grammar -> temperature
        -> top-k -> top-p -> min-p -> one draw

Sources: repetition penalty CTRL (1909.05858), over prompt and answer as in transformers; presence
and frequency OpenAI's, over the answer; min-p 2407.01082.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, ResourceError
from ..settings import require

if TYPE_CHECKING:
    from .grammar import Constraint, Grammar

_MOST_STOPS = 64
_MOST_LOGPROBS = 100
_HEAD = 1024  # so many of the likeliest tokens usually hold top_p; sorting them all takes long


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen and where it ends.

    Raises:
        ConfigError: a value is out of its range; the field is named.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    top_k: int = 0  # sample from so many tokens; 0: all
    min_p: float = 0.0  # leave out what is less likely than this share of the likeliest token
    seed: int | None = None  # the same seed and prompt give the same tokens in any company
    repetition_penalty: float = 1.0  # above 1: less of what prompt and answer have already
    presence_penalty: float = 0.0  # taken off tokens that the answer has
    frequency_penalty: float = 0.0  # taken off for every time that the answer has them
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    logprobs: int | None = None  # give the logprob of every token, and of so many alternatives
    repetition_stop: bool = True  # end an answer that repeats itself, and keep one copy
    grammar: Grammar | None = None  # the answer must fit it

    def __post_init__(self) -> None:
        number = (int, float)
        require("max_new_tokens", self.max_new_tokens, int, 1, math.inf)
        require("temperature", self.temperature, number, 0.0, 100.0)
        require("top_p", self.top_p, number, 0.0, 1.0)
        require("top_k", self.top_k, int, 0, math.inf)
        require("min_p", self.min_p, number, 0.0, 1.0)
        require("repetition_penalty", self.repetition_penalty, number, 0.01, 100.0)
        require("presence_penalty", self.presence_penalty, number, -100.0, 100.0)
        require("frequency_penalty", self.frequency_penalty, number, -100.0, 100.0)
        if self.top_p == 0.0:
            raise ConfigError("top_p=0 leaves no token; for greedy decoding say temperature=0")
        if self.seed is not None:
            require("seed", self.seed, int, 0, 2**63 - 1)
        if self.logprobs is not None:
            require("logprobs", self.logprobs, int, 0, _MOST_LOGPROBS)
        if not isinstance(self.repetition_stop, bool):
            raise ConfigError(f"repetition_stop={self.repetition_stop!r} is not true or false")
        self._check_bias()
        self._check_stop()

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(
                f"logit_bias={self.logit_bias!r} is not a table of token ids to biases"
            )
        for token, bias in self.logit_bias.items():
            require("logit_bias: token", token, int, 0, math.inf)
            require(f"logit_bias[{token}]", bias, (int, float), -1000.0, 1000.0)

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError(f"stop={self.stop!r} is not a tuple of texts, none of them empty")
        if len(self.stop) > _MOST_STOPS:
            raise ConfigError(f"stop has {len(self.stop)} texts; give {_MOST_STOPS} at most")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the model's own scores is the one."""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1.0
            and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)
            and self.grammar is None
        )


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token and how likely the model held it, before any setting changed the odds."""

    id: int
    text: str
    logprob: float  # natural logarithm
    top: tuple[tuple[int, str, float], ...]  # (id, text, logprob), the likeliest first


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: the settings.
        prompt: ids of the prompt.
        constraint: of the grammar, if there is one.
    """

    def __init__(
        self, sampling: Sampling, prompt: Iterable[int], constraint: Constraint | None = None
    ) -> None:
        self.sampling, self.constraint = sampling, constraint
        self._prompt = prompt if sampling.repetition_penalty != 1.0 else ()
        self._seen: Tensor | None = None  # bool[V], of prompt and answer
        self._counts: Tensor | None = None  # float[V], of the answer
        # On the CPU, so that a seed means the same on every device.
        self._chance = torch.Generator()
        if sampling.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(sampling.seed)

    def choose(self, logits: Tensor, best: int | None = None) -> int:
        """The next token of scores ``float32[V]``; they are not changed.

        Args:
            logits: of this step.
            best: the likeliest token, where the caller knows it.

        Raises:
            ResourceError: the scores are no numbers.
        """
        sampling = self.sampling
        if sampling.plain:
            return int(logits.argmax()) if best is None else best
        scores = self._adjust(logits)
        token = int(scores.argmax()) if sampling.temperature == 0 else self._draw(scores)
        self._note(token)
        return token

    def _adjust(self, logits: Tensor) -> Tensor:
        sampling, scores = self.sampling, logits.clone()
        if sampling.repetition_penalty != 1.0:
            penalty = sampling.repetition_penalty
            harder = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self._all_seen(logits), harder, scores)
        if sampling.presence_penalty or sampling.frequency_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            scores -= sampling.frequency_penalty * self._counts
            scores -= sampling.presence_penalty * (self._counts > 0)
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        if self.constraint is not None:
            scores[~self.constraint.allowed(len(scores)).to(scores.device)] = -math.inf
        return scores

    def _all_seen(self, logits: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros(len(logits), dtype=torch.bool)
            self._seen[[i for i in self._prompt if 0 <= i < len(logits)]] = True
            self._seen = self._seen.to(logits.device)
        return self._seen

    def _note(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def _draw(self, scores: Tensor) -> int:
        odds = keep_likely(scores / self.sampling.temperature, self.sampling)
        probabilities = odds.cpu().double()  # some devices have no float64
        total = probabilities.cumsum(0)
        if not bool(total[-1] > 0):  # also where it is no number
            raise ResourceError(
                "the model's scores are not numbers; load it in another precision, "
                "for example --precision float32"
            )
        point = torch.rand((), generator=self._chance, dtype=torch.float64).item()
        # In the order of ids, not of odds: rounding may turn the order of equal odds round.
        place = int(torch.searchsorted(total, total[-1] * point, right=True))
        return min(place, int(probabilities.nonzero()[-1]))


def keep_likely(scores: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities ``float32[V]`` of scores, zero outside top-k, top-p and min-p.

    They are not divided by their sum again; ties at the edge of top-k are all kept.
    """
    if 0 < sampling.top_k < len(scores):
        edge = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < edge, -math.inf)
    odds = scores.softmax(0)
    if sampling.top_p < 1.0:
        odds = odds.masked_fill(odds < _top_p_edge(odds, sampling.top_p), 0.0)
    if sampling.min_p > 0.0:
        odds = odds.masked_fill(odds < sampling.min_p * odds.max(), 0.0)
    return odds


def _top_p_edge(odds: Tensor, top_p: float) -> Tensor:
    """Probability of the last token that is needed to reach ``top_p``."""
    for count in (_HEAD, len(odds)):
        head = odds.topk(min(count, len(odds))).values
        before = head.cumsum(0) - head
        if count >= len(odds) or float(before[-1]) >= top_p:
            break
    return head[before < top_p][-1]


def logprob_of(logits: Tensor, token: int, count: int, decode: Any) -> TokenLogprob:
    """The chosen token's logprob and the ``count`` likeliest tokens', of scores ``float[V]``.

    Args:
        logits: the model's own.
        token: the chosen one.
        count: of alternatives.
        decode: ids to text.
    """
    logs = logits.float().log_softmax(0)
    best = logs.topk(min(count, len(logs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = tuple((i, str(decode([i])), value) for i, value in pairs)
    return TokenLogprob(token, str(decode([token])), float(logs[token]), top)
