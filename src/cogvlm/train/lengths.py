"""How long the rows of a recipe are, where its data and its tokenizer lie on this disk.

Of pictures the headers are read.  Nothing is fetched, and no model is made.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median_high

from ..data.sft import Mix, Record
from ..data.sft.check import length_of, measure_with, size_of
from ..errors import CogVLMError, InputError, ResourceError
from ..hub import SMOLLM2, language_model, language_model_ready, resolve
from ..processor import FastTokenizer, Image, Processor, SquarePixels, open_tokenizer
from ..processor.lines import LinePixels, guessed
from ..processor.tokenizer import read_json
from .recipe import TuneRecipe

LOOKED_AT = 2000  # records at most, in the order of training


@dataclass(frozen=True)
class Row:
    """What one record takes."""

    tokens: int
    answers: int  # of them, that are learnt
    images: int  # frames of films among them
    image_tokens: int  # of the largest, markers included
    height: int  # pixels that the tower sees of it
    width: int


@dataclass(frozen=True)
class Rows:
    """Rows that train."""

    longest: Row  # of every figure the most, whichever row it is of
    usual: Row  # of every figure the median
    looked_at: int  # records
    records: int  # that there are

    @property
    def all(self) -> bool:
        """Whether every record was looked at."""
        return self.looked_at == self.records


def look(recipe: TuneRecipe) -> Rows | str:
    """The rows of a recipe, or why they cannot be looked at.

    Raises:
        ConfigError: impossible values under ``data``.
        InputError: all records are longer than ``max_tokens``, or none can be used.
    """
    try:
        mix = Mix.open(list(recipe.data), recipe.seed, recipe.held_out, "train", recipe.base)
        processor = _processor(recipe)
    except (InputError, ResourceError) as error:
        return str(error)
    rows: list[Row] = []
    looked = min(len(mix), LOOKED_AT)
    for index in islice(range(len(mix)), looked):
        try:
            row = _row(processor, mix[index])
        except (CogVLMError, OSError):  # left out of training too
            continue
        if recipe.max_tokens is not None and row.tokens > recipe.max_tokens:
            if recipe.too_long == "drop":
                continue
            row = replace(row, tokens=recipe.max_tokens)
        rows.append(row)
    if not rows:
        raise InputError(
            f"none of the first {looked} records can be used; 'cogvlm data check --max-tokens' "
            "says why"
        )
    columns = list(zip(*(vars(row).values() for row in rows), strict=True))
    most, middle = (Row(*(int(pick(c)) for c in columns)) for pick in (max, median_high))
    return Rows(most, middle, looked, len(mix))


def _row(processor: Processor, record: Record) -> Row:
    shown = [v for v in record.visuals if isinstance(v, Image)]
    films = len(record.visuals) - len(shown)
    if isinstance(processor.pixels, LinePixels):  # the strips are known once they are cut
        encoded = processor.encode(record.messages, train=True)
        sizes = [(pixels.shape[2], pixels.shape[1]) for pixels in encoded.pixel_values]
        length = length_of(encoded)
    else:
        sizes = [size_of(image, False) for image in shown]
        length = measure_with(processor)(record, sizes)
    frames = processor.video.frames if films and processor.video is not None else 0
    grids = [processor.pixels.grid(*size) for size in sizes + [(1, 1)] * bool(films)]
    largest = max(grids, key=lambda grid: processor.pixels.tokens(*grid), default=None)
    images = len(sizes) + films * frames
    if largest is None:
        return Row(length.all, length.answers, 0, 0, 0, 0)
    high, wide = (side * processor.pixels.patch for side in largest)  # type: ignore[attr-defined]
    tokens = processor.pixels.tokens(*largest)
    return Row(length.all, length.answers, images, tokens, high, wide)


def _processor(recipe: TuneRecipe) -> Processor:
    """Of a model whose weights stay where they are.

    Raises:
        InputError: something of it is not on this disk.
    """
    if recipe.model != "nano" and not Path(recipe.model).expanduser().is_dir():
        raise InputError(f"model {recipe.model!r} is not on this disk")
    folder = resolve(recipe.model)
    values = read_json(folder / "config.json") or {}
    words = None
    if recipe.tokenizer is not None:
        words = open_tokenizer(recipe.tokenizer, values)
    elif name := values.get("language_model"):
        words = FastTokenizer.from_folder(_language_model(str(name)))
    made = Processor.from_folder(folder, words)
    if recipe.side is not None and isinstance(made.pixels, SquarePixels):
        made = replace(made, pixels=replace(made.pixels, size=recipe.side))
    return replace(made, reader=guessed)


def _language_model(name: str) -> Path:
    if name != SMOLLM2:
        if not Path(name).expanduser().exists():
            raise InputError(f"language model {name!r} is not on this disk")
        return language_model(name)
    ready = language_model_ready()
    if ready is None and os.environ.get("COGVLM_LANGUAGE_MODEL"):
        return language_model(name)
    if ready is None:
        raise InputError(f"language model {name!r} is not on this disk")
    return ready
