"""Small tokenizers for the tests of the processor."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers


class Bytes:
    """The stand-in tokenizer of the recorded layouts: id = 1000 + UTF-8 byte."""

    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = 3

    def encode(self, text: str) -> list[int]:
        return [1000 + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 1000 for i in ids if i >= 1000).decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        roles = {"<|system|>": 7, "<|user|>": 8, "<|assistant|>": 9}
        glm4 = {"[gMASK]": 5, "<sop>": 6, **roles}
        return {"<|im_start|>": 4, "<|im_end|>": 2, **glm4}.get(name)


SPECIALS = ("<|im_start|>", "<|im_end|>", "<image>")


def toy_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE of a few merges, with ChatML's special tokens, a bos of its own and limits."""
    toy = tokenizers.Tokenizer(models.BPE())
    toy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    toy.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    toy.train_from_iterator(["the red bus and the blue bus went to the assistant"] * 3, trainer)
    toy.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    toy.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", toy.token_to_id("<|im_start|>"))]
    )
    toy.enable_truncation(8)
    toy.enable_padding(length=64)
    return toy
