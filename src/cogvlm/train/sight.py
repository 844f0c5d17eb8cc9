"""Self-supervision on pictures: at every image token, what the tower saw at the next one.

A linear head reads the decoder's last hidden states; its aim is the tower's output there (of the
patches that make up a token, the mean), normed, without gradient.  CogVLM's paper tried this (table
of ablations: no gain at scale, some in small models); it does not say which distance, here it is
the mean square.  The head is trained with the rest and left out of what is exported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.cogvlm import CogVLMForCausalLM

HEAD = "image_head"


def is_head(name: str) -> bool:
    """Whether a parameter is the head's."""
    return name.startswith(f"{HEAD}.")


def add_head(model: Any) -> None:
    """Give a model the head.

    Raises:
        ConfigError: its image tokens are no patches.
    """
    vision = model.config.vision
    if getattr(vision, "adapter", "") == "qformer":
        raise ConfigError("image_loss: the tokens of a Q-Former have no place in the picture")
    like = model.lm_head.weight
    head = nn.Linear(model.config.hidden_size, vision.hidden_size, device=like.device)
    model.add_module(HEAD, head)


class Sight:
    """Watches a model and gives the loss of its last forward pass."""

    def __init__(self, model: CogVLMForCausalLM) -> None:
        self.model = model
        self.seen: list[Tensor] = []  # float[N, P, C] for every size of picture
        self.hidden: Tensor | None = None
        model.model.register_forward_pre_hook(lambda *_: self.seen.clear())
        model.model.vision.transformer.register_forward_hook(self._tower)
        model.model.register_forward_hook(self._decoder)

    def _tower(self, _: nn.Module, args: Any, out: Tensor) -> None:
        self.seen.append(out[:, 1:].detach())

    def _decoder(self, _: nn.Module, args: Any, out: Any) -> None:
        self.hidden = out.last_hidden_state

    def loss(self, types: Tensor, pictures: list[Tensor] | None) -> Tensor:
        """Summed over image tokens, the mean over features of the squared distance.

        Args:
            types: ``int64[B, L]`` of the last forward pass.
            pictures: its ``float[3, H, W]``, in order of appearance.
        """
        assert self.hidden is not None
        if not pictures:
            return self.hidden.new_zeros(())
        row, column = (types == 1).nonzero(as_tuple=True)
        tokens = self.hidden[row.to(self.hidden.device), column.to(self.hidden.device)]
        aims = self._aims(pictures)
        blocks = tokens.split([len(aim) + 2 for aim in aims])  # with begin and end
        before = torch.cat([block[: len(block) - 2] for block in blocks])  # begin, all but the last
        found: Tensor = getattr(self.model, HEAD)(before)
        aim = torch.cat(aims)
        return (found.float() - aim).square().mean(dim=-1).sum()

    def _aims(self, pictures: list[Tensor]) -> list[Tensor]:
        """Of every picture ``float32[T, C]``, in the order given."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(pictures):
            groups.setdefault(tuple(picture.shape), []).append(i)  # as the tower takes them
        aims: dict[int, Tensor] = {}
        tall, wide = self.model.config.vision.merge
        for (_, height, width), places in groups.items():
            rows, columns = self.model.model.vision.grid(height, width)
            features = self.seen.pop(0).float()
            cells = features.unflatten(1, (rows // tall, tall, columns // wide, wide))
            normed = F.layer_norm(cells.mean(dim=(2, 4)).flatten(1, 2), features.shape[-1:])
            aims |= dict(zip(places, normed, strict=True))
        return [aims[i] for i in range(len(pictures))]
