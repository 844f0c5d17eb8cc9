"""``cogvlm doctor`` and ``cogvlm models``: what there is and what runs here."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .shared import JsonOption, app, plain_errors, quiet_libraries


@app.command()
@plain_errors
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what this machine has, and what would run on it."""
    quiet_libraries()
    from ..doctor import report

    found = report()
    typer.echo(json.dumps(found, ensure_ascii=False) if as_json else _doctor_text(found))


@app.command()
@plain_errors
def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Only these, with or without owner.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the released models: their terms, the memory each needs, whether it fits here."""
    quiet_libraries()
    from ..catalog import CHECKPOINTS, find
    from ..devices import find_devices
    from ..memory import table

    chosen = [find(name) for name in names] if names else list(CHECKPOINTS)
    rows = table(chosen, find_devices())
    typer.echo(json.dumps(rows, ensure_ascii=False) if as_json else _models_text(rows))


def _models_text(rows: list[dict[str, Any]]) -> str:
    formats = ("bfloat16", "int8", "int4", "int4-all")
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
            "here: what --precision auto takes, by the memory that is free now.",
            *sorted(terms),
            "Terms change: what the model's page says decides.",
        ]
    )


def _doctor_text(found: dict[str, Any]) -> str:
    lines = [f"{name:16} {version}" for name, version in found["versions"].items()]
    for device in found["devices"]:
        memory = device["memory_gb"]
        size = f"{memory:.0f} GB" if memory is not None else "memory unknown"
        free = f"{device['free_gb']:.1f} GB free" if device["free_gb"] is not None else ""
        said = ", ".join(filter(None, [device["name"], size, free, device["advice"]]))
        lines.append(f"{'device':16} {said}")
    for fit in found["models"]:
        where = f"yes, on {fit['device']}" if fit["device"] else "no"
        needs = f"about {fit['needs_gb']:.1f} GB"
        lines.append(f"{fit['model']:16} {fit['precision']} ({needs}): {where}; {fit['how']}")
    language = found["language_model"] or "not here yet: fetched at the first use of nano (93 MB)"
    return "\n".join(
        [*lines, f"{'cache':16} {found['cache']}", f"{'language model':16} {language}"]
    )
