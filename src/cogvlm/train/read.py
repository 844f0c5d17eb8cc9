"""Stage "read": teach the tower to read characters, with no language model in the loop.

The renderer knows where every character stands, so the loss needs no alignment search: each
column of patches has ``SLOTS`` slots for the characters whose centres lie in it, in order, and
learns them by cross-entropy (class 0 = no character)::

    column        0    1    2    3            14 pixels each
    characters    T    h e  -    c            by their centres
    slots         T..  he.  ...  c..          '.' = class 0
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.vision import VisionModel
from ..score import cer
from ..tensors import save_tensors
from .lines import LineBatch, LinePools

SLOTS = 3  # characters a 14-pixel column can hold
FIRST = 0x20  # the alphabet is printable ASCII
CLASSES = 0x7F - FIRST + 1  # 95 characters and "none"


def column_labels(
    texts: list[str], centers: list[NDArray[np.float32]], cols: int, patch: int
) -> NDArray[np.int64]:
    """Classes of every slot, ``int64[N, cols, SLOTS]``; ``centers`` in pixels of the picture.

    >>> column_labels(["ab"], [np.array([3.0, 20.0], np.float32)], 2, 14)[0].tolist()
    [[66, 0, 0], [67, 0, 0]]
    """
    labels = np.zeros((len(texts), cols, SLOTS), np.int64)
    for row, (text, xs) in enumerate(zip(texts, centers, strict=True)):
        used = np.zeros(cols, np.int64)
        for char, x in zip(text, xs, strict=True):
            column = int(min(max(x // patch, 0), cols - 1))
            if used[column] < SLOTS:
                labels[row, column, used[column]] = ord(char) - FIRST + 1
                used[column] += 1
    return labels


def decode_columns(classes: NDArray[np.int64]) -> list[str]:
    """``int64[N, cols, SLOTS]`` -> the text of each row, slots read in order.

    >>> decode_columns(np.array([[[66, 0, 0], [67, 0, 0]]]))
    ['ab']
    """
    return ["".join(chr(c + FIRST - 1) for c in row.ravel() if c) for row in classes]


class Reader(nn.Module):
    """The tower with a head that names the characters of each patch column.

    The rows of patches of a line are averaged before the head: ``float[N, P, C]`` ->
    ``float[N, cols, SLOTS, CLASSES]``.
    """

    def __init__(self, vision: VisionModel, width: int) -> None:
        super().__init__()
        self.patch_embedding = vision.patch_embedding
        self.transformer = vision.transformer
        self.head = nn.Linear(width, SLOTS * CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """``float[N, 3, H, W]`` -> logits ``float[N, cols, SLOTS, CLASSES]``."""
        x, (rows, cols) = self.patch_embedding(pixels)
        return self.name(self.transformer(x)[:, 1:], rows, cols, rows)[:, 0]

    def name(self, patches: Tensor, rows: int, cols: int, tall: int) -> Tensor:
        """Tower output ``float[N, P, C]`` -> logits ``float[N, rows/tall, cols, SLOTS, CLASSES]``.

        ``tall`` rows of patches are averaged.
        """
        n, _, width = patches.shape
        columns = patches.view(n, rows // tall, tall, cols, width).mean(2)
        return self.head(columns).view(n, -1, cols, SLOTS, CLASSES)  # type: ignore[no-any-return]


@dataclass
class ReadObjective:
    """Cross-entropy of the characters of each patch column."""

    trained: Reader
    train_pools: LinePools
    eval_pools: LinePools
    patch: int
    device: torch.device
    workers: int = 1
    eval_count: int = 2  # pools of held-out lines an evaluation reads

    def batches(self, start: int) -> Iterator[Any]:
        """See :class:`cogvlm.train.loop.Objective`."""
        return self.train_pools.batches(start, self.workers)

    def labels(self, batch: LineBatch) -> Tensor:
        """Classes of a batch's slots, ``int64[N, cols, SLOTS]``."""
        cols = batch.pixels.shape[-1] // self.patch
        return torch.from_numpy(column_labels(batch.texts, batch.centers, cols, self.patch))

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """See :class:`cogvlm.train.loop.Objective`."""
        logits = self.trained(torch.from_numpy(batch.pixels).to(self.device))
        labels = self.labels(batch).to(self.device)
        loss = F.cross_entropy(logits.flatten(0, 2).float(), labels.flatten())
        with torch.no_grad():
            written = labels > 0
            right = (logits.argmax(-1) == labels)[written].float().mean()
        return loss, {"char_accuracy": float(right), "lines": float(len(batch.texts))}

    def lr_scale(self, name: str) -> float:
        """See :class:`cogvlm.train.loop.Objective`."""
        return 1.0

    def evaluate(self) -> dict[str, float]:
        """Character error rate on fonts and texts that never train."""
        predictions: list[str] = []
        truths: list[str] = []
        for index in range(self.eval_count):
            for batch in self.eval_pools.pool(index):
                logits = self.trained(torch.from_numpy(batch.pixels).to(self.device))
                predictions += decode_columns(logits.argmax(-1).cpu().numpy())
                truths += batch.texts
        for prediction, truth in list(zip(predictions, truths, strict=True))[:4]:
            print(f"  {truth!r} -> {prediction!r}")
        return {"cer": cer(predictions, truths), "lines": float(len(truths))}

    def export(self, folder: Path) -> None:
        """Write ``vision.safetensors`` with the tower under its released names."""
        tensors = {
            f"model.vision.{name}" if not name.startswith("head.") else name: p.detach().cpu()
            for name, p in self.trained.state_dict().items()
        }
        save_tensors(tensors, folder / "vision.safetensors")
