"""Stage "answer": experts and adapter learn through the frozen language model.

The loss is on the answer and its end token alone.  The answer is spelled in the word pieces that
the picture's cells cut it into (see :mod:`cogvlm.train.align`), so that reading is repeating.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor

from ..config import CogVLMConfig
from ..models.checkpoint import is_vision
from ..models.cogvlm import CogVLMForCausalLM
from ..processor import Processor
from ..processor.messages import user
from ..score import cer
from ..tensors import save_tensors
from .align import CellPieces
from .lines import LineBatch, LinePools


@dataclass(frozen=True)
class Prompt:
    """Ids before and after the image block of one question."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, processor: Processor, question: str) -> Prompt:
        """What the processor makes of a picture and ``question``."""
        encoded = processor.encode([user(Picture.new("RGB", (56, 56)), question)])
        types = encoded.token_type_ids.tolist()
        first = types.index(1)
        last = len(types) - types[::-1].index(1)
        ids = encoded.input_ids.tolist()
        return cls(ids[:first], ids[last:])


@dataclass
class AnswerObjective:
    """Cross-entropy of answers about lines, through the whole model."""

    trained: CogVLMForCausalLM
    processor: Processor
    prompts: list[Prompt]
    train_pools: LinePools
    eval_pools: LinePools
    scales: dict[str, float]  # of learning rates: tower, adapter, experts, text
    device: torch.device
    seed: int
    workers: int = 1
    eval_count: int = 1

    def __post_init__(self) -> None:
        self.forward: Callable[..., Any] = self.trained  # as it is called in training
        config: CogVLMConfig = self.trained.config
        self.cell = [config.vision.patch_size * patches for patches in config.vision.merge]
        self.pieces = CellPieces(self.processor.tokenizer)
        self.end = self.processor.tokenizer.eos_id
        for name, parameter in self.trained.named_parameters():
            parameter.requires_grad_(is_vision(name) and self.lr_scale(name) > 0)

    def lr_scale(self, name: str) -> float:
        """See :class:`cogvlm.train.loop.Objective`."""
        if ".vision.ctc." in name:  # learns in a stage of its own
            return 0.0
        if ".vision.transformer." in name or ".patch_embedding." in name:
            return self.scales["tower"]
        if ".vision_expert_text_" in name:
            return self.scales["text"]
        return self.scales["adapter" if name.startswith("model.vision.") else "experts"]

    def batches(self, start: int) -> Iterator[Any]:
        """See :class:`cogvlm.train.loop.Objective`."""
        yield from enumerate(self.train_pools.batches(start, self.workers), start)

    def inputs(self, batch: LineBatch, prompt: Prompt, answers: bool) -> dict[str, Tensor]:
        """Arguments of the model for a batch of lines of one size, padded on the left."""
        sides = zip(batch.pixels.shape[-2:], self.cell, strict=True)
        rows, cols = (side // cell for side, cell in sides)
        image = rows * cols + 2
        block = [*prompt.before, *[self.processor.image_token_id] * image]
        told = self.readings(batch)
        encode = self.processor.tokenizer.encode
        heads = [[*block, *(encode(text) if text else []), *prompt.after] for text in told]
        tails = self.answers(batch, cols, told) if answers else [[] for _ in heads]
        length = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
        ids = np.full((len(tails), length), self.processor.image_token_id, np.int64)
        types, mask = np.zeros_like(ids), np.zeros_like(ids)
        labels = np.full_like(ids, -100)
        for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            start = length - len(head) - len(tail)
            ids[i, start:] = head + tail
            mask[i, start:] = 1
            types[i, start + len(prompt.before) : start + len(block)] = 1
            labels[i, length - len(tail) :] = tail
        arrays = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
        if answers:
            arrays["labels"] = labels
        tensors = {k: torch.from_numpy(v).to(self.device) for k, v in arrays.items()}
        return {**tensors, "pixel_values": torch.from_numpy(batch.pixels).to(self.device)}

    def readings(self, batch: LineBatch) -> list[str]:
        """What stands behind the picture of every line: nothing, in this stage."""
        return [""] * len(batch.texts)

    def answers(self, batch: LineBatch, cols: int, told: Sequence[str]) -> list[list[int]]:
        """Ids of the answer to every line of ``cols`` cells behind which ``told`` stands, and its
        end.
        """
        assert self.end is not None
        return [
            [*self.pieces.line(text, xs, cols, self.cell[1]), self.end]
            for text, xs in zip(batch.texts, batch.centers, strict=True)
        ]

    def loss(self, batch: tuple[int, LineBatch]) -> tuple[Tensor, dict[str, float]]:
        """See :class:`cogvlm.train.loop.Objective`."""
        index, lines = batch
        choice = int(np.random.default_rng((self.seed, index)).integers(len(self.prompts)))
        inputs = self.inputs(lines, self.prompts[choice], answers=True)
        loss = self.forward(**inputs).loss
        return loss, {"tokens": float(inputs["input_ids"].numel())}

    def evaluate(self) -> dict[str, float]:
        """Character error rate of greedy answers on fonts and texts that never train."""
        predictions: list[str] = []
        truths: list[str] = []
        for index in range(self.eval_count):
            for batch in self.eval_pools.pool(index):
                inputs = self.inputs(batch, self.prompts[0], answers=False)
                model: Any = self.trained  # the stub of generate takes itself twice
                out: Tensor = model.generate(
                    **inputs, max_new_tokens=48, do_sample=False, eos_token_id=self.end
                )
                new = out[:, inputs["input_ids"].shape[1] :].tolist()
                predictions += [self.processor.decode(row).strip() for row in new]
                truths += batch.texts
        for prediction, truth in list(zip(predictions, truths, strict=True))[::24]:
            print(f"  {truth!r} -> {prediction!r}")
        return {"cer": cer(predictions, truths), "lines": float(len(truths))}

    def export(self, folder: Path) -> None:
        """Write config.json, and the vision part as bfloat16 into model.safetensors."""
        state = self.trained.state_dict()
        tensors = {
            name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
            for name, tensor in state.items()
            if is_vision(name)
        }
        save_tensors(tensors, folder / "model.safetensors")
        self.trained.config.to_json_file(folder / "config.json", use_diff=True)
