"""The command line: thin commands, each of which imports its part when called.

Exit codes: 0 done, 1 failed, 2 the input is not usable, 130 Ctrl-C. Errors raised on purpose are
one line on standard error; standard output holds answers only.
"""

from __future__ import annotations

import functools
import io
import json
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from . import __version__
from .errors import CogVLMError, InputError

if TYPE_CHECKING:
    from .load import Loaded

Command = TypeVar("Command", bound=Callable[..., Any])

app = typer.Typer(
    help="CogVLM: ask questions about pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Precision(str, Enum):
    """Number format of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


class Stored(str, Enum):
    """Number format of quantised files."""

    int8 = "int8"
    int4 = "int4"


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="'nano', a folder, or a hub name 'owner/name'.")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(help="A tokenizer's file or folder, for model folders that hold none."),
]
TokensOption = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopPOption = Annotated[float, typer.Option(help="Sample from this much probability.")]
TopKOption = Annotated[int, typer.Option(help="Sample from so many tokens; 0: all.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of sampling.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Number format of the weights.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights too, tensors only.")
]
RepetitionOption = Annotated[
    bool, typer.Option("--repetition-stop/--no-repetition-stop", help="End a repeating answer.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


def _plain_errors(command: Command) -> Command:
    """Errors raised on purpose become one line and an exit code; Ctrl-C becomes 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except CogVLMError as error:
            line = " ".join(str(error).split())
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cogvlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="The version, and exit."),
    ] = False,
) -> None:
    pass


@app.command()
@_plain_errors
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
    _quiet_libraries()
    from .engine import GenerationSettings, stream
    from .processor import system as system_message
    from .processor import user

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed, repetition_stop)
    for image in images:
        if not Path(image).is_file():
            raise InputError(f"{image}: no such picture; all arguments but the last are pictures")
    messages = [system_message(system)] if system is not None else []
    messages.append(user(*map(Path, images), question))
    loaded = _load(model, precision, device, tokenizer, allow_pickle)
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


@app.command()
@_plain_errors
def run(
    requests: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"id", "image", "images" or "video", "question"}.'),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines, appended to.")],
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 8,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    precision: PrecisionOption = Precision.auto,
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
    repetition_stop: RepetitionOption = True,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON summary at the end.")] = False,
) -> None:
    """Answer a file of questions; run it again to go on where it was stopped."""
    _quiet_libraries()
    from .engine import GenerationSettings, run_file

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed, repetition_stop)
    if not requests.is_file():
        raise InputError(f"{requests}: no such file")
    loaded = _load(model, precision, device, tokenizer, allow_pickle)
    with _progress("answering") as show:
        summary = run_file(requests, output, loaded, settings, batch_size, show)
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(summary)))
    else:
        typer.echo(
            f"{output}: {summary.answered} answered, {summary.failed} failed, "
            f"{summary.skipped} there before, of {summary.requests}; {summary.seconds:.1f} s",
            err=True,
        )


@app.command()
@_plain_errors
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/nano-read.yaml.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the last checkpoint, or not.")
    ] = True,
) -> None:
    """Train what a recipe says; stop it with Ctrl-C, run it again to go on."""
    if not recipe.is_file():
        raise InputError(f"{recipe}: no such recipe")
    _quiet_libraries()
    from .train.run import run as run_recipe

    folder = run_recipe(recipe, changes or [], out, resume)
    typer.echo(str(folder))


@app.command("eval")
@_plain_errors
def evaluate(
    requests: Annotated[
        Path, typer.Argument(help="JSON lines as for 'run', with a 'truth' in each.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Answers; default: NAME.answers.jsonl, made anew."),
    ] = None,
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 16,
    max_new_tokens: TokensOption = 96,
    precision: PrecisionOption = Precision.auto,
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
) -> None:
    """Answer a file of questions and score the answers: one JSON line."""
    _quiet_libraries()
    from .engine import GenerationSettings
    from .eval.run import as_line, score_file

    if not requests.is_file():
        raise InputError(f"{requests}: no such file")
    if output is None:
        output = Path(f"{requests.stem}.answers.jsonl")
        output.unlink(missing_ok=True)
    settings = GenerationSettings(max_new_tokens)
    loaded = _load(model, precision, device, tokenizer, allow_pickle)
    with _progress("answering") as show:
        score = score_file(requests, output, loaded, batch_size, settings, show)
    typer.echo(as_line(score))


@app.command()
@_plain_errors
def render(
    folder: Annotated[Path, typer.Argument(help="Where pictures and requests.jsonl go.")],
    count: Annotated[int, typer.Option(help="How many lines.")] = 200,
    seed: Annotated[int | None, typer.Option(help="Default: one that no recipe uses.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out/--training", help="Fonts and texts that never train.")
    ] = True,
    min_chars: Annotated[int, typer.Option(help="Shortest line.")] = 1,
    max_chars: Annotated[int, typer.Option(help="Longest line.")] = 24,
    strength: Annotated[float, typer.Option(help="0: clean print; 1: badly damaged.")] = 0.3,
) -> None:
    """Write pictures of printed lines with their truths, to train on or to measure with."""
    from .data.render import HELD_OUT_SEED, line_stream, write_lines

    stream = line_stream(
        HELD_OUT_SEED if seed is None else seed,
        held_out=held_out,
        min_chars=min_chars,
        max_chars=max_chars,
        strength=strength,
    )
    typer.echo(str(write_lines(folder, stream, count)))


@app.command()
@_plain_errors
def quantize(
    model: Annotated[str, typer.Argument(help="A folder, or a hub name 'owner/name'.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    precision: Annotated[Stored, typer.Option(help="Number format of the matrices.")] = Stored.int4,
) -> None:
    """Write a model again in eight or four bits a weight; needs the memory of one file of it."""
    _quiet_libraries()
    from .load import quantise_folder

    typer.echo(str(quantise_folder(model, out, precision.value)))


@app.command()
@_plain_errors
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what this machine has, and what would run on it."""
    _quiet_libraries()
    from .doctor import report

    found = report()
    typer.echo(json.dumps(found, ensure_ascii=False) if as_json else _doctor_text(found))


@app.command()
@_plain_errors
def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Only these, with or without owner.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the released models: their terms, the memory each needs, whether it fits here."""
    _quiet_libraries()
    from .catalog import CHECKPOINTS, find
    from .doctor import find_devices
    from .memory import table

    chosen = [find(name) for name in names] if names else list(CHECKPOINTS)
    devices = [(d.name, d.memory_gb) for d in find_devices()]
    rows = table(chosen, devices)
    typer.echo(json.dumps(rows, ensure_ascii=False) if as_json else _models_text(rows))


def _models_text(rows: list[dict[str, Any]]) -> str:
    formats = ("bfloat16", "int8", "int4")
    head = " ".join(f"{name:>8}" for name in formats)
    lines = [f"{'model (THUDM/, zai-org/)':36} {'licence':22} {head}  here"]
    for row in rows:
        sizes = " ".join(f"{row['needs'][name]['total'] / 1e9:5.1f} GB" for name in formats)
        here = f"{row['precision']} on {row['device']}" if row["device"] else row["reason"]
        lines.append(f"{row['name']:36} {row['licence']:22} {sizes}  {here}")
    terms = {
        f"{row['licence']}: research {row['research']}; commercial use {row['commercial']}"
        + (f"; {row['also']}" if row["also"] else "")
        for row in rows
    }
    return "\n".join(
        [
            *lines,
            "GB: weights, one picture and 2,048 tokens; int8 and int4 need the extra 'quant'.",
            *sorted(terms),
            "Terms change: what the model's page says decides.",
        ]
    )


def _doctor_text(found: dict[str, Any]) -> str:
    lines = [f"{name:16} {version}" for name, version in found["versions"].items()]
    for device in found["devices"]:
        memory = device["memory_gb"]
        size = f"{memory:.0f} GB" if memory is not None else "memory unknown"
        runs = ", ".join(filter(None, [f"runs in {device['precision']}", device["advice"]]))
        lines.append(f"{'device':16} {device['name']}, {size}, {runs}")
    for fit in found["models"]:
        where = f"yes, on {fit['device']}" if fit["device"] else "no"
        needs = f"about {fit['needs_gb']:.0f} GB"
        lines.append(f"{fit['model']:16} {fit['precision']} ({needs}): {where}; {fit['how']}")
    language = found["language_model"] or "not here yet: fetched at the first use of nano (93 MB)"
    return "\n".join(
        [*lines, f"{'cache':16} {found['cache']}", f"{'language model':16} {language}"]
    )


def _load(
    model: str, precision: Precision, device: str, tokenizer: str | None, allow_pickle: bool
) -> Loaded:
    from .load import load

    return load(
        model,
        dtype=precision.value,
        device=device,
        tokenizer=tokenizer,
        allow_pickle=allow_pickle,
    )


def _quiet_libraries() -> None:
    """Only the command line silences others: their notes would stand between the answers."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    # The last two speak up where torchao is installed, which transformers then imports.
    for name in ("transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _progress:
    """A bar on standard error; inside, a function of (done, all)."""

    def __init__(self, label: str) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def main() -> None:
    """Entry point of the ``cogvlm`` command."""
    # A console that cannot show a sign of the answer shows "?" instead of a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name="cogvlm")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
