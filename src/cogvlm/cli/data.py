"""``cogvlm data check`` and ``data show``: look at what one is going to train on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import JsonOption, ModelOption, TokenizerOption, app, plain_errors, progress

if TYPE_CHECKING:
    from ..data.sft import Mix, Record, Source
    from ..processor import Processor
    from ..processor.messages import Part

group = typer.Typer(
    help="Data to train on: look at them, make them, filter and pack them.", no_args_is_help=True
)
app.add_typer(group, name="data")

FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", help="llava, sharegpt, openai, qa, sft, webdataset, datasets, folder."
    ),
]
ImagesOption = Annotated[
    Path | None, typer.Option(help="Folder where the names of pictures begin.")
]
QuestionOption = Annotated[
    str | None, typer.Option(help="For records that are a picture and a text alone.")
]
OutsideOption = Annotated[
    bool, typer.Option("--allow-outside", help="Names of pictures may lead out of that folder.")
]


@group.command()
@plain_errors
def check(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or patterns.")],
    format: FormatOption = None,
    images: ImagesOption = None,
    question: QuestionOption = None,
    allow_outside: OutsideOption = False,
    decode: Annotated[bool, typer.Option("--decode", help="Read pictures to the last pixel.")] = (
        False
    ),
    tokens: Annotated[bool, typer.Option("--tokens", help="Count tokens as --model does.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer records are bad; counts tokens.")
    ] = None,
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Name every bad record with file and line, describe the good ones; exit 1 if any is bad."""
    from ..data.sft.check import check as look
    from ..data.sft.check import lines, measure_with

    measure = None
    if tokens or max_tokens is not None:
        measure = measure_with(_processor(model, tokenizer))
    reports = []
    for path in paths:
        source = open_records(path, format, images, question, allow_outside)
        with progress("checking") as show:
            report = look(source, measure, max_tokens, decode, show)
        reports.append(report)
        if not as_json:
            typer.echo("\n".join(lines(report)))
    if as_json:
        typer.echo(json.dumps([report.as_dict() for report in reports]))
    if any(report.bad or not report.good for report in reports):
        raise typer.Exit(1)


@group.command()
@plain_errors
def show(
    path: Annotated[str, typer.Argument(help="A file, folder or pattern.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many records.")] = 5,
    seed: Annotated[
        int | None, typer.Option(help="In the order of training with it; default: of the file.")
    ] = None,
    format: FormatOption = None,
    images: ImagesOption = None,
    question: QuestionOption = None,
    allow_outside: OutsideOption = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Instead, a page of HTML with pictures and boxes.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write records as they will be learnt, pictures by name and size."""
    from ..data.sft import Mix, RecordError

    source = open_records(path, format, images, question, allow_outside)
    if sheet is not None:
        write_sheet_of(sheet, Path(path), source, count, seed or 0)
        return
    records: Source | Mix = source if seed is None else Mix([source], seed=seed)
    for index in range(min(count, len(source))):
        try:
            record = records[index]
        except RecordError as error:
            typer.echo(json.dumps({"error": str(error)}) if as_json else f"bad: {error}\n")
            continue
        if as_json:
            typer.echo(json.dumps(_plain(record), ensure_ascii=False))
            continue
        typer.echo(f"{record.where}  id {record.id}")
        for message in record.messages:
            text = "\n".join(map(_said, message.parts)).replace("\n", "\n" + " " * 12)
            typer.echo(f"  {message.role:<10}{text}")
        typer.echo("")


def write_sheet_of(sheet: Path, path: Path, source: Source, count: int, seed: int) -> None:
    """Records chosen at random, as a page of HTML."""
    from ..data.engine.sheet import write_sheet

    index = path / "index.json"
    counts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else None
    written = write_sheet(sheet, source, count, seed, counts)
    typer.echo(f"{sheet}: {written} of {len(source)} records to look at")


def open_records(
    path: str, format: str | None, images: Path | None, question: str | None, outside: bool
) -> Source:
    """The records at a path."""
    from ..data.sft import Options, open_source

    return open_source(path, format, Options(question, images, outside))


def _said(part: Part) -> str:
    from ..data.sft.check import describe
    from ..processor import Text

    return part.text if isinstance(part, Text) else describe(part)


def _plain(record: Record) -> dict[str, Any]:
    turns = [{"role": m.role, "content": [*map(_said, m.parts)]} for m in record.messages]
    return {"id": record.id, "where": record.where, "messages": turns}


def _processor(model: str, tokenizer: str | None) -> Processor:
    """Of a model whose weights stay where they are."""
    from ..hub import language_model, resolve
    from ..processor import FastTokenizer, Processor, open_tokenizer
    from ..processor.lines import guessed
    from ..processor.tokenizer import read_json

    folder = resolve(model)
    config = read_json(folder / "config.json") or {}
    words = None
    if tokenizer is not None:
        words = open_tokenizer(tokenizer, config)
    elif name := config.get("language_model"):
        words = FastTokenizer.from_folder(language_model(name))
    return replace(Processor.from_folder(folder, words), reader=guessed)
