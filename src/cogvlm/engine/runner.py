"""The model as the scheduler needs it: begin a sequence, go on by one token in many, or by several
in one, leave.

``L`` tokens of a prompt, ``n`` of them reused, ``b`` sequences, ``D`` width, ``V`` vocabulary.

transformers' own continuous batching packs the tokens of all requests into one row and can give a
model neither pictures, nor token types for its experts, nor positions that patches share; so rows
of different lengths stand in our own buffers (see ``slots.py``).

CogAgent's layers also read a large picture of each sequence: its sequences take their steps one by
one, and no prompt is reused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..linear import FEW
from ..load import Loaded
from ..models import positions
from ..models.cogagent import CogAgentForCausalLM
from ..processor import Encoded
from ..processor.image import digest
from . import fast
from .reuse import TYPE, Features, Prefixes, Trace, trace
from .slots import Place, Slots, View


class Seat(Protocol):
    """A sequence that the runner holds."""

    @property
    def reused(self) -> int:
        """Tokens of the prompt that were not computed again."""


class Runner(Protocol):
    """What decodes. One thread calls it; the fake ones of the tests hold to the same."""

    most_ahead: int
    """Tokens that :meth:`ahead` takes; below 2 it is not to be called."""

    def start(self, prompt: Encoded) -> tuple[Seat, Tensor]:
        """Begin a sequence: its seat, and the scores of its first token ``float32[V]``.

        If it raises, nothing has begun.
        """

    def step(self, seats: Sequence[Seat], tokens: Sequence[int]) -> Tensor:
        """One more token for all sequences, or for some: scores ``float32[b, V]``.

        If it raises, nothing was added, and it may be called again.
        """

    def ahead(self, seat: Seat, tokens: Sequence[int]) -> Tensor:
        """Scores ``float32[n, V]`` behind each of ``n`` tokens of one sequence; none is added."""

    def add(self, seat: Seat, token: int) -> None:
        """Add the next token of the last :meth:`ahead`."""

    def stop(self, seat: Seat, keep: bool = True) -> None:
        """End a sequence; ``keep`` what may be reused."""

    def clear(self) -> None:
        """Give memory back that only holds what may be reused."""


@dataclass
class Counts:
    """What was saved."""

    image_hits: int = 0  # pictures that did not have to be encoded
    image_misses: int = 0


class _Sequence(Place):
    """A sequence in the buffers."""

    def __init__(self, row: int, seen: Trace, slots: Slots) -> None:
        super().__init__(row)
        self.reused = 0
        self.seen = seen
        self.sees = bool((seen[:, TYPE] == 1).any())  # a picture
        self.added: list[int] = []  # generated tokens that the buffers hold
        # Of its own, since CogAgent keeps its large picture with the cache.
        self.view = View(slots, [self])

    def position(self, further: int = 0) -> list[int]:
        """Position ids of the next token, or of one ``further`` on."""
        behind = len(self.added) + 1 + further
        return [int(p) + behind for p in self.seen[-1, _POSITIONS:]]

    def add(self, token: int) -> None:
        """Count a token in whose keys and values the buffers hold already."""
        self.length += 1
        self.added.append(token)

    def whole(self) -> Trace:
        """The trace of all that the buffers hold."""
        last = self.seen[-1]
        more = np.zeros((len(self.added), len(last)), dtype=np.int64)
        more[:, 0] = self.added
        more[:, _POSITIONS:] = last[_POSITIONS:] + np.arange(1, len(more) + 1)[:, None]
        return np.concatenate((self.seen, more))


_POSITIONS = 5  # first column of the trace that holds position ids


def takes_masks(loaded: Loaded) -> bool:
    """Whether the model's attention takes masks of ours."""
    return loaded.model.config._attn_implementation in ("sdpa", "eager")


class ModelRunner:
    """A real model.

    Args:
        loaded: model and processor.
        slots: sequences at once.
        prefix_bytes: for keys and values of finished sequences.
        image_bytes: for features of pictures.

    Raises:
        InputError: the model's attention takes no mask of ours, which several slots need, and
            prompts that begin as others did.
    """

    def __init__(self, loaded: Loaded, slots: int, prefix_bytes: int, image_bytes: int) -> None:
        self._model: Any = loaded.model
        self._kernel = loaded.model.config._attn_implementation
        masked = takes_masks(loaded)
        if not masked and (slots > 1 or prefix_bytes):
            raise InputError(
                f"attention {self._kernel!r} takes no mask for rows of different lengths; "
                "load the model with attn_implementation='sdpa'"
            )
        self._alone = isinstance(loaded.model, CogAgentForCausalLM)
        self.most_ahead = FEW - 1 if masked and not self._alone else 1
        self._full = getattr(loaded.model.config, "image_attention", "causal") == "full"
        # What keeps nothing for the next conversation is there for one.
        lasting = slots > 1 or prefix_bytes > 0
        known = fast.is_known(loaded.model)
        self._fast = fast.Steps(loaded.model, lasting) if known else None
        # Whether its language weights are others behind a picture.
        self._minds = getattr(loaded.model.config, "text_rank", None) is not None
        self._slots = Slots(slots)
        self._sequences: list[_Sequence] = []  # by row
        self.prefixes = Prefixes(0 if self._alone else prefix_bytes)
        self.features = Features(image_bytes)
        self.counts = Counts()

    @torch.inference_mode()
    def start(self, prompt: Encoded) -> tuple[_Sequence, Tensor]:
        """Prefill one prompt; see :class:`Runner`."""
        ids, types = torch.from_numpy(prompt.input_ids), torch.from_numpy(prompt.token_type_ids)
        names = [digest(pixels) for pixels in prompt.pixel_values]
        pixels = [torch.from_numpy(p) for p in prompt.pixel_values]
        where = self._model.model.position_ids(types[None], None, pixels or None)[..., 0, :]
        seen = self._trace(prompt, names, where.reshape(-1, len(ids)))
        n, layers = self.prefixes.find(seen)
        sequence = _Sequence(len(self._sequences), seen, self._slots)
        if n:
            self._slots.fill(sequence, layers, n)
            sequence.reused = n
        device = self._model.device
        large = [torch.from_numpy(p).to(device) for p in prompt.cross_pixel_values or ()]
        out = self._model(
            inputs_embeds=self._embed(ids[n:], types[n:], pixels, names),
            token_type_ids=types[None, n:].to(device),
            attention_mask=self._rest_mask(types[n:], n) if n else None,
            position_ids=where[..., None, n:].to(device),
            past_key_values=sequence.view,
            use_cache=True,
            logits_to_keep=1,
            **({"cross_pixel_values": large} if large else {}),
            **self._behind(positions.behind_picture(types[None])),
        )
        sequence.length = len(ids)
        self._sequences.append(sequence)
        return sequence, out.logits[0, -1]

    @torch.inference_mode()
    def step(self, seats: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """One token more; see :class:`Runner`."""
        by_row = sorted(range(len(seats)), key=lambda i: seats[i].row)
        if self._alone or len(seats) < len(self._sequences) or len(seats) == 1:
            views = [([seat], seat.view) for seat in seats]
            groups = [([i], *view) for i, view in enumerate(views)]
        else:
            ordered = [seats[i] for i in by_row]
            groups = [(by_row, ordered, View(self._slots, ordered))]
        rows: list[Tensor] = [torch.empty(0)] * len(seats)
        for places, sequences, view in groups:
            logits = self._next(sequences, [tokens[i] for i in places], view)
            for place, scores in zip(places, logits, strict=True):
                rows[place] = scores
        # Only now, so that a failure changes nothing.
        for seat, token in zip(seats, tokens, strict=True):
            seat.add(token)
        return torch.stack(rows)

    @torch.inference_mode()
    def ahead(self, seat: Any, tokens: Sequence[int]) -> Tensor:
        """Several tokens of one; see :class:`Runner`."""
        where = torch.tensor([seat.position(i) for i in range(len(tokens))])
        columns = torch.arange(seat.length + len(tokens))
        mask = (columns <= columns[seat.length :, None])[None, None]
        behind = self._behind(torch.full((len(tokens), 1), seat.sees))
        return self._forward(list(tokens), where, seat.view, self._for_kernel(mask), behind)

    def add(self, seat: Any, token: int) -> None:
        """See :class:`Runner`."""
        seat.add(token)

    def _next(self, sequences: list[_Sequence], tokens: list[int], view: View) -> Tensor:
        where = torch.tensor([s.position() for s in sequences])
        mask = self._step_mask([s.length for s in sequences])
        behind = self._behind(torch.tensor([[s.sees] for s in sequences]))
        return self._forward(tokens, where, view, mask, behind)

    def _forward(
        self,
        tokens: list[int],
        where: Tensor,
        view: View,
        mask: Tensor | None,
        behind: dict[str, Tensor],
    ) -> Tensor:
        """Scores ``float32[b, V]`` of ``b`` tokens: one of each row, or all of one row.

        ``where`` is their ``int64[b, 1 or 2]`` positions.
        """
        device = self._model.device
        where = where.T[..., None].to(device)  # [1 or 2, b, 1]
        where = where if len(where) > 1 else where[0]
        ids = torch.tensor(tokens, device=device)
        if self._fast is not None:
            return self._fast(ids, where, view, mask, **behind)
        shape = (view.rows, -1)
        logits: Tensor = self._model(
            input_ids=ids.view(shape),
            attention_mask=mask,
            position_ids=where.reshape(*where.shape[:-2], *ids.view(shape).shape),
            past_key_values=view,
            use_cache=True,
            logits_to_keep=len(tokens) // view.rows,
            **{name: value.view(shape) for name, value in behind.items()},
        ).logits
        return logits.flatten(0, 1)

    def _behind(self, tokens: Tensor) -> dict[str, Tensor]:
        """Which ``bool[b, L]`` tokens stand behind a picture, for a model that wants to know."""
        wanted = self._minds and bool(tokens.any())
        return {"behind_picture": tokens.to(self._model.device)} if wanted else {}

    @torch.inference_mode()
    def stop(self, seat: Any, keep: bool = True) -> None:
        """Free the row; see :class:`Runner`."""
        if keep:
            self._keep(seat)
        else:  # a failed one may have left what is no number, which a mask does not hide
            self._slots.wipe(seat)
        last = self._sequences.pop()
        if last is not seat:
            self._sequences[seat.row] = last
            self._slots.move(last, seat.row)
        if not self._sequences:
            self._slots.release()

    def _keep(self, seat: _Sequence) -> None:
        whole = seat.whole()
        if self.prefixes.wants(whole, self._slots.token_bytes * len(whole)):
            # Without memory to keep it, it is computed again.
            with contextlib.suppress(torch.OutOfMemoryError, MemoryError):
                self.prefixes.put(whole, self._slots.read(seat, len(whole)))

    def clear(self) -> None:
        """Forget what was kept; see :class:`Runner`."""
        self.prefixes.clear()
        self.features.clear()

    def _trace(self, prompt: Encoded, names: list[bytes], where: Tensor) -> Trace:
        types = torch.from_numpy(prompt.token_type_ids)
        sizes = self._sizes(prompt.pixel_values)
        if sum(sizes) != int((types == 1).sum()):
            raise InputError(
                f"the prompt has {int((types == 1).sum())} image tokens, its {len(sizes)} pictures "
                f"need {sum(sizes)}; encode it with the model's own processor"
            )
        experts = positions.expert_mask(types[None])[0].numpy()
        pictures = list(zip(sizes, names, strict=True))
        return trace(prompt.input_ids, prompt.token_type_ids, experts, pictures, where.numpy())

    def _sizes(self, pixels: Sequence[Any]) -> list[int]:
        """Tokens of every picture, markers included."""
        return [rows * cols + 2 for rows, cols in self._model.model.token_grids(pixels)]

    def _embed(
        self, ids: Tensor, types: Tensor, pixels: list[Tensor], names: list[bytes]
    ) -> Tensor:
        """Embeddings ``float[1, L - n, D]`` of the rest, whose pictures are the last ones."""
        embeds: Tensor = self._model.model.embed_tokens(ids.to(self._model.device)[None])
        sizes, wanted, first = self._sizes(pixels), int((types == 1).sum()), len(pixels)
        while sum(sizes[first:]) < wanted:
            first -= 1
        # Pictures whose keys and values are there already did not have to be encoded either.
        self.counts.image_hits += first
        if not wanted:
            return embeds
        features = torch.cat(self._look(pixels[first:], names[first:]))
        place = (types == 1).to(embeds.device)[None, :, None]
        return embeds.masked_scatter(place, features.to(embeds))

    def _look(self, pixels: list[Tensor], names: list[bytes]) -> list[Tensor]:
        """Features of pictures, each encoded at most once."""
        known = {name: self.features.get(name) for name in names}
        new = {n: p for n, p in zip(names, pixels, strict=True) if known[n] is None}
        if new:
            device = self._model.device
            made = self._model.model.vision.encode([p.to(device) for p in new.values()])
            for name, features in zip(new, made, strict=True):
                known[name] = features
                self.features.put(name, features)
        self.counts.image_misses += len(new)
        self.counts.image_hits += len(names) - len(new)
        return [features for name in names if (features := known[name]) is not None]

    def _rest_mask(self, types: Tensor, n: int) -> Tensor:
        """What the rest of a prompt attends to behind ``n`` tokens: ``[1, 1, L - n, L]``."""
        rest = torch.arange(len(types))
        allowed = rest[:, None] + n >= torch.arange(n + len(types))
        if self._full:
            block = positions.block_ids(types[None])[0]
            together = (block[:, None] == block) & (block >= 0)
            allowed[:, n:] |= together
        return self._for_kernel(allowed[None, None])

    def _step_mask(self, lengths: list[int]) -> Tensor | None:
        """What each row's new token attends to: ``[b, 1, 1, C]``; none where that is all."""
        if min(lengths) == max(lengths):
            return None
        columns = torch.arange(max(lengths) + 1)
        return self._for_kernel((columns <= torch.tensor(lengths)[:, None])[:, None, None])

    def _for_kernel(self, allowed: Tensor) -> Tensor:
        allowed = allowed.to(self._model.device)
        if self._kernel == "sdpa":
            return allowed
        dtype = self._model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill(~allowed, torch.finfo(dtype).min)
