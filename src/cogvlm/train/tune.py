"""Stage "tune": any model of the family, any of its parts, on conversations of one's own.

What is trained is named: whole parts, LoRAs beside frozen weights, or both.  The loss is on every
answer of a conversation and on nothing else; a step's loss is the mean over all its answer tokens,
however its rows are divided into micro-batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import adapter
from ..data.sft import Mix, Record, RecordError
from ..engine import generate
from ..errors import ConfigError, InputError
from ..linear import QuantisedLinear
from ..load import Loaded, load
from ..models.cogvlm import CogVLMForCausalLM
from ..processor import Batch, Encoded, assistant, user
from ..processor.encode import IGNORED, Ids
from ..score import cer
from ..settings import GenerationSettings
from .compiled import compile_layers
from .compute import Compute, recompute
from .distributed import World, dividing, in_step, share_of, whole, widen
from .loop import Pieces
from .packing import bins, packed
from .quantised import let_gradients_through
from .recipe import Part, TuneRecipe
from .rows import Limit, Rows, Steps, at_resolution, encode, labelled, micro_batches
from .sight import Sight, add_head, is_head


@dataclass(frozen=True)
class Micro:
    """A piece of a step: its rows joined, and the answer tokens of the whole step."""

    batch: Batch
    count: int
    rows: int
    places: Ids | None = None  # of each token in its own row, where rows are packed
    patches: int = 1  # image tokens of the whole step, markers left out


def inputs(batch: Batch, device: torch.device, places: Ids | None = None) -> dict[str, Any]:
    """A batch as the model's arguments."""
    made: dict[str, Any] = {
        name: torch.from_numpy(getattr(batch, name)).to(device)
        for name in ("input_ids", "token_type_ids", "attention_mask", "labels")
    }
    made["pixel_values"] = [torch.from_numpy(p).to(device) for p in batch.pixel_values] or None
    if batch.cross_pixel_values:
        large = [torch.from_numpy(p).to(device) for p in batch.cross_pixel_values]
        made["cross_pixel_values"] = large
    if places is not None:
        del made["attention_mask"]
        made["sequence_positions"] = torch.from_numpy(places).to(device)
    return made


@dataclass
class TuneObjective:
    """See :class:`cogvlm.train.loop.Objective`; everything that is not named stays frozen.

    Raises:
        ConfigError: a part or a target that the model does not have, or that is quantised.
    """

    loaded: Loaded
    train: Mix
    held_out: Mix | None
    recipe: TuneRecipe
    world: World = field(default_factory=World)  # the processes of the run
    apart: bool = True  # whether a process may ask the model what the others do not
    lora: Any = None  # peft's configuration, once it is put in
    origin: tuple[int, int] = (0, 0)  # a step, and the first record of it
    seen: set[str] = field(default_factory=set)  # of the records left out, those reported

    def __post_init__(self) -> None:
        recipe, model = self.recipe, self.trained
        self.stored = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.lora = make_ready(model, recipe, wide=False)
        self.forward: Callable[..., Any] = model  # as it is called in training
        self.sight = Sight(model) if recipe.image_loss else None
        if self.sight is not None and self.world.size > 1:
            raise ConfigError("image_loss is known in one process only; leave it out")
        self.steps = Steps(
            self.train,
            self.loaded.processor,
            recipe.batch_size * recipe.accumulate,
            Limit(recipe.max_tokens, recipe.too_long == "cut"),
            (self.rows.rank, self.rows.size),
        )
        for side in recipe.resolutions.values():  # what is impossible is told now
            at_resolution(self.steps, model.config, side)
        self.measured = list(self._held_out())

    @property
    def trained(self) -> CogVLMForCausalLM:
        """The whole model; what is frozen needs no gradient."""
        return self.loaded.model

    @property
    def rows(self) -> World:
        """The processes that divide the rows of a step."""
        return dividing(self.world, self.recipe.parallel)

    # --- data ---

    def _held_out(self) -> Iterator[Record]:
        """The first usable records that never train; always the same."""
        if self.held_out is None:
            return
        for index in range(min(self.recipe.eval_count, len(self.held_out))):
            try:
                yield self.held_out[index]
            except RecordError as error:
                self._report([str(error)])

    def _report(self, left_out: Sequence[str]) -> None:
        for line in left_out:
            if line not in self.seen:
                self.seen.add(line)
                print(f"left out: {line}", file=sys.stderr, flush=True)

    def position(self, step: int) -> dict[str, Any]:
        """See :class:`cogvlm.train.loop.Placed`."""
        return self.train.state(self._first(step))

    def _first(self, step: int) -> int:
        return self.origin[1] + (step - self.origin[0]) * self.steps.size

    def resume(self, step: int, position: dict[str, Any]) -> None:
        """See :class:`cogvlm.train.loop.Placed`; the size of a step may have changed."""
        self.origin = (step, self.train.resume(position))

    def batches(self, start: int) -> Iterator[Pieces]:
        """See :class:`cogvlm.train.loop.Objective`."""
        sides: dict[int, int | None] = {0: None, **self.recipe.resolutions}
        begins = sorted(sides)
        for begin, end in zip(begins, [*begins[1:], None], strict=True):
            if end is not None and end <= start:
                continue
            count = None if end is None else end - max(begin, start)
            steps = at_resolution(self.steps, self.trained.config, sides[begin])
            stream = steps.stream(self._first(max(begin, start)), self._workers)
            for rows in islice(stream, count):
                self._report(rows.left_out)
                yield self.pieces(rows)

    @property
    def _workers(self) -> int:
        """Processes that prepare rows; a head on an accelerator reads lines in this one alone."""
        reads = self.loaded.processor.reader is not None
        return 0 if reads and self.trained.device.type != "cpu" else self.recipe.workers

    def pieces(self, rows: Rows) -> Pieces:
        """A step's rows as micro-batches that know the answer tokens of all of them."""
        if self.recipe.packing:
            assert self.recipe.max_tokens is not None
            groups = bins(rows.rows, self.recipe.max_tokens)
        else:
            groups = micro_batches(rows.rows, self.recipe.batch_size)
        patches = sum(_patches(row) for row in rows.rows)
        groups, count = in_step(self.rows, groups, sum(map(labelled, rows.rows)), self._blank)
        micros = [self._micro(group, count) for group in groups]
        return Pieces([replace(micro, patches=max(1, patches)) for micro in micros])

    def _micro(self, rows: list[Encoded], count: int) -> Micro:
        learnt = sum(map(bool, map(labelled, rows)))
        if self.recipe.packing:
            batch, places = packed(self.loaded.processor, rows)
            return Micro(batch, count, learnt, places)
        return Micro(self.loaded.processor.batch(rows), count, learnt)

    def _blank(self, picture: bool) -> Encoded:
        """A row of which nothing is learnt, see :func:`cogvlm.train.distributed.in_step`."""
        parts = [Image.new("RGB", (32, 32))] if picture else []
        row = self.loaded.processor.encode([user(*parts, "."), assistant(".")], train=True)
        assert row.labels is not None
        return replace(row, labels=np.full_like(row.labels, IGNORED))

    # --- training ---

    def lr_scale(self, name: str) -> float:
        """See :class:`cogvlm.train.loop.Objective`."""
        if is_head(name):
            return 1.0
        if adapter.is_lora(name):
            assert self.recipe.lora is not None
            return self.recipe.lora.lr
        return self.recipe.parts[adapter.part_of(name)].lr

    def weight_decay(self, name: str) -> float | None:
        """See :class:`cogvlm.train.loop.Placed`."""
        if is_head(name):
            return None
        if adapter.is_lora(name):
            assert self.recipe.lora is not None
            return self.recipe.lora.weight_decay
        return self.recipe.parts[adapter.part_of(name)].weight_decay

    def loss(self, batch: Micro) -> tuple[Tensor, dict[str, float]]:
        """The share of a micro-batch in its step's mean loss."""
        given = inputs(batch.batch, self.trained.device, batch.places)
        loss = self.forward(**given, num_items_in_batch=max(1, batch.count)).loss
        answers = int((batch.batch.labels[:, 1:] >= 0).sum())  # type: ignore[index]
        seen = 0.0
        if self.sight is not None:
            share = self.sight.loss(given["token_type_ids"], given["pixel_values"]) / batch.patches
            loss, seen = loss + self.recipe.image_loss * share, float(share.detach())
        figures = {
            **({"image_loss": seen} if self.sight is not None else {}),
            "rows": batch.rows,
            "tokens": batch.batch.input_ids.size,
            "answer_tokens": answers,
        }
        return loss, {k: float(v) for k, v in figures.items()}

    # --- measuring ---

    def evaluate(self) -> dict[str, Any]:
        """Loss of held-out answers; of the last ones exact matches, character errors, samples.

        Processes divide the records, and all come to the same figures.
        """
        if not self.measured:
            return {}
        rows = self._eval_rows()
        groups = micro_batches(rows, self.recipe.batch_size)
        groups, _ = in_step(self.rows, groups, 0, self._blank)
        total, count = 0.0, 0
        for group in groups:
            tokens = sum(map(labelled, group))
            given = inputs(self.loaded.processor.batch(group), self.trained.device)
            total += float(self.trained(**given).loss) * tokens
            count += tokens
        totals, counts, sizes = zip(*self.rows.gather((total, count, len(rows))), strict=True)
        found = {"loss": sum(totals) / max(1, sum(counts)), "records": sum(sizes)}
        return {**found, **self._answers()}

    def _eval_rows(self) -> list[Encoded]:
        """Of the held-out records, those of this process."""
        rows = []
        for record in self.measured[self.rows.rank :: self.rows.size]:
            try:
                rows.append(encode(self.loaded.processor, record.messages, self.steps.limit)[0])
            except InputError as error:
                self._report([f"{record.where}: {error}"])
        return rows

    def _answers(self) -> dict[str, Any]:
        records = self.measured[: self.recipe.eval_answers]
        if not records:
            return {}
        if self.apart:
            rank, size = self.rows.rank, self.rows.size
            said = [""] * len(records)
            for i, answers in enumerate(self.rows.gather(self._said(records[rank::size]))):
                said[i::size] = answers
        else:
            said = self._said(records)
        truths = [r.answers[-1].strip() for r in records]
        right = sum(a == b for a, b in zip(said, truths, strict=True))
        samples = [
            {"where": Path(r.where).name, "truth": truth, "answer": answer}
            for r, truth, answer in zip(records, truths, said, strict=True)
        ]
        return {
            "exact": right / len(truths),
            "cer": cer(said, truths),
            "answers": len(truths),
            "samples": samples[: self.recipe.samples],
        }

    def _said(self, records: Sequence[Record]) -> list[str]:
        """What the model answers to the last question of each."""
        said: list[str] = []
        settings = GenerationSettings(self.recipe.max_new_tokens)
        processor = self.loaded.processor
        for i in range(0, len(records), self.recipe.batch_size):
            group = records[i : i + self.recipe.batch_size]
            batch = processor.batch([processor.encode(r.messages[:-1]) for r in group])
            said += [answer.text.strip() for answer in generate(self.loaded, batch, settings)]
        return said

    def export(self, folder: Path) -> None:
        """Write the adapter, see :mod:`cogvlm.adapter`; whole parts in the dtype of the model."""
        first = self.world.first
        found = self.trained.named_parameters()
        wanted = ((name, p) for name, p in found if p.requires_grad and not is_head(name))
        trained = {name: whole(share_of(p.detach()), p, first) for name, p in wanted}
        if not first:  # it only gave its share
            return
        values = {
            n: p.to(torch.float32 if adapter.is_lora(n) else self.stored)
            for n, p in trained.items()
            if p is not None
        }
        adapter.save(folder, values, self.lora, self.loaded.name)


def _patches(row: Encoded) -> int:
    """Image tokens of a row, begin and end markers left out."""
    return int((row.token_type_ids == 1).sum()) - 2 * len(row.pixel_values)


def make_ready(model: nn.Module, recipe: TuneRecipe, wide: bool = True) -> Any:
    """Put in the LoRA, freeze what is not named, and compute layers as asked; in place.

    What trains becomes float32, unless that is left to :func:`cogvlm.train.distributed.share`.

    Returns:
        peft's configuration of the LoRA, none where there is none.
    """
    put_in = None
    if recipe.lora is not None:
        lora = recipe.lora
        alpha = lora.rank if lora.alpha is None else lora.alpha
        put_in = adapter.inject(model, lora.targets, lora.rank, alpha, lora.dropout)
    _choose_parameters(model, recipe)
    if recipe.image_loss:
        add_head(model)
    if wide:
        widen(model)
    let_gradients_through(model)
    if recipe.compile:
        compile_layers(model)
    if recipe.checkpointing:
        recompute(model)
    return put_in


def _choose_parameters(model: nn.Module, recipe: TuneRecipe) -> None:
    """Freeze what is not named."""
    chosen: dict[str, Part] = {k: v for k, v in recipe.parts.items() if v.lr > 0}
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        lora = adapter.is_lora(name)
        part = adapter.part_of(name)
        trains = lora or part in chosen
        if trains and not lora:
            module = model.get_submodule(name.rpartition(".")[0])
            plain = type(parameter.data) in (Tensor, DTensor) and parameter.is_floating_point()
            foreign = type(module).__module__.startswith("bitsandbytes")
            if not plain or foreign or isinstance(module, QuantisedLinear):
                raise ConfigError(
                    f"parts: {part!r} is quantised ({name}); load it in bfloat16 (precision), or "
                    "give it a LoRA"
                )
            found.add(part)
        parameter.requires_grad_(trains)
    if missing := sorted(set(chosen) - found):
        raise ConfigError(f"parts: this model has no {missing[0]!r}")


def compute(recipe: TuneRecipe, objective: TuneObjective) -> Compute:
    """In what numbers the steps are computed: as asked, or as the weights are.

    Raises:
        ConfigError: what the weights do not allow.
    """
    plain = objective.stored is torch.float32
    kind = recipe.compute if recipe.compute != "auto" else "fp32" if plain else "bf16"
    if kind == "fp32" and not plain:
        raise ConfigError(
            f"compute fp32 needs float32 weights, these are {objective.stored}; take bf16"
        )
    return Compute(objective.trained.device, kind)


def tune(recipe: TuneRecipe, world: World | None = None) -> TuneObjective:
    """The objective of a recipe: model and data opened.

    Args:
        recipe: what to train on what.
        world: the processes of the run, none for one.

    Raises:
        ConfigError: impossible values.
        InputError: data that cannot be read, or a model that cannot be cut.
        CheckpointError: a model that cannot be loaded.
    """
    mixes: list[Mix | None] = []
    for part in ("train", "held_out"):
        wanted = part == "train" or recipe.held_out > 0
        mixes.append(
            Mix.open(list(recipe.data), recipe.seed, recipe.held_out, part, recipe.base)
            if wanted
            else None
        )
    train, held_out = mixes
    assert train is not None
    world = world or World()
    return TuneObjective(_loaded(recipe, world), train, held_out, recipe, world)


def _loaded(recipe: TuneRecipe, world: World) -> Loaded:
    """The model of a recipe; with ``tensor``, this process's share of it."""
    model, precision, tokenizer = recipe.model, recipe.precision, recipe.tokenizer
    if recipe.parallel != "tensor" or world.size == 1:
        return load(model, precision, recipe.device, tokenizer)
    if recipe.device == "cpu" and torch.accelerator.is_available():
        raise ConfigError(
            "parallel tensor takes the GPUs where there are any; leave device out, or hide them "
            "(CUDA_VISIBLE_DEVICES=)"
        )
    return load(model, precision, tokenizer=tokenizer, tp_plan="auto")
