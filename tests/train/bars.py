"""Drawn bars for letters, and a tokenizer of bytes: stages without fonts or downloads."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from cogvlm.data.lines import Line
from cogvlm.processor.image import NativePixels
from cogvlm.train.lines import LinePools

NATIVE = {"grid": "native", "max_rows": 2, "max_cols": 8, "num_positions": 17}
PLAN = NativePixels(14, 2, 2, 8)
CPU = torch.device("cpu")


class Bars:
    """Lines of 'a' (dark) and 'b' (light), each 14 pixels wide; line ``i`` depends on ``i``."""

    def __init__(self, shortest: int = 2) -> None:
        self.shortest = shortest

    def line_at(self, index: int) -> Line:
        rng = np.random.default_rng(index)
        text = "".join(rng.choice(["a", "b"], size=int(rng.integers(self.shortest, 9))))
        array = np.repeat([[0 if c == "a" else 200 for c in text]], 28, axis=0).repeat(14, axis=1)
        image = Image.fromarray(array.astype(np.uint8)).convert("RGB")
        centers = np.arange(len(text), dtype=np.float32) * 14 + 7
        feet = np.full_like(centers, 20)
        return Line(image, text, centers, np.stack([centers - 7, centers + 7], 1), feet)


class Bytes:
    """Token id = character code; two specials per role marker."""

    bos_id, eos_id, pad_id = 1, 2, 3

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 300 for c in text]

    def decode(self, ids: object) -> str:
        return "".join(chr(i) for i in ids if i > 3)  # type: ignore[attr-defined]

    def token_id(self, name: str) -> int | None:
        return {"<|im_start|>": 1, "<|im_end|>": 2, "<image>": 3}.get(name)


def pools(batch: int = 16, shortest: int = 2) -> LinePools:
    return LinePools(Bars(shortest), PLAN, batch, 32, seed=0)  # type: ignore[arg-type]


def common(shortest: int = 2) -> dict[str, object]:
    source = pools(shortest=shortest)
    return {"train_pools": source, "eval_pools": source, "device": CPU, "workers": 0}
