"""``cogvlm caption``: a folder of pictures to captions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .backends import BaseUrlOption, KeyOption, SideOption, given, opened
from .shared import (
    AdapterOption,
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

if TYPE_CHECKING:
    from ..backend import Backend
    from ..caption import Job, Result, Sink, Summary

_SHOWN = 5  # failures on the screen; all of them are in the list


class Format(str, Enum):
    """What captions are written as."""

    txt = "txt"
    jsonl = "jsonl"
    webdataset = "webdataset"


@app.command()
@plain_errors
def caption(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of pictures.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="txt: a folder, default DIR; jsonl: a file, default DIR/metadata.jsonl; "
            "webdataset: a folder.",
        ),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="A file beside each, one file, or tar shards.")
    ] = Format.txt,
    prompt: Annotated[
        str,
        typer.Option(help="May hold {name} {stem} {folder} {width} {height} {tags}."),
    ] = "Describe this picture.",
    prompt_file: Annotated[Path | None, typer.Option(help="The prompt is in this file.")] = None,
    tags_suffix: Annotated[
        str | None, typer.Option(help="{tags} of a.jpg is the text of a.SUFFIX, such as .tags.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Before every caption, like 'photo of sks, '.")] = "",
    suffix: Annotated[str, typer.Option(help="After every caption.")] = "",
    recursive: Annotated[
        bool, typer.Option("--recursive/--flat", help="Folders within it too, or not.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Caption again what has a caption.")
    ] = False,
    shard_size: Annotated[int, typer.Option(help="Pictures in a webdataset shard.")] = 1000,
    batch_size: Annotated[
        int, typer.Option(help="Pictures at once; for a server: requests at once.")
    ] = 8,
    processes: Annotated[
        int | None, typer.Option(help="Processes, each with a model; default: one a device.", min=1)
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps; may be given again.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a picture has no caption.")
    ] = False,
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    adapter: AdapterOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    precision: PrecisionOption = Precision.auto,
    allow_pickle: PickleOption = False,
    repetition_stop: RepetitionOption = True,
    base_url: BaseUrlOption = None,
    api_key_env: KeyOption = "OPENAI_API_KEY",
    max_side: SideOption = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON summary at the end.")] = False,
) -> None:
    """Caption a folder of pictures; run it again to go on where it was stopped."""
    quiet_libraries()
    from ..caption import Job, Prompt, caption_folder, spread, work
    from ..settings import GenerationSettings

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed, repetition_stop)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if prompt_file is not None:
        if given(context, "prompt"):
            raise InputError("both --prompt and --prompt-file; give one of them")
        prompt = _text_of(prompt_file)
    template = Prompt(prompt, tags_suffix)
    if tags_suffix == ".txt" and form is Format.txt and output in (None, folder):
        raise InputError("--tags-suffix .txt names the files that captions go to; give another -o")
    if form is not Format.webdataset and given(context, "shard_size"):
        raise InputError("--shard-size is for --format webdataset")
    job = Job(folder, template, settings, prefix, suffix, recursive, batch_size)
    devices = _devices(device, processes)
    if base_url and len(devices) > 1:
        raise InputError(
            "--processes and --device are for local models; of a server --batch-size says how "
            "many are asked at once"
        )

    def source(job: Job) -> Generator[list[Result], None, None]:
        if len(devices) > 1:
            chosen = (model, precision.value, tokenizer, allow_pickle, adapter)
            opener = partial(_open_local, *chosen)
            yield from spread(job, opener, devices)
            return
        more = (tokenizer, allow_pickle, base_url, api_key_env, max_side, adapter)
        with opened(context, model, precision, devices[0], *more) as backend:
            yield from work(job, backend)

    with _sink(form, folder, output, shard_size, overwrite) as sink, _progress() as show:
        summary = caption_folder(job, sink, source, show)
    _report(summary, as_json)
    if strict and summary.failed:
        raise typer.Exit(1)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _sink(
    form: Format, folder: Path, output: Path | None, size: int, overwrite: bool
) -> AbstractContextManager[Sink]:
    from ..caption import Lines, Shards, Sidecars

    if form is Format.jsonl:
        return Lines.open(output or folder / "metadata.jsonl", overwrite)
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --format {form.value} writes into a folder")
    if form is Format.txt:
        return Sidecars.open(output or folder, overwrite)
    if output is None:
        raise InputError("--format webdataset needs a folder for its shards: give --output")
    return Shards.open(output, folder, size, overwrite)


def _devices(device: list[str] | None, processes: int | None) -> list[str]:
    """One for each process: the devices in turn."""
    named = device or ["auto"]
    return [named[i % len(named)] for i in range(processes or len(named))]


def _open_local(
    model: str,
    precision: str,
    tokenizer: str | None,
    allow_pickle: bool,
    adapter: Path | None,
    device: str,
    count: int,
) -> Backend:
    """A worker's model; runs in a process of its own."""
    quiet_libraries()
    import torch

    from ..engine import LocalBackend

    # Without this every process would take all cores, and all would wait for each other.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    numbers = Precision(precision)
    return LocalBackend(load(model, numbers, device, tokenizer, allow_pickle, adapter))


@contextmanager
def _progress() -> Iterator[Callable[[int, int, int], None]]:
    """A bar on standard error; inside, a function of (done, failed, all)."""
    from rich import progress
    from rich.console import Console

    class Rate(progress.ProgressColumn):
        """Pictures a second."""

        def render(self, task: progress.Task) -> str:
            return f"{task.finished_speed or task.speed or 0.0:.2f}/s"

    bar = progress.Progress(
        progress.TextColumn("captioning"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        Rate(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[failed]}"),
        console=Console(stderr=True),
        speed_estimate_period=300.0,
    )
    task = bar.add_task("", total=None, failed="")
    with bar:
        yield lambda done, failed, total: bar.update(
            task, completed=done + failed, total=total, failed=f"{failed} failed" if failed else ""
        )


def _report(summary: Summary, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(summary)))
        return
    links = f", {summary.links} links" if summary.links else ""
    rate = summary.captioned / summary.seconds if summary.seconds else 0.0
    typer.echo(
        f"{summary.captioned} captioned, {summary.failed} failed, {summary.skipped} there before"
        f"{links}, of {summary.pictures} pictures; {summary.seconds:.1f} s, {rate:.2f} a second",
        err=True,
    )
    if summary.failures is None:
        return
    with open(summary.failures, encoding="utf-8") as file:
        for _, line in zip(range(_SHOWN), file, strict=False):
            values = json.loads(line)
            name = os.fsencode(values["file_name"]).decode(errors="replace")
            typer.echo(f"  {name}: {values['reason']}", err=True)
    typer.echo(f"  the list of failures is {summary.failures}", err=True)
