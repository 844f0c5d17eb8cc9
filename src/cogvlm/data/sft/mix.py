"""Several sources mixed by weight, in an order that is a function of the seed and nothing else.

Record ``i`` of a mix, ``i = 0, 1, 2, ...`` without end, is found by arithmetic: no buffer, no
state, no difference between one worker and many.  Where training stands is one number.

::

    i        0 1 2 3 4 5 6 7 8 9 | 10 ...      blocks of 10,000 (here 10)
    lane     A B A A B A A A B A |             in each, every source has its share, shuffled
    number   0 0 1 2 1 3 4 5 2 6 | 7           of the lane: the k-th record it ever gives
    record   a permutation of the lane's records, another in every epoch, at k
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from math import isfinite, isqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, InputError, refuse_unknown
from .recognise import open_source
from .record import Record, RecordError
from .sources import Joined, Options, Source

BLOCK = 10_000
"""Weights are kept exactly in every so many records."""

_ROUNDS = 4
_64 = 2**64 - 1


def permuted(index: int, count: int, key: int) -> int:
    """Place ``index`` of a shuffle of ``0 .. count - 1``, found without the rest of it.

    A Feistel network on a rectangle of at least ``count`` cells; what falls outside goes round
    again (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    >>> sorted(permuted(i, 5, 77) for i in range(5))
    [0, 1, 2, 3, 4]
    """
    rows = isqrt(count - 1) + 1
    columns = -(-count // rows)
    while True:
        left, right = divmod(index, columns)
        for turn in range(_ROUNDS):
            if turn % 2:
                right = (right + _hash(key, turn, left)) % columns
            else:
                left = (left + _hash(key, turn, right)) % rows
        index = left * columns + right
        if index < count:
            return index


def _hash(key: int, turn: int, value: int) -> int:
    """The mixing function of SplitMix64; a real hash would cost as much as reading the record."""
    mixed = ((value + (turn << 56)) * 0x9E3779B97F4A7C15 + key) & _64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64
    return mixed ^ (mixed >> 31)


@lru_cache(maxsize=64)
def _key(*what: int | str) -> int:
    text = "/".join(map(str, what)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def is_held_out(key: str, share: float) -> bool:
    """Whether a record with this key is held out: the same on every machine, in every order.

    >>> sum(is_held_out(str(i), 0.1) for i in range(1000))
    89
    """
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


@dataclass(frozen=True)
class Entry:
    """One line of a mix, as a recipe writes it."""

    path: str  # file, folder or pattern; relative ones begin at the recipe's folder
    weight: float | None = None  # share of the records; given for all entries or for none
    format: str | None = None  # instead of what is recognised
    question: str | None = None  # of records that have none
    images: str | None = None  # folder where the names of pictures begin
    allow_outside: bool = False  # names of pictures may lead out of that folder

    @classmethod
    def of(cls, value: Any) -> Entry:
        """An entry from a path or a mapping of the fields.

        Raises:
            ConfigError: another type, an unknown key, no path, or a value of a wrong type.
        """
        if isinstance(value, Entry):
            return value
        if isinstance(value, (str, Path)):
            return cls(str(value))
        if not isinstance(value, Mapping):
            raise ConfigError(f"data: {value!r} is no path and no mapping with a 'path'")
        refuse_unknown(value, [f.name for f in fields(cls)], "data")
        if not isinstance(value.get("path"), (str, Path)):
            raise ConfigError(f"data: 'path' is {value.get('path')!r}; give a path")
        for key in ("format", "question", "images"):
            if not isinstance(value.get(key), (str, type(None))):
                raise ConfigError(f"data: {key!r} is {value[key]!r}; give a text")
        weight = value.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float, type(None))):
            raise ConfigError(f"data: 'weight' is {weight!r}; give a number")
        if not isinstance(value.get("allow_outside", False), bool):
            raise ConfigError(f"data: 'allow_outside' is {value['allow_outside']!r}; true or false")
        return cls(**{**value, "path": str(value["path"])})

    def open(self, base: Path) -> Source:
        """The source; see :func:`open_source` for what it raises."""
        images = None if self.images is None else base / Path(self.images).expanduser()
        options = Options(self.question, images, self.allow_outside)
        return open_source(base / Path(self.path).expanduser(), self.format, options)


class Mix:
    """Records without end from several sources: ``mix[i]`` for any ``i`` from 0 on.

    ``len(mix)`` is one epoch: as many records as there are.  Without weights every record comes
    once in it; with weights a small source begins again while a large one is not through.

    Args:
        sources: at least one.
        weights: one for each source, or none.
        seed: of the order.
        held_out: share of the records, by hash of the id, that never train.
        part: what this mix gives: what trains, or what is held out.

    Raises:
        ConfigError: impossible weights or shares, or a source without a record in this part.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        held_out: float = 0.0,
        part: Literal["train", "held_out"] = "train",
    ) -> None:
        if not sources:
            raise ConfigError("a mix of no sources; give at least one")
        if not 0 <= held_out < 1 or (part == "held_out" and not held_out):
            raise ConfigError(f"held_out is {held_out}; give a share of 0 or more, below 1")
        if part not in ("train", "held_out"):
            raise ConfigError(f"part {part!r} is not known; known: train, held_out")
        self.seed, self.held_out, self.part = seed, held_out, part
        if weights is None:
            self.lanes: list[Source] = [Joined(Path(), parts=tuple(sources))]
        else:
            self.lanes = list(sources)
        self.weights = None if weights is None else [float(w) for w in weights]
        self._places = _shares(self.weights or [1.0], len(self.lanes))
        # The block last asked for: a cache, no part of the order.
        self._last: tuple[int, NDArray[np.intp], NDArray[np.intp]] | None = None
        self._chosen = [_chosen(lane, held_out, part) for lane in self.lanes]
        self._counts = [
            len(lane) if chosen is None else len(chosen)
            for lane, chosen in zip(self.lanes, self._chosen, strict=True)
        ]
        for lane, count in zip(self.lanes, self._counts, strict=True):
            if not count:
                raise ConfigError(f"{lane.path}: no records for {part}; leave it out")

    @classmethod
    def open(
        cls,
        entries: Sequence[Any],
        seed: int = 0,
        held_out: float = 0.0,
        part: Literal["train", "held_out"] = "train",
        base: str | Path = ".",
        damaged: bool = False,
    ) -> Mix:
        """A mix from what a recipe says.

        Args:
            entries: paths, or mappings of the fields of :class:`Entry`.
            seed: of the order.
            held_out: see :class:`Mix`.
            part: see :class:`Mix`.
            base: folder where relative paths begin.
            damaged: take what can be read of a file with places that cannot.

        Raises:
            ConfigError: see :class:`Mix` and :class:`Entry`.
            InputError: a path that cannot be read, or a damaged file.
        """
        wanted = [Entry.of(value) for value in entries]
        given = [entry.weight for entry in wanted if entry.weight is not None]
        if given and len(given) != len(wanted):
            raise ConfigError("data: some entries have a weight and some have none; give all or no")
        sources = [entry.open(Path(base)) for entry in wanted]
        problems = [problem for source in sources for problem in source.problems]
        if problems and not damaged:
            raise InputError(
                f"{problems[0].where}: {problems[0].reason} ({len(problems)} such places in all); "
                "'cogvlm data check' names them"
            )
        return cls(sources, given or None, seed, held_out, part)

    def __len__(self) -> int:
        return sum(self._counts)

    def place(self, index: int) -> tuple[int, int]:
        """Lane and number in it of record ``index``: arithmetic, nothing is read."""
        if index < 0:
            raise IndexError(f"record {index} of a mix; they begin at 0")
        if len(self.lanes) == 1:
            lane, number = 0, index
        else:
            block, inside = divmod(index, BLOCK)
            lanes, before = self._block(block)
            lane = int(lanes[inside])
            number = block * self._places[lane] + int(before[inside])
        epoch, inside = divmod(number, self._counts[lane])
        found = permuted(inside, self._counts[lane], _key(self.seed, lane, epoch))
        chosen = self._chosen[lane]
        return lane, found if chosen is None else int(chosen[found])

    def _block(self, block: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """``int[BLOCK]`` each: lanes in order, and how often each came before in the block."""
        if self._last is None or self._last[0] != block:
            key = _key(self.seed, "block", block)
            slots = np.array(sorted(range(BLOCK), key=lambda slot: _hash(key, 0, slot)))
            lanes = np.repeat(np.arange(len(self._places)), self._places)[slots]
            before = np.empty(BLOCK, np.intp)
            for lane, places in enumerate(self._places):
                before[lanes == lane] = np.arange(places)
            self._last = block, lanes, before
        return self._last[1:]

    def __getitem__(self, index: int) -> Record:
        """Record ``index``, read now.

        Raises:
            RecordError: it is not usable.
        """
        lane, number = self.place(index)
        return self.lanes[lane][number]

    def __iter__(self) -> Iterator[Record]:
        """One epoch."""
        return (self[index] for index in range(len(self)))

    def stream(
        self,
        start: int = 0,
        stop: int | None = None,
        shard: int = 0,
        shards: int = 1,
        bad: Callable[[RecordError], None] | None = None,
    ) -> Iterator[tuple[int, Record]]:
        """Numbers and records from ``start`` on, those with ``number % shards == shard``.

        Args:
            start: where training stands.
            stop: none for no end.
            shard: of this rank and worker.
            shards: ranks times workers.
            bad: called with what is not usable, which is then left out; without it that raises.

        Raises:
            RecordError: a record that is not usable, without ``bad``.
        """
        if not 0 <= shard < shards:
            raise ConfigError(f"shard {shard} of {shards}; give 0 to {shards - 1}")
        index = start + (shard - start) % shards
        while stop is None or index < stop:
            try:
                record = self[index]
            except RecordError as error:
                if bad is None:
                    raise
                bad(error)
            else:
                yield index, record
            index += shards

    def state(self, index: int) -> dict[str, Any]:
        """Where training stands when records ``0 .. index - 1`` have been used: plain JSON."""
        blocks, rest = divmod(index, BLOCK)
        taken = [blocks * places for places in self._places]
        if len(self.lanes) == 1:
            taken = [index]
        elif rest:
            here = np.bincount(self._block(blocks)[0][:rest], minlength=len(taken))
            taken = [past + int(now) for past, now in zip(taken, here, strict=True)]
        return {"next": index, "taken": taken, **self._order()}

    def resume(self, state: Mapping[str, Any]) -> int:
        """The number to go on from.

        Raises:
            ConfigError: the state is of another order: other sources, weights, seed or share.
        """
        for key, value in self._order().items():
            if state.get(key) != value:
                raise ConfigError(
                    f"the data have changed since the checkpoint: {key} was {state.get(key)!r}, "
                    f"is {value!r}; put it back, or begin anew"
                )
        index = state.get("next")
        if type(index) is not int or index < 0:
            raise ConfigError(f"the checkpoint's 'next' is {index!r}; it is damaged")
        return index

    def _order(self) -> dict[str, Any]:
        """All that the order depends on."""
        return {
            "seed": self.seed,
            "part": self.part,
            "held_out": self.held_out,
            "weights": self.weights,
            "records": self._counts,
        }


def _shares(weights: Sequence[float], lanes: int) -> list[int]:
    """Places of every lane in a block: by weight, what rounding leaves to the largest rests."""
    if len(weights) != lanes:
        raise ConfigError(f"{len(weights)} weights for {lanes} sources; give one for each")
    if not all(isfinite(w) and w > 0 for w in weights):
        raise ConfigError(f"weights are {list(weights)}; give numbers above 0")
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    places = [int(share) for share in exact]
    by_rest = sorted(range(lanes), key=lambda lane: places[lane] - exact[lane])
    for lane in by_rest[: BLOCK - sum(places)]:
        places[lane] += 1
    if not all(places):
        raise ConfigError(f"a weight is below one in {BLOCK} of all; raise it or leave it out")
    return places


def _chosen(source: Source, share: float, part: str) -> NDArray[np.int64] | None:
    """Numbers of the records in this part; none for all."""
    if not share:
        return None
    held = map(partial(is_held_out, share=share), map(source.key, range(len(source))))
    return np.array([i for i, out in enumerate(held) if out == (part == "held_out")], np.int64)
