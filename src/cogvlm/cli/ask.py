"""``cogvlm ask``: one question, its answer as it comes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .backends import BaseUrlOption, KeyOption, SideOption, opened
from .shared import (
    AdapterOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    PickleOption,
    Precision,
    PrecisionOption,
    RepetitionOption,
    SeedOption,
    TemperatureOption,
    TokenizerOption,
    TokensOption,
    TopKOption,
    TopPOption,
    app,
    plain_errors,
    quiet_libraries,
)


@app.command()
@plain_errors
def ask(
    context: typer.Context,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Pictures, in order; or a video, by its suffix."),
    ] = None,
    *,
    question: Annotated[str, typer.Argument(help="The last argument.")],
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    precision: PrecisionOption = Precision.auto,
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
    repetition_stop: RepetitionOption = True,
    base_url: BaseUrlOption = None,
    api_key_env: KeyOption = "OPENAI_API_KEY",
    max_side: SideOption = 2048,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about pictures (or about none), or about a video."""
    images = images or []
    _check_question(question)
    quiet_libraries()
    from ..processor import system as system_message
    from ..processor import user
    from ..settings import GenerationSettings

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed, repetition_stop)
    for image in images:
        if not Path(image).is_file():
            raise InputError(f"{image}: no such picture; all arguments but the last are pictures")
    messages = [system_message(system)] if system is not None else []
    messages.append(user(*map(Path, images), question))
    chosen = (model, precision, device, tokenizer, allow_pickle, base_url, api_key_env, max_side)
    with opened(context, *chosen, adapter) as backend:
        started = time.monotonic()
        pieces = backend.stream(messages, settings)
        for piece in pieces:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if not as_json:
            sys.stdout.write("\n")
            return
        values = {
            "answer": pieces.reply.text,
            "model": backend.name,
            "images": images,
            "question": question,
            "tokens": pieces.reply.tokens,
            "stop": pieces.reply.stop,
            "seconds": round(time.monotonic() - started, 3),
        }
        typer.echo(json.dumps(values, ensure_ascii=False))


def _check_question(question: str) -> None:
    """A picture in the question's place means that the question was forgotten."""
    if not question.strip():
        raise InputError("the question is empty; the last argument is the question")
    if "\n" not in question and len(question) < 255 and Path(question).is_file():
        raise InputError(f"{question!r} is a file; the last argument is the question")
