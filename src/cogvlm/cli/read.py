"""``cogvlm read``: what stands in pictures, as the model's own head reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CogVLMError, InputError
from .shared import (
    DeviceOption,
    JsonOption,
    ModelOption,
    Precision,
    PrecisionOption,
    app,
    load,
    plain_errors,
    quiet_libraries,
)


@app.command()
@plain_errors
def read(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of print.")],
    model: ModelOption = "nano",
    precision: PrecisionOption = Precision.auto,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write out the print in pictures, without asking the language model; for nano."""
    quiet_libraries()
    for image in images:
        if not image.is_file():
            raise InputError(f"{image}: no such picture")
    processor = load(model, precision, device, None, False).processor
    failed = 0
    for number, image in enumerate(images):
        try:
            text = processor.transcribe(image)
        except InputError as error:  # one broken picture does not cost the others
            if len(images) == 1:
                raise
            failed += 1
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            continue
        if as_json:
            typer.echo(json.dumps({"image": str(image), "text": text}, ensure_ascii=False))
        else:
            typer.echo(text if number == 0 else f"\n{text}")
    if failed:
        raise CogVLMError(f"{failed} of {len(images)} pictures could not be read")
