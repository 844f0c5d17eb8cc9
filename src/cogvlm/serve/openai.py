"""OpenAI's routes: chat, completions, models."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..errors import InputError
from ..processor import Image, Message, Text
from ..processor.messages import Part
from . import media
from .desk import Desk, Reply
from .errors import problem_of
from .front import Facts, Front, Refused
from .protocol import (
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    JsonObjectFormat,
    JsonSchemaFormat,
    SystemMessage,
    UserMessage,
)
from .tokens import chat_logprobs, completion_logprobs, usage

if TYPE_CHECKING:
    from ..engine.sampling import Sampling
    from ..engine.transcript import Piece

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
# A stop on repetition is an end that the model did not find itself; OpenAI has no word for it.
FINISH = {"end": "stop", "stop": "stop", "repetition": "stop", "length": "length"}
FINISH |= {"cancelled": "length"}  # by time or shutdown: there would have been more


def routes(desk: Desk) -> APIRouter:
    """The routes of one desk."""
    router = APIRouter()

    @router.post(_CHAT)
    async def chat(wanted: ChatRequest, request: Request) -> Response:
        check_model(desk, wanted.model)
        writer = _ChatWriter(desk, wanted)
        words, images = texts(wanted)
        tokens = desk.check(words, images, asked_tokens(wanted))
        make = desk.chat(lambda: _messages(wanted, desk.settings.urls))
        sampling = _chat_sampling(wanted, tokens)
        reply = await desk.ask(request, make, sampling, fetches(wanted), wanted.model)
        return await _respond(writer, reply)

    @router.post(_COMPLETION)
    async def completions(wanted: CompletionRequest, request: Request) -> Response:
        check_model(desk, wanted.model)
        writer = _CompletionWriter(desk, wanted)
        prompt = wanted.prompt if isinstance(wanted.prompt, str) else wanted.prompt[0]
        tokens = desk.check([prompt], 0, wanted.max_tokens)
        sampling = _sampling(wanted, tokens, wanted.logprobs)
        make = lambda: desk.raw(prompt)  # noqa: E731
        reply = await desk.ask(request, make, sampling, model=wanted.model)
        return await _respond(writer, reply)

    router.include_router(model_routes(desk))
    return router


def model_routes(desk: Front) -> APIRouter:
    """The routes that say what there is to ask."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        data = [_model(desk, facts) for facts in desk.models.values()]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_model(desk, check_model(desk, name)))

    return router


def check_model(desk: Front, name: str) -> Facts:
    """The facts of a model; raises :class:`Refused` for any that is not here."""
    if name not in desk.models:
        here = ", ".join(map(repr, desk.models))
        error = Refused(404, "model_not_found", f"no model {name[:100]!r} here; this is {here}")
        error.param = "model"
        raise error
    return desk.models[name]


def _model(desk: Front, facts: Facts) -> dict[str, Any]:
    limits = desk.settings.limits
    return {
        "id": facts.name,
        "object": "model",
        "created": facts.created,
        "owned_by": facts.owner,
        "max_model_len": facts.context,
        "max_tokens": limits.tokens,
        "max_images": desk.max_images,
        "max_pixels": limits.pixels,
    }


# --- requests --------------------------------------------------------------------------------


def asked_tokens(wanted: ChatRequest) -> int | None:
    """The longest answer that is asked for, by either of its names."""
    if wanted.max_tokens is not None and wanted.max_completion_tokens is not None:
        raise InputError("max_tokens: max_completion_tokens is the same; give one of them")
    return wanted.max_tokens or wanted.max_completion_tokens


def texts(wanted: ChatRequest) -> tuple[list[str], int]:
    """Every text of a conversation, and how many pictures it has."""
    found, images = [], 0
    for message in wanted.messages:
        parts = [message.content] if isinstance(message.content, str) else message.content
        for part in parts:
            if isinstance(part, ImagePart):
                images += 1
            else:
                found.append(part if isinstance(part, str) else part.text)
    return found, images


def fetches(wanted: ChatRequest) -> bool:
    """Whether there are pictures to fetch."""
    return any(
        isinstance(part, ImagePart) and part.image_url.url[:4].lower() == "http"
        for message in wanted.messages
        for part in message.content
    )


def _messages(wanted: ChatRequest, rules: media.UrlRules) -> list[Message]:
    """The conversation, its pictures read; in a worker thread."""
    return [_message(m, f"messages[{i}]", rules) for i, m in enumerate(wanted.messages)]


def _message(
    message: SystemMessage | UserMessage | AssistantMessage, where: str, rules: media.UrlRules
) -> Message:
    parts: list[Part] = []
    if isinstance(message.content, str):
        parts = [Text(message.content)]
    else:
        for i, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                place = f"{where}.content[{i}].image_url"
                parts.append(Image(media.read(part.image_url.url, rules, place)))
            else:
                parts.append(Text(part.text))
    return Message("system" if message.role == "developer" else message.role, tuple(parts))


def _chat_sampling(wanted: ChatRequest, tokens: int) -> Sampling:
    if wanted.top_logprobs and not wanted.logprobs:
        raise InputError("top_logprobs: needs logprobs=true; give both or neither")
    count = (wanted.top_logprobs or 0) if wanted.logprobs else None
    return _sampling(wanted, tokens, count)


def _sampling(
    wanted: ChatRequest | CompletionRequest, tokens: int, logprobs: int | None
) -> Sampling:
    from ..engine.grammar import Grammar
    from ..engine.sampling import Sampling

    form = wanted.response_format if isinstance(wanted, ChatRequest) else None
    grammar = None
    if isinstance(form, JsonSchemaFormat):
        grammar = Grammar("json_schema", form.json_schema.schema_)
    elif isinstance(form, JsonObjectFormat):
        grammar = Grammar("json_object")
    if wanted.regex is not None:
        if grammar is not None:
            raise InputError("regex: an answer has one form; leave out regex or response_format")
        grammar = Grammar("regex", wanted.regex)
    given = {
        name: getattr(wanted, name)
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty"),
            *("presence_penalty", "frequency_penalty", "repetition_stop"),
        )
        if getattr(wanted, name) is not None
    }
    stop = (wanted.stop,) if isinstance(wanted.stop, str) else tuple(wanted.stop or ())
    return Sampling(
        max_new_tokens=tokens,
        stop=stop,
        logit_bias=_bias(wanted.logit_bias or {}),
        logprobs=logprobs,
        grammar=grammar,
        **given,
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise InputError(f"logit_bias: {token[:20]!r} is not the id of a token; give numbers")
    return {int(token): bias for token, bias in given.items()}


# --- answers ---------------------------------------------------------------------------------


class _Writer:
    """Writes one answer, whole or piece by piece."""

    kind, prefix, streamed = "", "", ""
    route = ""

    def __init__(self, desk: Desk, wanted: ChatRequest | CompletionRequest) -> None:
        self.wanted = wanted
        self.stream = bool(wanted.stream)
        options = wanted.stream_options
        if options is not None and not self.stream:
            raise InputError("stream_options: needs stream=true; give both or neither")
        self.usage = options is not None and bool(options.include_usage)
        self.head = {"id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time())}
        self.head["model"] = wanted.model

    def whole(self, reply: Reply, pieces: Sequence[Piece]) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": FINISH[reply.answer.stop]}
        choice |= self.complete(reply.answer.text, pieces)
        return {**self.head, "object": self.kind, "choices": [choice], "usage": usage(reply)}

    def chunk(self, choice: dict[str, Any] | None, finish: str | None = None) -> dict[str, Any]:
        choices = [] if choice is None else [{"index": 0, **choice, "finish_reason": finish}]
        return {**self.head, "object": self.streamed, "choices": choices}

    def complete(self, text: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def first(self) -> dict[str, Any] | None:
        return None

    def part(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def last(self) -> dict[str, Any]:
        raise NotImplementedError


class _ChatWriter(_Writer):
    kind, streamed, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"
    route = _CHAT

    def complete(self, text: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(pieces)}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return {"delta": {"content": text}, "logprobs": self._logprobs(pieces)}

    def last(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        return chat_logprobs(pieces) if self.wanted.logprobs else None


class _CompletionWriter(_Writer):
    kind = streamed = "text_completion"
    prefix = "cmpl-"
    route = _COMPLETION

    def __init__(self, desk: Desk, wanted: CompletionRequest) -> None:
        super().__init__(desk, wanted)
        self._shown = 0  # characters, for the offsets of logprobs

    def complete(self, text: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        if self.wanted.logprobs is None:
            return {"text": text, "logprobs": None}
        return {"text": text, "logprobs": completion_logprobs(pieces, self._shown)}

    def part(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        part = self.complete(text, pieces)
        self._shown += len(text)
        return part

    def last(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}


async def _respond(writer: _Writer, reply: Reply) -> Response:
    if writer.stream:
        return StreamingResponse(_events(writer, reply), media_type="text/event-stream")
    pieces = [piece async for some in reply.pieces() for piece in some]
    return JSONResponse(writer.whole(reply, pieces))


async def _events(writer: _Writer, reply: Reply) -> AsyncIterator[str]:
    """Server-sent events; the last one is OpenAI's ``[DONE]``."""
    try:
        if (first := writer.first()) is not None:
            yield event(writer.chunk(first))
        async for pieces in reply.pieces():
            yield event(writer.chunk(writer.part(pieces)))
        yield event(writer.chunk(writer.last(), FINISH[reply.answer.stop]))
        if writer.usage:
            yield event({**writer.chunk(None), "usage": usage(reply)})
    except Exception as error:  # the status is sent: what is left is to say so in the stream
        yield event(problem_of(error).body(writer.route))
        return
    yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
