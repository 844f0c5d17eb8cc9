"""``cogvlm chat``: a conversation in the terminal, or from a pipe.

Standard output has the answers, standard error all the rest.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CogVLMError
from ..journal import one_line
from .backends import BaseUrlOption, KeyOption, SideOption, opened
from .shared import (
    AdapterOption,
    DeviceOption,
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

if TYPE_CHECKING:
    from ..backend import Backend
    from ..chat import Ask, Session


@app.command()
@plain_errors
def chat(
    context: typer.Context,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Pictures of the first question: paths or URLs."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--load", help="Go on with a conversation that /save wrote.")
    ] = None,
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    adapter: AdapterOption = None,
    max_new_tokens: TokensOption = 512,
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
) -> None:
    """Talk about pictures; /help says how. From a pipe, every line is a question."""
    quiet_libraries()
    from ..chat import Session
    from ..settings import GenerationSettings

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed, repetition_stop)
    session = Session(settings, system)
    if resume is not None:
        session.take(f"/load {resume}")
    for image in images or []:
        session.add(image)
    chosen = (model, precision, device, tokenizer, allow_pickle, base_url, api_key_env, max_side)
    with opened(context, *chosen, adapter) as backend:
        typed = sys.stdin.isatty()
        if typed:
            _tell(f"{backend.name}; /help lists what can be done, Ctrl-D ends")
        with _history() if typed else contextlib.nullcontext():
            failed = _converse(session, backend, typed)
    if failed and not typed:  # a script wants to know
        raise typer.Exit(1)


def _converse(session: Session, backend: Backend, typed: bool) -> bool:
    """Until the end of the input or /quit; whether anything failed."""
    from ..chat import Ask

    failed = False
    for line in _lines(typed):
        try:
            taken = session.take(line)
            if isinstance(taken, Ask):
                _answer(session, backend, taken, typed)
            elif taken.end:
                break
            elif taken.text:
                _tell(taken.text)
        except CogVLMError as error:
            failed = True
            _tell(f"error: {one_line(error)}")
    return failed


def _answer(session: Session, backend: Backend, ask: Ask, typed: bool) -> None:
    """Print an answer as it comes; Ctrl-C keeps what came so far."""
    pieces: list[str] = []
    whole = False
    try:
        source = backend.stream(ask.messages, session.settings)
        for piece in source:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
        whole = True
        if source.reply.stop == "length":
            _tell("\n(cut off: /set max_new_tokens allows more)", end="")
    except KeyboardInterrupt:
        if not typed:
            raise
        whole = True
        _tell(" (stopped)" if pieces else "(stopped before an answer)", end="")
    finally:
        session.answered("".join(pieces) if whole else "")
        if pieces or whole:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _lines(typed: bool) -> Iterator[str]:
    """Lines of input; those that end in a backslash joined with the next."""
    parts: list[str] = []
    while True:
        try:
            line = _read(typed, "> " if not parts else ". ")
        except KeyboardInterrupt:
            if not typed:
                raise
            parts.clear()
            _tell("")
            continue
        if line is not None and line.endswith("\\"):
            parts.append(line[:-1])
            continue
        if line is not None or parts:
            yield "\n".join([*parts, line or ""])
        if line is None:
            return
        parts.clear()


def _read(typed: bool, prompt: str) -> str | None:
    """One line without its end; none at the end of the input."""
    if typed:
        try:
            return input(prompt)
        except EOFError:
            _tell("")
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Arrow keys bring back earlier lines, where the library for it is present."""
    try:
        import readline
    except ImportError:
        yield
        return
    from ..hub import cache_dir

    file = cache_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            # What people ask is theirs alone.
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(file)


def _tell(text: str, end: str = "\n") -> None:
    sys.stderr.write(text + end)
    sys.stderr.flush()
