"""``cogvlm ask``: one question, its answer as it comes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .shared import (
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
    load,
    plain_errors,
    quiet_libraries,
)


@app.command()
@plain_errors
def ask(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Pictures, in order; or a video, by its suffix."),
    ] = None,
    *,
    question: Annotated[str, typer.Argument(help="The last argument.")],
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
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
    as_json: JsonOption = False,
) -> None:
    """Answer a question about pictures (or about none), or about a video."""
    images = images or []
    _check_question(question)
    quiet_libraries()
    from ..engine import GenerationSettings, stream
    from ..processor import system as system_message
    from ..processor import user

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed, repetition_stop)
    for image in images:
        if not Path(image).is_file():
            raise InputError(f"{image}: no such picture; all arguments but the last are pictures")
    messages = [system_message(system)] if system is not None else []
    messages.append(user(*map(Path, images), question))
    loaded = load(model, precision, device, tokenizer, allow_pickle)
    started = time.monotonic()
    pieces = stream(loaded, messages, settings)
    for piece in pieces:
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if as_json:
        answer = pieces.answer
        values = {
            "answer": answer.text,
            "model": model,
            "images": images,
            "question": question,
            "tokens": len(answer.ids),
            "stop": answer.stop,
            "seconds": round(time.monotonic() - started, 3),
        }
        typer.echo(json.dumps(values, ensure_ascii=False))
    else:
        sys.stdout.write("\n")


def _check_question(question: str) -> None:
    """A picture in the question's place means that the question was forgotten."""
    if not question.strip():
        raise InputError("the question is empty; the last argument is the question")
    if "\n" not in question and len(question) < 255 and Path(question).is_file():
        raise InputError(f"{question!r} is a file; the last argument is the question")
