"""A real model of toy size, its processor, and a head that says what a test wants."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cogvlm.config import preset
from cogvlm.load import Loaded
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.processor import Processor, SquarePixels, get_template

FIRST = 10  # id of byte 0
EOS = 2


class Bytes:
    """One token a byte."""

    bos_id: int | None = 1
    eos_id: int | None = EOS
    pad_id: int | None = 3

    def encode(self, text: str) -> list[int]:
        return [FIRST + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - FIRST for i in ids if FIRST <= i < FIRST + 256).decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        return None


def toy_loaded(**changes: Any) -> Loaded:
    """Random weights; large ones, so that what the model says depends on its input."""
    torch.manual_seed(0)
    model = CogVLMForCausalLM(preset("toy", initializer_range=0.3, **changes)).eval()
    processor = Processor(Bytes(), get_template("chat"), SquarePixels(56), image_token_id=4)
    return Loaded(model, processor, "toy")


class Script(nn.Module):
    """In place of the head: row b says ``texts[b]`` byte by byte, then ends."""

    def __init__(self, texts: Sequence[str], vocab: int = 320, pause: float = 0.0) -> None:
        super().__init__()
        self.rows = [[*Bytes().encode(text), EOS] for text in texts]
        self.vocab, self.pause, self.step = vocab, pause, 0

    def forward(self, hidden: Tensor) -> Tensor:
        """``float[B, K, D]`` -> ``float[B, K, V]``."""
        time.sleep(self.pause)
        logits = torch.zeros(*hidden.shape[:2], self.vocab)
        for row, ids in enumerate(self.rows[: len(hidden)]):
            logits[row, :, ids[min(self.step, len(ids) - 1)]] = 10.0
        self.step += 1
        return logits


def scripted(*texts: str, pause: float = 0.0) -> Loaded:
    """A toy that answers ``texts``, one for each row of its first batch."""
    loaded = toy_loaded()
    loaded.model.lm_head = Script(texts, pause=pause)
    return loaded
