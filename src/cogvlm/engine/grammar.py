"""Answers that must fit a JSON schema or a regular expression, through llguidance.

Knows tokens and grammars, nothing of models.  llguidance comes with the extra ``serve`` and is
imported when the first grammar is used.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, ResourceError
from ..processor.tokenizer import FastTokenizer, Tokenizer

Kind = Literal["json_schema", "json_object", "regex"]


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like.

    Attributes:
        kind: ``json_schema``, ``json_object`` (any JSON object) or ``regex``, which the whole
            answer must match.
        value: the schema, an object or its JSON text; the expression; none for ``json_object``.

    Raises:
        ConfigError: an unknown kind, or no value where one is needed.
    """

    kind: Kind
    value: Any = None

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "json_object", "regex"):
            raise ConfigError(
                f"grammar {self.kind!r} is not one of json_schema, json_object, regex"
            )
        if self.kind == "json_object" and self.value is not None:
            raise ConfigError("grammar json_object takes no value; for a schema say json_schema")
        if self.kind == "json_schema" and not isinstance(self.value, (dict, bool, str)):
            raise ConfigError(f"grammar json_schema: {self.value!r} is not a schema")
        if self.kind == "regex" and not isinstance(self.value, str):
            raise ConfigError(f"grammar regex: {self.value!r} is not a text")


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, size: int) -> Tensor:
        """Which tokens may follow: ``bool[size]``; at the end those that end an answer."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        return mask[:size] > 0

    def take(self, token: int) -> bool:
        """Go on by one token; true if nothing can follow."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"grammar: {_one_line(self._matcher.get_error())}; simplify it")


class Grammars:
    """Compiles grammars for one tokenizer; may be used by several threads.

    Args:
        tokenizer: the processor's.
        vocabulary: number of scores that the model gives.
        end: ids that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end: Iterable[int]) -> None:
        self._tokenizer, self._vocabulary, self._end = tokenizer, vocabulary, sorted(end)
        self._lock = threading.Lock()
        self._made: Any = None

    def compile(self, grammar: Grammar) -> Constraint:
        """A new constraint.

        Raises:
            InputError: the schema or expression cannot be compiled, or not for this tokenizer.
            ResourceError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise ResourceError(
                "answers in a grammar need llguidance; install it with: pip install 'cogvlm[serve]'"
            ) from None
        matcher_of: Any = llguidance.LLMatcher
        try:
            if grammar.kind == "regex":
                text = matcher_of.grammar_from_regex(grammar.value)
            else:
                text = matcher_of.grammar_from_json_schema(_schema(grammar))
            matcher = matcher_of(self._vocabulary_of(llguidance), text, log_level=0)
        except ValueError as error:
            raise InputError(f"grammar {grammar.kind}: {_one_line(str(error))}") from None
        if matcher.is_error():
            reason = _one_line(matcher.get_error())
            raise InputError(f"grammar {grammar.kind} cannot be compiled: {reason}")
        return Constraint(matcher)

    def _vocabulary_of(self, llguidance: Any) -> Any:
        with self._lock:  # takes seconds, once
            if self._made is None:
                if not isinstance(self._tokenizer, FastTokenizer):
                    name = type(self._tokenizer).__name__
                    raise InputError(
                        f"the tokenizer is a {name}: answers in a grammar need a tokenizer.json"
                    )
                self._made = llguidance.LLTokenizer(
                    self._tokenizer.json, n_vocab=self._vocabulary, eos_token=self._end
                )
            return self._made


def _schema(grammar: Grammar) -> str:
    if grammar.kind == "json_object":
        return '{"type": "object"}'
    if isinstance(grammar.value, str):
        try:
            json.loads(grammar.value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"grammar json_schema: not JSON ({error})") from None
        return grammar.value
    try:
        return json.dumps(grammar.value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"grammar json_schema: not JSON ({error})") from None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."
