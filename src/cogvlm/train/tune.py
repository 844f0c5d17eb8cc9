"""Stage "tune": any model of the family, any of its parts, on conversations of one's own.

What is trained is named: whole parts, LoRAs beside frozen weights, or both.  The loss is on every
answer of a conversation and on nothing else; a step's loss is the mean over all its answer tokens,
however its rows are divided into micro-batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapter
from ..data.sft import Mix, Record, RecordError
from ..engine import generate
from ..errors import ConfigError, InputError
from ..load import Loaded, load
from ..models.cogvlm import CogVLMForCausalLM
from ..processor import Batch, Encoded
from ..score import cer
from ..settings import GenerationSettings
from .compute import Compute, recompute
from .loop import Pieces
from .quantised import let_gradients_through
from .recipe import Part, TuneRecipe
from .rows import Limit, Rows, Steps, encode, labelled, micro_batches


@dataclass(frozen=True)
class Micro:
    """A piece of a step: its rows joined, and the answer tokens of the whole step."""

    batch: Batch
    count: int


def inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """A batch as the model's arguments."""
    made: dict[str, Any] = {
        name: torch.from_numpy(getattr(batch, name)).to(device)
        for name in ("input_ids", "token_type_ids", "attention_mask", "labels")
    }
    made["pixel_values"] = [torch.from_numpy(p).to(device) for p in batch.pixel_values] or None
    if batch.cross_pixel_values:
        large = [torch.from_numpy(p).to(device) for p in batch.cross_pixel_values]
        made["cross_pixel_values"] = large
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
    lora: Any = None  # peft's configuration, once it is put in
    origin: tuple[int, int] = (0, 0)  # a step, and the first record of it
    seen: set[str] = field(default_factory=set)  # of the records left out, those reported

    def __post_init__(self) -> None:
        recipe, model = self.recipe, self.trained
        self.stored = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if recipe.lora is not None:
            lora = recipe.lora
            alpha = lora.rank if lora.alpha is None else lora.alpha
            self.lora = adapter.inject(model, lora.targets, lora.rank, alpha, lora.dropout)
        _choose_parameters(model, recipe)
        let_gradients_through(model)
        if recipe.checkpointing:
            recompute(model)
        self.steps = Steps(
            self.train,
            self.loaded.processor,
            recipe.batch_size * recipe.accumulate,
            Limit(recipe.max_tokens, recipe.too_long == "cut"),
        )
        self.measured = list(self._held_out())

    @property
    def trained(self) -> CogVLMForCausalLM:
        """The whole model; what is frozen needs no gradient."""
        return self.loaded.model

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
        for rows in self.steps.stream(self._first(start), self.recipe.workers):
            self._report(rows.left_out)
            yield self.pieces(rows)

    def pieces(self, rows: Rows) -> Pieces:
        """A step's rows as micro-batches that know the answer tokens of all of them."""
        count = sum(map(labelled, rows.rows))
        groups = micro_batches(rows.rows, self.recipe.batch_size)
        return Pieces([Micro(self.loaded.processor.batch(group), count) for group in groups])

    # --- training ---

    def lr_scale(self, name: str) -> float:
        """See :class:`cogvlm.train.loop.Objective`."""
        if adapter.is_lora(name):
            assert self.recipe.lora is not None
            return self.recipe.lora.lr
        return self.recipe.parts[adapter.part_of(name)].lr

    def weight_decay(self, name: str) -> float | None:
        """See :class:`cogvlm.train.loop.Placed`."""
        if adapter.is_lora(name):
            assert self.recipe.lora is not None
            return self.recipe.lora.weight_decay
        return self.recipe.parts[adapter.part_of(name)].weight_decay

    def loss(self, batch: Micro) -> tuple[Tensor, dict[str, float]]:
        """The share of a micro-batch in its step's mean loss."""
        given = inputs(batch.batch, self.trained.device)
        loss = self.trained(**given, num_items_in_batch=max(1, batch.count)).loss
        rows, length = batch.batch.input_ids.shape
        answers = int((batch.batch.labels[:, 1:] >= 0).sum())  # type: ignore[index]
        figures = {"rows": rows, "tokens": rows * length, "answer_tokens": answers}
        return loss, {k: float(v) for k, v in figures.items()}

    # --- measuring ---

    def evaluate(self) -> dict[str, Any]:
        """Loss of held-out answers; of the last ones exact matches, character errors, samples."""
        if not self.measured:
            return {}
        rows = self._eval_rows()
        total, count = 0.0, 0
        for group in micro_batches(rows, self.recipe.batch_size):
            tokens = sum(map(labelled, group))
            given = inputs(self.loaded.processor.batch(group), self.trained.device)
            total += float(self.trained(**given).loss) * tokens
            count += tokens
        found: dict[str, Any] = {"loss": total / max(1, count), "records": len(rows)}
        return {**found, **self._answers()}

    def _eval_rows(self) -> list[Encoded]:
        rows = []
        for record in self.measured:
            try:
                rows.append(encode(self.loaded.processor, record.messages, self.steps.limit)[0])
            except InputError as error:
                self._report([f"{record.where}: {error}"])
        return rows

    def _answers(self) -> dict[str, Any]:
        records = self.measured[: self.recipe.eval_answers]
        if not records:
            return {}
        said: list[str] = []
        settings = GenerationSettings(self.recipe.max_new_tokens)
        processor = self.loaded.processor
        for i in range(0, len(records), self.recipe.batch_size):
            group = records[i : i + self.recipe.batch_size]
            batch = processor.batch([processor.encode(r.messages[:-1]) for r in group])
            said += [answer.text.strip() for answer in generate(self.loaded, batch, settings)]
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

    def export(self, folder: Path) -> None:
        """Write the adapter, see :mod:`cogvlm.adapter`; whole parts in the dtype of the model."""
        values = {
            name: p.detach().float() if adapter.is_lora(name) else p.detach().to(self.stored)
            for name, p in self.trained.named_parameters()
            if p.requires_grad
        }
        adapter.save(folder, values, self.lora, self.loaded.name)


def _choose_parameters(model: nn.Module, recipe: TuneRecipe) -> None:
    """Freeze what is not named; what trains becomes float32."""
    chosen: dict[str, Part] = {k: v for k, v in recipe.parts.items() if v.lr > 0}
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        lora = adapter.is_lora(name)
        part = adapter.part_of(name)
        trains = lora or part in chosen
        if trains and not lora:
            module = model.get_submodule(name.rpartition(".")[0])
            plain = type(parameter.data) is Tensor and parameter.is_floating_point()
            if not plain or type(module).__module__.startswith("bitsandbytes"):
                raise ConfigError(
                    f"parts: {part!r} is quantised ({name}); load it in bfloat16 (precision), or "
                    "give it a LoRA"
                )
            found.add(part)
        parameter.requires_grad_(False)
        if trains:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
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


def tune(recipe: TuneRecipe) -> TuneObjective:
    """The objective of a recipe: model and data opened.

    Raises:
        ConfigError: impossible values.
        InputError: data that cannot be read.
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
    loaded = load(recipe.model, recipe.precision, recipe.device, recipe.tokenizer)
    return TuneObjective(loaded, train, held_out, recipe)
