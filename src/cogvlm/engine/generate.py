"""One batch of prompts to answers.

``B`` rows, ``L`` prompt tokens. The decoding loop is transformers' own ``generate``; a stopping
criterion of ours sees every new token: the end of an answer and the stop on repetition hook in
there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..errors import InputError, ResourceError
from ..processor import Batch
from ..settings import GenerationSettings
from .repetition import Repetition
from .sampling import TokenLogprob

if TYPE_CHECKING:
    from ..load import Loaded

Stop = Literal["end", "length", "repetition", "cancelled", "stop"]


@dataclass(frozen=True)
class Answer:
    """What one row gave.

    Attributes:
        text: The answer, special tokens left out.
        ids: Its tokens, without the one that ends it.
        stop: ``end`` (the model ended it), ``length`` (the limit did), ``repetition``,
            ``cancelled``, or ``stop`` (a stop string did).
        cached_tokens: Tokens of the prompt that an :class:`Engine` had from before.
        first_token_s: Seconds from the request to its first token; 0 outside an engine.
        logprobs: Of the tokens, where an engine was asked for them.
    """

    text: str
    ids: tuple[int, ...]
    stop: Stop
    cached_tokens: int = 0
    first_token_s: float = field(default=0.0, compare=False)
    logprobs: tuple[TokenLogprob, ...] = ()


class Tap(StoppingCriteria):
    """Collects the new tokens of every row and says which rows are done."""

    def __init__(self, rows: int, end: frozenset[int], repetition: bool) -> None:
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._stops: list[Stop | None] = [None] * rows
        self._watches = [Repetition() if repetition else None for _ in range(rows)]
        self._end = end

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """``int64[B, L]`` so far -> ``bool[B]``, true where a row is done."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self._stops[row] is None:
                self._take(row, token)
        done = [stop is not None for stop in self._stops]
        return torch.tensor(done, device=input_ids.device)  # type: ignore[return-value]

    def _take(self, row: int, token: int) -> None:
        if token in self._end:
            self._stops[row] = "end"
            return
        self._ids[row].append(token)
        watch = self._watches[row]
        if watch is not None:
            watch.push(token)
            if watch.unit is not None:
                self._stops[row] = "repetition"

    def ids(self, row: int) -> tuple[int, ...]:
        """The tokens of a row's answer."""
        ids, watch = self._ids[row], self._watches[row]
        surplus = watch.surplus if watch is not None else 0
        return tuple(ids[: len(ids) - surplus])

    def stop(self, row: int) -> Stop:
        """Why a row ended."""
        return self._stops[row] or "length"


def generate(loaded: Loaded, batch: Batch, settings: GenerationSettings) -> list[Answer]:
    """Answer every row of ``batch``.

    Raises:
        InputError: a prompt is longer than the model's context.
        ResourceError: not enough memory.
    """
    room_left(loaded, batch)
    tap = Tap(len(batch.input_ids), end_ids(loaded), settings.repetition_stop)
    _run(loaded, batch, settings, tap)
    decode = loaded.processor.decode
    return [
        Answer(decode(tap.ids(r)), tap.ids(r), tap.stop(r)) for r in range(len(batch.input_ids))
    ]


def end_ids(loaded: Loaded) -> frozenset[int]:
    """Every id that ends an answer: a model may have several."""
    ids = {loaded.processor.tokenizer.eos_id}
    for config in (loaded.model.config, loaded.model.generation_config):
        given = getattr(config, "eos_token_id", None)
        ids.update(given if isinstance(given, list) else [given])
    return frozenset(i for i in ids if i is not None)


def room_left(loaded: Loaded, batch: Batch) -> int | None:
    """Positions left for the answer, ``None`` if the model states no limit.

    Raises:
        InputError: none is left.
    """
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is None:
        return None
    used = batch.attention_mask.sum(1)
    if getattr(loaded.model.config, "image_positions", None) == "shared":
        # The patches of an image have one position together, and its two markers one each.
        patches = (batch.token_type_ids == 1).sum(1)
        used = used - patches + 3 * torch.tensor(batch.image_counts).numpy()
    longest = int(used.max())
    if longest >= limit:
        raise InputError(
            f"the prompt has {longest} positions, the model has {limit} for prompt and answer; "
            "shorten the text or give fewer or smaller pictures"
        )
    return int(limit) - longest


def _run(loaded: Loaded, batch: Batch, settings: GenerationSettings, tap: Tap) -> None:
    """Generate; the outcome is in ``tap``."""
    model: Any = loaded.model
    device = model.device
    room = room_left(loaded, batch)
    config = _transformers_config(loaded, settings, room)
    images = [torch.from_numpy(image).to(device) for image in batch.pixel_values]
    large = [torch.from_numpy(image).to(device) for image in batch.cross_pixel_values or ()]
    more = {"cross_pixel_values": large} if large else {}  # CogAgent alone knows them
    with _memory_errors(batch), _seeded(settings.seed, device):
        model.generate(
            input_ids=torch.from_numpy(batch.input_ids).to(device),
            attention_mask=torch.from_numpy(batch.attention_mask).to(device),
            token_type_ids=torch.from_numpy(batch.token_type_ids).to(device),
            pixel_values=images or None,
            **more,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([tap]),
        )


def _transformers_config(
    loaded: Loaded, settings: GenerationSettings, room: int | None
) -> GenerationConfig:
    """Everything that decides the outcome, so that nothing hidden in a model's files does."""
    tokenizer = loaded.processor.tokenizer
    end = sorted(end_ids(loaded))
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else next(iter(end), 0)
    count = settings.max_new_tokens if room is None else min(settings.max_new_tokens, room)
    sample = settings.temperature > 0
    chosen: dict[str, Any] = {"do_sample": sample}
    if sample:
        chosen |= {
            "temperature": float(settings.temperature),
            "top_p": float(settings.top_p),
            "top_k": settings.top_k,
        }
    return GenerationConfig(
        max_new_tokens=count,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=end or None,
        pad_token_id=pad,
        use_cache=True,
        **chosen,
    )


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample from ``seed``; the global generators are as before afterwards."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _memory_errors(batch: Batch) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        raise _no_memory(batch) from error


def is_memory_error(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; on the CPU, torch has no exception for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _no_memory(batch: Batch) -> ResourceError:
    rows, length = batch.input_ids.shape
    return ResourceError(
        f"out of memory with {rows} prompts of {length} tokens; use a smaller batch size, smaller "
        "pictures, --precision bfloat16, or another device"
    )
