"""``cogvlm train``, ``merge``, ``render`` and ``quantize``: commands that write models and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .shared import Stored, app, plain_errors, quiet_libraries


@app.command()
@plain_errors
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/nano-read.yaml.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the last checkpoint, or not.")
    ] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what memory it needs, by part.")
    ] = False,
    device_memory: Annotated[
        str | None, typer.Option(metavar="24GB", help="With --plan: on a card, or 8x24GB.")
    ] = None,
) -> None:
    """Train what a recipe says; stop it with Ctrl-C, run it again to go on."""
    if not recipe.is_file():
        raise InputError(f"{recipe}: no such recipe")
    if device_memory is not None and not plan:
        raise InputError("--device-memory is for --plan")
    quiet_libraries()
    if plan:
        from ..train.told import report

        for line in report(recipe, changes or [], device_memory):
            typer.echo(line)
        return
    from ..train.run import run as run_recipe

    folder = run_recipe(recipe, changes or [], out, resume)
    typer.echo(str(folder))


@app.command()
@plain_errors
def merge(
    model: Annotated[str, typer.Argument(help="'nano', a folder, or a hub name 'owner/name'.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a finished run of 'train'.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Write a model again with what was tuned on it in its weights."""
    quiet_libraries()
    from ..train.merge import merge as merge_folders

    typer.echo(str(merge_folders(model, adapter, out)))


@app.command()
@plain_errors
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
    from ..data.render import HELD_OUT_SEED, line_stream, write_lines

    stream = line_stream(
        HELD_OUT_SEED if seed is None else seed,
        held_out=held_out,
        min_chars=min_chars,
        max_chars=max_chars,
        strength=strength,
    )
    typer.echo(str(write_lines(folder, stream, count)))


@app.command()
@plain_errors
def quantize(
    model: Annotated[str, typer.Argument(help="A folder, or a hub name 'owner/name'.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    precision: Annotated[Stored, typer.Option(help="Number format of the matrices.")] = Stored.int4,
) -> None:
    """Write a model again in eight or four bits a weight; needs the memory of one file of it."""
    quiet_libraries()
    from ..load import quantise_folder

    typer.echo(str(quantise_folder(model, out, precision.value)))
