"""``cogvlm data render``, ``label``, ``latex``, ``filter`` and ``pack``: the data engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, ResourceError
from .data import (
    ImagesOption,
    OutsideOption,
    QuestionOption,
    group,
    open_records,
    write_sheet_of,
)
from .shared import plain_errors, progress

if TYPE_CHECKING:
    from ..data.engine.records import Records
    from ..data.engine.step import Maker, Step

OutArgument = Annotated[Path, typer.Argument(help="Folder of the set that is made.")]
CountOption = Annotated[int, typer.Option("--count", "-n", min=1, help="Samples in all.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")]
ShardSizeOption = Annotated[int, typer.Option(min=1, help="Samples in a shard.")]
ShardsOption = Annotated[int, typer.Option(min=1, help="Shards that share the inputs.")]
ProcessesOption = Annotated[int, typer.Option(min=1, help="Of this machine, at work at once.")]
RayOption = Annotated[
    str | None, typer.Option(help="Spread over Ray instead: 'local', 'auto' or an address.")
]
TextsOption = Annotated[
    list[Path] | None, typer.Option(help="Texts to print: .txt, .jsonl, .parquet; repeatable.")
]
FontsOption = Annotated[list[Path] | None, typer.Option(help="Folders of fonts; repeatable.")]
SideOption = Annotated[
    int, typer.Option(min=128, max=4096, help="Pictures have at most this squared in pixels.")
]
StrengthOption = Annotated[float, typer.Option(min=0, max=1, help="Of damage; 0: none.")]
LicenceOption = Annotated[str, typer.Option(help="Terms of the inputs, for the record.")]
TurnsOption = Annotated[int, typer.Option(min=1, help="Most questions about a picture.")]


@group.command()
@plain_errors
def render(
    out: OutArgument,
    count: CountOption = 1000,
    kinds: Annotated[
        str | None, typer.Option(help="Such as 'table,chart=3': names and weights; default: all.")
    ] = None,
    texts: TextsOption = None,
    fonts: FontsOption = None,
    side: SideOption = 448,
    larger: Annotated[
        float, typer.Option(min=0.5, max=8, help="Print so many times larger, less of it.")
    ] = 1.0,
    strength: StrengthOption = 1.0,
    among: Annotated[
        float,
        typer.Option(min=0, max=1, help="Chance that a page stands before a ground of things."),
    ] = 0.0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Fonts, texts and things that training never sees.")
    ] = False,
    turns: TurnsOption = 4,
    licence: LicenceOption = "",
    seed: SeedOption = 0,
    shard_size: ShardSizeOption = 1000,
    processes: ProcessesOption = 1,
    ray: RayOption = None,
) -> None:
    """Draw pages, tables, forms, charts, web pages and things, with questions and their truth."""
    from ..data.engine import objects
    from ..data.engine.compose import Compose
    from ..data.engine.corpus import read_corpus
    from ..data.engine.faces import find_faces
    from ..data.engine.pages import Setting
    from ..data.engine.render import Render, choose_kinds
    from ..data.engine.run import shards_of

    chosen, missing = choose_kinds(kinds)
    for kind, reason in missing.items():
        typer.echo(f"left out {kind}: {reason}", err=True)
    corpus = read_corpus(texts or (), held_out=held_out, licence=licence)
    faces = find_faces(fonts or (), held_out=held_out)
    if among and (reason := objects.missing()):
        raise ResourceError(f"--among: {reason}")
    maker = Render(Setting(corpus, faces, side, strength, held_out, larger), chosen, seed, among)
    steps = (Compose(turns=turns, held_out=held_out),)
    _make(maker, steps, out, shards_of(count, shard_size), processes, ray, shard_size, count)


@group.command()
@plain_errors
def label(
    folder: Annotated[Path, typer.Argument(help="Pictures with text in them.")],
    out: OutArgument,
    sure: Annotated[float, typer.Option(help="Confidence from which a line is believed.")] = 0.9,
    share: Annotated[float, typer.Option(help="Of a picture's lines that must be.")] = 0.7,
    turns: TurnsOption = 4,
    licence: LicenceOption = "",
    seed: SeedOption = 0,
    shards: ShardsOption = 1,
    processes: ProcessesOption = 1,
    ray: RayOption = None,
) -> None:
    """Read pictures with RapidOCR; what it is sure of becomes the truth."""
    from ..data.engine.compose import Compose
    from ..data.engine.label import Label, find_pictures

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not find_pictures(folder):
        raise InputError(f"{folder}: no pictures in it")
    maker = Label(folder, shards, licence, sure, share, seed)
    _make(maker, (Compose(turns=turns),), out, shards, processes, ray)


@group.command()
@plain_errors
def latex(
    out: OutArgument,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="PDF and LaTeX files or folders; default: what this machine has."),
    ] = None,
    made_up: Annotated[
        int, typer.Option(min=0, help="Pieces of made-up LaTeX in each shard; needs a TeX.")
    ] = 0,
    pages: Annotated[int, typer.Option(min=1, help="Most pages of one PDF.")] = 40,
    parts: Annotated[int, typer.Option(min=1, help="Pictures from a page of a PDF.")] = 2,
    texts: TextsOption = None,
    side: SideOption = 448,
    strength: StrengthOption = 1.0,
    turns: TurnsOption = 4,
    licence: LicenceOption = "",
    seed: SeedOption = 0,
    shards: ShardsOption = 1,
    processes: ProcessesOption = 1,
    ray: RayOption = None,
) -> None:
    """Pages of PDF documents with their text; LaTeX with its source and its formulae."""
    from ..data.engine.compose import Compose
    from ..data.engine.corpus import read_corpus
    from ..data.engine.latex import Pages, need_tex
    from ..data.engine.sources import find_documents

    for path in paths or ():
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    documents = tuple(find_documents(paths or (), licence))
    if not documents and not made_up:
        raise InputError("no PDF or LaTeX found; name files, or give --made-up")
    if made_up or any(d.path.suffix == ".tex" for d in documents):
        need_tex()
    corpus = read_corpus(texts or ()) if made_up else None
    maker = Pages(documents, shards, seed, side, strength, parts, pages, made_up, corpus)
    _make(maker, (Compose(turns=turns),), out, shards, processes, ray)


@group.command()
@plain_errors
def filter(
    out: OutArgument,
    paths: Annotated[list[str], typer.Argument(help="Files, folders or patterns of records.")],
    least_side: Annotated[int, typer.Option(min=1, help="Shorter side, in pixels.")] = 64,
    aspect: Annotated[float, typer.Option(help="Longer side over shorter, at most.")] = 6.0,
    languages: Annotated[str, typer.Option(help="Of answers: en, zh; '' for any.")] = "en,zh",
    least_words: Annotated[int, typer.Option(min=0, help="Of an answer.")] = 2,
    most_words: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 2000,
    unsafe: Annotated[
        Path | None, typer.Option(help="A file of words that leave a record out, one a line.")
    ] = None,
    distance: Annotated[
        int, typer.Option(min=-1, help="Bits of 64 in which doubles differ; -1: keep doubles.")
    ] = 3,
    images: ImagesOption = None,
    question: QuestionOption = None,
    allow_outside: OutsideOption = False,
    licence: LicenceOption = "",
    shards: ShardsOption = 1,
    processes: ProcessesOption = 1,
    ray: RayOption = None,
) -> None:
    """Leave out small, long, foreign, noisy, unsafe and double records; each reason is counted."""
    from ..data.engine.filter import Rules, read_words
    from ..data.engine.records import Records
    from ..data.sft import Options

    own = read_words(unsafe) if unsafe is not None else ()
    spoken = tuple(_listed(languages))
    rules = Rules(least_side, aspect, spoken, least_words, most_words, own, distance)
    options = Options(question, images, allow_outside)
    records = Records(tuple(paths), shards, None, licence, options)
    _make(_without_doubles(records, distance), rules.steps(), out, shards, processes, ray)


@group.command()
@plain_errors
def pack(
    out: OutArgument,
    paths: Annotated[list[str], typer.Argument(help="Files, folders or patterns of records.")],
    distance: Annotated[
        int, typer.Option(min=-1, help="Bits of 64 in which doubles differ; -1: keep doubles.")
    ] = -1,
    images: ImagesOption = None,
    question: QuestionOption = None,
    allow_outside: OutsideOption = False,
    licence: LicenceOption = "",
    seed: SeedOption = 0,
    shards: ShardsOption = 1,
    processes: ProcessesOption = 1,
    ray: RayOption = None,
) -> None:
    """Shuffle records of several sources into webdataset shards with an index."""
    from ..data.engine.records import Records
    from ..data.sft import Options

    options = Options(question, images, allow_outside)
    records = Records(tuple(paths), shards, seed, licence, options)
    _make(_without_doubles(records, distance), (), out, shards, processes, ray)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _without_doubles(records: Records, distance: int) -> Records:
    from dataclasses import replace

    from ..data.engine.filter import duplicates

    if distance < 0:
        return records
    double = set()
    with progress("comparing") as show:
        for index, found in duplicates(records, distance):
            if found:
                double.add(index)
            if index % 64 == 0:
                show(index, len(records))
    return replace(records, left_out=frozenset(double))


def _make(
    maker: Maker,
    steps: tuple[Step, ...],
    out: Path,
    shards: int,
    processes: int,
    ray: str | None,
    shard_size: int | None = None,
    count: int | None = None,
) -> None:
    from ..data.engine.run import Job, described, run

    made = {"maker": type(maker).__name__, **described(maker), "steps": [*map(repr, steps)]}
    job = Job(maker, steps, out, shards, shard_size, count, made)
    with progress("shards") as show:
        stats = run(job, processes, ray, show)
    typer.echo(f"{out}: {stats.samples} samples, {stats.pictures} pictures, {stats.words} words")
    for kind, number in stats.kinds.most_common():
        typer.echo(f"  {kind:<24}{number}")
    for step, reasons in sorted(stats.rejects.items()):
        for reason, number in reasons.most_common():
            typer.echo(f"  refused: {step}: {reason} {number}")
    if not stats.samples:
        raise InputError(f"{out}: nothing came through; the reasons are in {out / 'rejects'}")
    source = open_records(str(out), None, None, None, False)
    write_sheet_of(out / "contact.html", out, source, 48, 0)
