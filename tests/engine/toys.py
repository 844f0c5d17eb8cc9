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
    """In place of the head: row b says ``texts[b]`` byte by byte, once, then ends.

    Which byte is told by the position of the token, so that guessed ones may be taken back.
    """

    def __init__(self, texts: Sequence[str], vocab: int = 320, pause: float = 0.0) -> None:
        super().__init__()
        self.rows = [[*Bytes().encode(text), EOS] for text in texts]
        self.vocab, self.pause, self.step = vocab, pause, 0
        self.positions = self.begun = torch.zeros(1, 1)  # of the tokens now; of each row's first

    def watch(self, inner: Any) -> None:
        """See the positions of every forward pass of a decoder."""
        plain = inner.rotary

        def rotary(positions: Tensor, dtype: torch.dtype) -> Any:
            self.positions = positions if positions.ndim == 2 else positions[0]
            return plain(positions, dtype)

        inner.rotary = rotary

    def forward(self, hidden: Tensor) -> Tensor:
        """``float[B, K, D]`` -> ``float[B, K, V]``."""
        time.sleep(self.pause)
        count = hidden.shape[1]
        where = self.positions[:, -count:]
        if self.positions.shape[1] > count:  # prompts
            self.begun = where[:, -1:] - self.step
        alone = len(self.begun) == 1  # then all tokens are its
        logits = torch.zeros(*hidden.shape[:2], self.vocab)
        steps = (where - self.begun).tolist()
        for row, places in enumerate(steps):
            ids = self.rows[0 if alone else row]
            for column, step in enumerate(places):
                logits[row, column, ids[min(int(step), len(ids) - 1)]] = 10.0
        self.step = 1 + int(max(max(places) for places in steps))
        return logits


def scripted(*texts: str, pause: float = 0.0) -> Loaded:
    """A toy that answers ``texts``, one for each row of its first batch."""
    loaded = toy_loaded()
    loaded.model.lm_head = script = Script(texts, pause=pause)
    script.watch(loaded.model.model)
    return loaded
