"""Counts and log probabilities of an answer, in the forms that the two APIs give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine.sampling import TokenLogprob
    from ..engine.transcript import Piece
    from .desk import Reply


def usage(reply: Reply) -> dict[str, Any]:
    """Tokens of prompt and answer; ``cached_tokens`` were in the prefix cache."""
    answer = reply.answer
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": len(answer.ids),
        "total_tokens": reply.prompt_tokens + len(answer.ids),
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def chat_logprobs(pieces: Sequence[Piece]) -> dict[str, Any]:
    """As in chat completions, and with ``content`` alone as Ollama gives them."""
    return {"content": [_entry(token) for token in _tokens(pieces)], "refusal": None}


def completion_logprobs(pieces: Sequence[Piece], start: int) -> dict[str, Any]:
    """As in completions; ``start`` is where the first token begins in the text."""
    tokens = list(_tokens(pieces))
    offsets = [start]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token.text))
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{text: logprob for _, text, logprob in t.top} for t in tokens],
        "text_offset": offsets[: len(tokens)],
    }


def _tokens(pieces: Iterable[Piece]) -> Iterable[TokenLogprob]:
    return (token for piece in pieces for token in piece.logprobs)


def _entry(token: TokenLogprob) -> dict[str, Any]:
    top = [_token(text, logprob) for _, text, logprob in token.top]
    return {**_token(token.text, token.logprob), "top_logprobs": top}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # Half a character decodes to a replacement sign; its bytes are then those of the sign.
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
