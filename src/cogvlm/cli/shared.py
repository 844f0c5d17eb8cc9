"""What every command shares: the application, its options, and errors of one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .. import __version__
from ..errors import CogVLMError, InputError

if TYPE_CHECKING:
    from ..load import Loaded

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
    int4_all = "int4-all"
    nf4 = "nf4"


class Stored(str, Enum):
    """Number format of quantised files."""

    int8 = "int8"
    int4 = "int4"
    int4_all = "int4-all"


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
AdapterOption = Annotated[
    Path | None, typer.Option(help="Folder of what was tuned on the model (cogvlm train).")
]
RepetitionOption = Annotated[
    bool, typer.Option("--repetition-stop/--no-repetition-stop", help="End a repeating answer.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


def plain_errors(command: Command) -> Command:
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


def load(
    model: str,
    precision: Precision,
    device: str,
    tokenizer: str | None,
    allow_pickle: bool,
    adapter: Path | None = None,
) -> Loaded:
    """The model and its processor, as the options say."""
    from ..load import load as load_files

    more: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
    return load_files(
        model,
        dtype=precision.value,
        device=device,
        tokenizer=tokenizer,
        allow_pickle=allow_pickle,
        **more,
    )


def quiet_libraries() -> None:
    """Only the command line silences others: their notes would stand between the answers."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    # The last two speak up where torchao is installed, which transformers then imports.
    for name in ("transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class progress:  # used like a function
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
