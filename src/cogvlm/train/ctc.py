"""Stage "ctc": a head learns to spell the strips that pages are cut into, on the frozen tower.

Lines of the data engine and the strips of its pages, cut as the processor cuts them, so that what
the cutting does wrong (half a letter, a stroke of the line above) is among what is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.ctc import ALPHABET
from ..models.vision import VisionModel
from ..score import cer
from ..tensors import save_tensors
from .lines import LineBatch, LinePools, Pixels
from .pages import Block, Page, Pages


@dataclass(frozen=True)
class Strip:
    """A strip, float32[3, H, W], and what it says."""

    pixels: Pixels
    text: str


def text_of(block: Block) -> str:
    """What a strip says, from left to right; its characters without the blanks around them."""
    rows = sorted(block.rows, key=lambda row: float(row.points[0, 0]))
    return " ".join(" ".join(row.text for row in rows).split())


def strips_of(page: Page) -> list[Strip]:
    """The strips of a page."""
    return [Strip(block.pixels, text_of(block)) for block in page.blocks]


def lines_of(batch: LineBatch) -> list[Strip]:
    """Lines that are strips already."""
    return [Strip(p, t) for p, t in zip(batch.pixels, batch.texts, strict=True)]


@dataclass
class CTCObjective:
    """CTC loss of the characters of strips; the tower is frozen."""

    trained: VisionModel
    pages: Pages
    eval_pages: Pages
    train_pools: LinePools
    eval_pools: LinePools
    device: torch.device
    workers: int = 1
    eval_page_count: int = 32

    def __post_init__(self) -> None:
        for name, parameter in self.trained.named_parameters():
            parameter.requires_grad_(name.startswith("ctc."))
        self.codes = {char: i for i, char in enumerate(ALPHABET, 1)}

    def batches(self, start: int) -> Iterator[list[Strip]]:
        """See :class:`cogvlm.train.loop.Objective`: strips of some pages, and a batch of lines."""
        count = self.pages.data.per_step
        pages = self.pages.stream(start * count, self.pages.data.workers)
        for batch in self.train_pools.batches(start, self.workers):
            yield lines_of(batch) + [s for _ in range(count) for s in strips_of(next(pages))]

    def loss(self, batch: list[Strip]) -> tuple[Tensor, dict[str, float]]:
        """See :class:`cogvlm.train.loop.Objective`."""
        total, letters = torch.zeros((), device=self.device), 0
        for same in _by_size(batch):
            pixels = torch.from_numpy(np.stack([s.pixels for s in same])).to(self.device)
            with torch.no_grad():
                patches, _ = self.trained.patches(pixels)
            logs = self.trained.ctc(patches).float().log_softmax(-1).transpose(0, 1)  # [T, N, 96]
            codes = [[self.codes[c] for c in s.text] for s in same]
            sizes = torch.tensor([len(c) for c in codes])
            total = total + F.ctc_loss(
                logs,
                torch.tensor([i for c in codes for i in c], device=self.device),
                torch.full((len(same),), len(logs)),
                sizes,
                reduction="sum",
                zero_infinity=True,  # more characters than steps: a strip cut wrongly
            )
            letters += int(sizes.sum())
        loss = total / max(1, letters)
        return loss, {"letter": float(loss.detach()), "strips": float(len(batch))}

    def lr_scale(self, name: str) -> float:
        """See :class:`cogvlm.train.loop.Objective`."""
        return 1.0

    def evaluate(self) -> dict[str, float]:
        """Character error rate of lines and of pages' strips that never train."""
        lines = [strip for batch in self.eval_pools.pool(0) for strip in lines_of(batch)]
        strips = [s for i in range(self.eval_page_count) for s in strips_of(self.eval_pages[i])]
        return {"line_cer": self.error(lines), "page_cer": self.error(strips)}

    def error(self, strips: list[Strip]) -> float:
        """Character error rate of what is read in strips."""
        read = self.trained.spell([s.pixels for s in strips], sure=0.0)
        for strip, text in list(zip(strips, read, strict=True))[:: max(1, len(strips) // 6)]:
            print(f"  {strip.text!r} -> {text!r}")
        return cer(read, [s.text for s in strips])

    def export(self, folder: Path) -> None:
        """Write ``vision.safetensors``: the head alone, under the model's names."""
        state: dict[str, Any] = self.trained.ctc.state_dict()
        tensors = {f"model.vision.ctc.{k}": v.detach().cpu() for k, v in state.items()}
        save_tensors(tensors, folder / "vision.safetensors")


def _by_size(strips: list[Strip]) -> list[list[Strip]]:
    """Strips of one size together, so that none is padded."""
    found: dict[tuple[int, ...], list[Strip]] = {}
    for strip in strips:
        found.setdefault(strip.pixels.shape, []).append(strip)
    return list(found.values())
