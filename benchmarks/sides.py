"""The two sides' common ground: sizes, the random model, the prompt, and our own side.

Shapes: ``B`` rows, ``L`` tokens a row, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from cogvlm.config import preset
from cogvlm.models.cogvlm import CogVLMForCausalLM


@dataclass(frozen=True)
class Sizes:
    """A random model between the toys of the tests and real ones, its prompt, and repeats."""

    width: int = 768  # of the decoder
    inner: int = 2688  # of the gated MLPs; 3.5 x width, as in Llama-3-8B
    layers: int = 8
    heads: int = 12
    kv_heads: int = 3  # a quarter of the heads, as in Llama-3-8B
    vocab: int = 32000
    prompt: int = 2400  # tokens a row, image and text
    image: int = 2306  # of them image tokens, begin and end marker included: CogVLM2's 1344x1344
    repeats: int = 5  # timed prefills of each side
    steps: int = 60  # timed decode steps of each side

    @property
    def padding(self) -> int:
        """Padding tokens of the padded row of a batch."""
        return max(1, self.prompt // 32)

    @classmethod
    def tiny(cls) -> Sizes:
        """For a smoke test; times at this size mean nothing."""
        return cls(64, 112, 2, 4, 2, 320, 40, 24, repeats=2, steps=4)


@dataclass(frozen=True)
class Prompt:
    """What both sides of a comparison get; padding stands on the left."""

    embeds: Tensor  # float[B, L, D], image features put in
    types: Tensor  # int64[B, L], 0 language, 1 image
    mask: Tensor | None  # int64[B, L], 1 real, 0 padding

    @property
    def real(self) -> Tensor:
        """Where a token is real: ``bool[B, L]``."""
        return torch.ones_like(self.types).bool() if self.mask is None else self.mask.bool()


class Side(Protocol):
    """One way of computing the model; holds its own key/value cache."""

    def prefill(self, prompt: Prompt) -> Tensor:
        """Forget everything, read the prompt; logits ``float32[B, 1 or L, V]``."""

    def step(self, token: Tensor) -> Tensor:
        """One more token ``int64[B, 1]``; logits ``float32[B, 1, V]``."""


class Ours:
    """The package's model, used as ``generate`` uses it."""

    def __init__(self, model: CogVLMForCausalLM, logits_to_keep: int = 1) -> None:
        self.model, self.keep = model, logits_to_keep
        self.cache: Cache | None = None

    def prefill(self, prompt: Prompt, position_ids: Tensor | None = None) -> Tensor:
        """``position_ids``: ``int64[B, L]`` instead of those of the model."""
        if position_ids is None:
            position_ids = self.model.model.position_ids(prompt.types, prompt.mask, None)
        out = self.model(
            inputs_embeds=prompt.embeds,
            token_type_ids=prompt.types,
            attention_mask=prompt.mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=self.keep,
        )
        self.cache, self.position, self.mask = (
            out.past_key_values,
            position_ids[:, -1:],
            prompt.mask,
        )
        logits: Tensor = out.logits
        return logits

    def step(self, token: Tensor) -> Tensor:
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=1)
        logits: Tensor = self.model(
            token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits


def build(sizes: Sizes) -> CogVLMForCausalLM:
    """A model of random weights, experts in every layer; the tower is a toy and never runs."""
    torch.manual_seed(0)
    config = preset(
        "toy",
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_multi_query_heads=sizes.kv_heads,
        max_position_embeddings=2 * sizes.prompt + sizes.steps,
        # Logits, queries and keys of about unit size: a difference would show.
        initializer_range=sizes.width**-0.5,
    )
    model = CogVLMForCausalLM(config)
    model.eval().requires_grad_(False)
    return model


def make_prompt(model: CogVLMForCausalLM, sizes: Sizes, padding: Sequence[int] = (0,)) -> Prompt:
    """A begin token, an image, text; one row for each entry of ``padding``.

    Text embeddings are those of random tokens; image features are random at their scale.
    """
    chance = torch.Generator().manual_seed(1)
    rows = len(padding)
    ids = torch.randint(4, sizes.vocab, (rows, sizes.prompt), generator=chance)
    types, mask = torch.zeros_like(ids), torch.ones_like(ids)
    for row, pad in enumerate(padding):
        types[row, pad + 1 : pad + 1 + sizes.image] = 1
        mask[row, :pad] = 0
    embeds = model.model.embed_tokens(ids)
    features = torch.randn(embeds.shape, generator=chance) * embeds.std()
    embeds = torch.where((types == 1)[..., None], features, embeds)
    return Prompt(embeds, types, mask if any(padding) else None)


def make_tokens(sizes: Sizes, rows: int = 1) -> list[Tensor]:
    """The tokens fed at each decode step: ``int64[B, 1]`` each."""
    chance = torch.Generator().manual_seed(2)
    return list(torch.randint(4, sizes.vocab, (sizes.steps, rows, 1), generator=chance))
