"""What clients send: OpenAI's and Ollama's requests as types, checked before anything runs.

Every field is honoured, or accepted with the one value that asks for nothing (``n=1``), or refused
by its name.  Types are strict: a number in quotes is no number.  Knows no engine and reads no URL.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Wire(BaseModel):
    """A JSON object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def only(*neutral: Any) -> AfterValidator:
    """A field of the format that nothing here can honour, with the values that ask for nothing."""

    def check(value: Any) -> Any:
        # True == 1 in Python, not on the wire.
        if value is None or any(type(value) is type(v) and value == v for v in neutral):
            return value
        allowed = " or ".join(["null", *(repr(v) for v in neutral)])
        text = f"is not supported here; leave it out or give {allowed}"
        raise PydanticCustomError("unsupported", text.replace("{", "{{").replace("}", "}}"))

    return AfterValidator(check)


def _whole(value: Any) -> Any:
    """JSON can hold half of a surrogate pair, which no tokenizer and no answer can."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except (UnicodeEncodeError, RecursionError):
        raise PydanticCustomError("unicode", "holds half of a surrogate pair; remove it") from None
    return value


Str = Annotated[str, AfterValidator(_whole)]
Schema = Annotated[dict[str, Any], AfterValidator(_whole)]

# --- OpenAI ----------------------------------------------------------------------------------


class TextPart(Wire):
    """Text of a message."""

    type: Literal["text"]
    text: Str


class ImageUrl(Wire):
    """Where a picture is: a ``data:`` URL, or ``http(s):`` where the server allows it."""

    url: Str
    detail: Literal["auto", "high"] | None = None  # all there is to see is always looked at


class ImagePart(Wire):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Wire):
    """What the model is told before the conversation."""

    role: Literal["system", "developer"]
    content: Str | list[TextPart]
    name: Annotated[Any, only()] = None


class UserMessage(Wire):
    """A question, with pictures or without."""

    role: Literal["user"]
    content: Str | list[Part]
    name: Annotated[Any, only()] = None


class AssistantMessage(Wire):
    """An earlier answer; fields that answers of other models have are there to be empty."""

    role: Literal["assistant"]
    content: Str | list[TextPart]
    name: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class JsonSchema(Wire):
    """A schema that the answer must fit; it always does, so ``strict`` changes nothing."""

    name: Str = "answer"
    description: Str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Wire):
    """Answers of any form."""

    type: Literal["text"]


class JsonObjectFormat(Wire):
    """Answers that are a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Wire):
    """Answers that fit a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StreamOptions(Wire):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class _Sampled(Wire):
    """What both kinds of OpenAI requests share."""

    model: Str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: Annotated[Any, only(1)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Str | list[Str] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None  # by token id
    user: Str | None = None  # a name for the caller's own books; no effect by definition
    # Beyond OpenAI's format, named as elsewhere.
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    repetition_stop: bool | None = None
    regex: Str | None = None


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only("none")] = None
    functions: Annotated[Any, only([])] = None
    metadata: Annotated[Any, only({})] = None
    modalities: Annotated[Any, only(["text"])] = None
    parallel_tool_calls: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    prompt_cache_key: Str | None = None  # a hint; prefixes are found without it
    reasoning_effort: Annotated[Any, only("none")] = None
    safety_identifier: Str | None = None  # as user
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    tool_choice: Annotated[Any, only("none")] = None
    tools: Annotated[Any, only([])] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None


class CompletionRequest(_Sampled):
    """``POST /v1/completions``: the prompt goes to the model as it is, without a chat format."""

    prompt: Str | Annotated[list[Str], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: Annotated[Any, only(1)] = None
    echo: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None


# --- Ollama ----------------------------------------------------------------------------------


def _stays(value: Any) -> Any:
    """The model stays loaded as long as the server runs, so any wish but "unload now" is met."""
    text = str(value).strip().lower()
    if isinstance(value, bool) or (text[:1] == "0" and not text.strip("0.nuµmsh")):
        raise PydanticCustomError(
            "unsupported", "asks to unload the model, which stays while the server runs"
        )
    return value


class OllamaOptions(Wire):
    """Ollama's options; those of loading a model are refused by name, as it is loaded already."""

    num_predict: int | None = Field(default=None, ge=-1)  # -1: up to the server's limit
    num_ctx: int | None = Field(default=None, ge=1)  # honoured up to what the model has
    seed: int | None = Field(default=None, ge=-1, lt=2**63)  # -1: a new one for every request
    stop: Str | list[Str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repeat_last_n: Annotated[Any, only(-1)] = None  # penalties look at all of the answer
    typical_p: Annotated[Any, only(1, 1.0)] = None
    tfs_z: Annotated[Any, only(1, 1.0)] = None
    mirostat: Annotated[Any, only(0)] = None


class _OllamaRequest(Wire):
    """What both kinds of Ollama requests share."""

    model: Str
    stream: bool | None = None  # by Ollama's rules the default is true
    format: Literal["", "json"] | Schema | None = None
    options: OllamaOptions | None = None
    keep_alive: Annotated[Str | float | None, AfterValidator(_stays)] = None
    think: Annotated[Any, only(False)] = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class OllamaMessage(Wire):
    """One message; ``images`` holds base64."""

    role: Literal["system", "user", "assistant"]
    content: Str = ""
    images: list[Str] | None = None
    thinking: Annotated[Any, only("")] = None
    tool_calls: Annotated[Any, only([])] = None
    tool_name: Annotated[Any, only("")] = None


class OllamaChat(_OllamaRequest):
    """``POST /api/chat``."""

    messages: list[OllamaMessage] = []
    tools: Annotated[Any, only([])] = None


class OllamaGenerate(_OllamaRequest):
    """``POST /api/generate``."""

    prompt: Str = ""
    system: Str | None = None
    images: list[Str] | None = None
    raw: bool | None = None  # the prompt goes to the model without a chat format
    suffix: Annotated[Any, only("")] = None
    template: Annotated[Any, only("")] = None
    context: Annotated[Any, only([])] = None


class OllamaShow(Wire):
    """``POST /api/show``."""

    model: Str
    verbose: Annotated[Any, only(False)] = None


# --- what was wrong --------------------------------------------------------------------------

_NAMES = sorted(
    {
        field.alias or name
        for wire in list(globals().values())
        if isinstance(wire, type) and issubclass(wire, Wire)
        for name, field in wire.model_fields.items()
    }
)


def explain(errors: Any, body: Any) -> tuple[str, str]:
    """Pydantic's list of errors as ``(field, sentence)``; the most exact of them is taken."""
    # Every branch of a union complains; the one that came furthest into the body is meant.
    path, error = max(((_path(e, body), e) for e in errors), key=lambda pair: len(pair[0]))
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    if error["type"] == "json_invalid":
        return "", f"the body is not valid JSON ({error.get('ctx', {}).get('error', 'broken')})"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(str(path[-1]), _NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it"
        return field, f"{field[:200]}: no such field is supported; {hint}"
    if error["type"] == "missing":
        return field, f"{field or 'the body'} is missing; add it"
    return field, f"{field[:200] or 'the body'}: {error['msg']}"


def _path(error: Any, body: Any) -> list[str | int]:
    """Where in the body: pydantic's location without the names of the branches it tried."""
    here, path = body, []
    for item in error["loc"][1:]:
        inside = (isinstance(here, dict) and item in here) or (
            isinstance(here, list) and isinstance(item, int) and item < len(here)
        )
        if inside:
            here = here[item]
            path.append(item)
    if error["type"] == "missing" and len(error["loc"]) > 1:
        path.append(error["loc"][-1])
    return path
