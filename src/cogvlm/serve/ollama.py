"""Ollama's routes: chat, generate, tags, show, version."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .. import __version__
from ..errors import InputError
from ..processor import Image, Message, Text, system
from ..processor.messages import Part
from . import media
from .desk import Desk, Reply
from .errors import problem_of
from .front import Facts, Refused
from .openai import FINISH
from .protocol import OllamaChat, OllamaGenerate, OllamaMessage, OllamaOptions, OllamaShow
from .tokens import chat_logprobs

if TYPE_CHECKING:
    from ..engine.sampling import Sampling
    from ..engine.transcript import Piece
    from ..processor.encode import Encoded

_SAME = ("seed", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
_Content = Callable[[str], dict[str, Any]]


def routes(desk: Desk) -> APIRouter:
    """The routes of one desk."""
    router = APIRouter()

    @router.post("/api/chat")
    async def chat(wanted: OllamaChat, request: Request) -> Response:
        facts = _check_model(desk, wanted.model)
        writer = _Writer(facts, wanted, lambda t: {"message": {"role": "assistant", "content": t}})
        if not wanted.messages:
            return writer.loaded()
        images = sum(len(m.images or ()) for m in wanted.messages)
        sampling = _sampling(desk, wanted, [m.content for m in wanted.messages], images)
        make = desk.chat(lambda: _messages(wanted.messages))
        return await writer.respond(await desk.ask(request, make, sampling, model=facts.name))

    @router.post("/api/generate")
    async def generate(wanted: OllamaGenerate, request: Request) -> Response:
        facts = _check_model(desk, wanted.model)
        writer = _Writer(facts, wanted, lambda text: {"response": text})
        if not wanted.prompt and not wanted.images:
            return writer.loaded()
        texts = [wanted.prompt, wanted.system or ""]
        sampling = _sampling(desk, wanted, texts, len(wanted.images or ()))
        reply = await desk.ask(request, _prompt(desk, wanted), sampling, model=facts.name)
        return await writer.respond(reply)

    @router.get("/api/tags")
    async def tags() -> Response:
        return JSONResponse({"models": [_entry(facts) for facts in desk.models.values()]})

    @router.post("/api/show")
    async def show(wanted: OllamaShow) -> Response:
        return JSONResponse(_show(desk, _check_model(desk, wanted.model)))

    @router.get("/api/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    return router


def _check_model(desk: Desk, name: str) -> Facts:
    found = desk.models.get(name) or desk.models.get(name.removesuffix(":latest"))
    if found is None:
        here = ", ".join(map(repr, desk.models))
        raise Refused(404, "model_not_found", f"model {name[:100]!r} not found; this is {here}")
    return found


# --- what there is ---------------------------------------------------------------------------


def _entry(facts: Facts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "model": facts.name,
        "modified_at": _time(facts.created),
        "size": facts.size,
        "digest": "",
        "details": _details(facts),
    }


def _details(facts: Facts) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": f"{facts.parameters / 1e6:.0f}M",
        "quantization_level": facts.precision,
    }


def _show(desk: Desk, facts: Facts) -> dict[str, Any]:
    info = {
        "general.architecture": facts.family,
        "general.parameter_count": facts.parameters,
        f"{facts.family}.context_length": facts.context,
    }
    return {
        "modified_at": _time(facts.created),
        "template": desk.processor.template.name,
        "details": _details(facts),
        "model_info": info,
        "capabilities": ["completion", "vision"],
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


# --- requests --------------------------------------------------------------------------------


def _messages(given: Sequence[OllamaMessage]) -> list[Message]:
    messages = []
    for i, message in enumerate(given):
        parts = _images(message.images, f"messages[{i}].images")
        if message.content or not parts:
            parts.append(Text(message.content))
        messages.append(Message(message.role, tuple(parts)))
    return messages


def _images(given: Sequence[str] | None, where: str) -> list[Part]:
    return [Image(media.from_base64(image, f"{where}[{i}]")) for i, image in enumerate(given or ())]


def _prompt(desk: Desk, wanted: OllamaGenerate) -> Callable[[], Encoded]:
    if wanted.raw:
        if wanted.images or wanted.system:
            raise InputError("raw: a prompt without a chat format has no images and no system text")
        return lambda: desk.raw(wanted.prompt)

    def messages() -> list[Message]:
        question = OllamaMessage(role="user", content=wanted.prompt, images=wanted.images)
        return [*([system(wanted.system)] if wanted.system else []), *_messages([question])]

    return desk.chat(messages)


def _sampling(
    desk: Desk, wanted: OllamaChat | OllamaGenerate, texts: list[str], images: int
) -> Sampling:
    from ..engine.grammar import Grammar
    from ..engine.sampling import Sampling

    options = wanted.options or OllamaOptions()
    tokens = None if options.num_predict == -1 else options.num_predict
    if tokens == 0:
        raise InputError("num_predict=0 asks for no answer; give 1 or more")
    context = desk.facts.context
    if options.num_ctx is not None and context is not None and options.num_ctx > context:
        raise InputError(f"num_ctx={options.num_ctx} is more than the model's context of {context}")
    if wanted.top_logprobs and not wanted.logprobs:
        raise InputError("top_logprobs: needs logprobs=true; give both or neither")
    given = {k: getattr(options, k) for k in _SAME if getattr(options, k) is not None}
    if given.get("seed") == -1:
        del given["seed"]
    if options.repeat_penalty is not None:
        given["repetition_penalty"] = options.repeat_penalty
    if wanted.format == "json":
        given["grammar"] = Grammar("json_object")
    elif wanted.format:
        given["grammar"] = Grammar("json_schema", wanted.format)
    stop = options.stop
    return Sampling(
        max_new_tokens=desk.check(texts, images, tokens),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        logprobs=(wanted.top_logprobs or 0) if wanted.logprobs else None,
        **given,
    )


# --- answers ---------------------------------------------------------------------------------


class _Writer:
    """Writes one answer; ``content`` puts a text where the route has it."""

    def __init__(
        self, facts: Facts, wanted: OllamaChat | OllamaGenerate, content: _Content
    ) -> None:
        self._model, self._content = facts.name, content
        self._stream = wanted.stream is not False
        self._logprobs = bool(wanted.logprobs)

    def loaded(self) -> Response:
        """What a request without a question gets: the model is there."""
        return self._lines_or_one([self._line("", done=True, done_reason="load")])

    async def respond(self, reply: Reply) -> Response:
        """The answer, whole or line by line."""
        if self._stream:
            lines = self._lines(reply)
            return StreamingResponse(lines, media_type="application/x-ndjson")
        pieces = [piece async for some in reply.pieces() for piece in some]
        end = self._end(reply)
        return JSONResponse(self._line(reply.answer.text, pieces, **end))

    async def _lines(self, reply: Reply) -> AsyncIterator[str]:
        try:
            async for pieces in reply.pieces():
                text = "".join(piece.text for piece in pieces)
                yield _json(self._line(text, pieces, done=False))
            yield _json(self._line("", **self._end(reply)))
        except Exception as error:  # the status is sent: what is left is to say so in the stream
            yield _json(problem_of(error).body("/api/"))

    def _lines_or_one(self, values: list[dict[str, Any]]) -> Response:
        kind = "application/x-ndjson" if self._stream else "application/json"
        return Response("".join(map(_json, values)), media_type=kind)

    def _line(self, text: str, pieces: Sequence[Piece] = (), **more: Any) -> dict[str, Any]:
        line = {"model": self._model, "created_at": _time(time.time()), **self._content(text)}
        if self._logprobs and pieces:
            line["logprobs"] = chat_logprobs(pieces)["content"]
        return {**line, **more}

    def _end(self, reply: Reply) -> dict[str, Any]:
        """Counts, and durations in nanoseconds; the prompt's lasts until the first token."""
        total = time.monotonic() - reply.started
        first = reply.first_token or 0.0
        return {
            "done": True,
            "done_reason": FINISH[reply.answer.stop],
            "total_duration": int(total * 1e9),
            "load_duration": 0,
            "prompt_eval_count": reply.prompt_tokens,
            "prompt_eval_duration": int(first * 1e9),
            "eval_count": len(reply.answer.ids),
            "eval_duration": int((total - first) * 1e9),
        }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
