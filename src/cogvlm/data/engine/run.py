"""A maker and its steps to a set of shards: on this machine, or on Ray Data over many.

A shard is the unit of work: made by one process from its number alone, so any number of processes
and machines give the same bytes.  Shards that are there already are not made again.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...errors import InputError, ResourceError
from ...journal import dump, locked, write_whole
from .pack import Stats, stats_file, write_index, write_shard
from .step import Maker, Step, chain

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What is to be made; sent whole to every process.

    Attributes:
        maker: Where the samples come from.
        steps: What happens to them.
        out: Folder of the set; one that every machine sees.
        shards: How many.
        shard_size: Most samples in one; none for all that the maker has.
        count: Samples in all, of an endless maker; the last shard takes what is left.
        made: How it was made, for the index.
    """

    maker: Maker
    steps: tuple[Step, ...]
    out: Path
    shards: int
    shard_size: int | None = None
    count: int | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def make(self, shard: int) -> dict[str, Any]:
        """One shard; returns its counts."""
        done = stats_file(self.out, shard)
        if done.exists():
            found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            return found
        items = chain(self.maker.items(shard), self.steps)
        return write_shard(self.out, shard, items, self._limit(shard), self.maker.endless)

    def _limit(self, shard: int) -> int | None:
        if self.count is None or self.shard_size is None:
            return self.shard_size
        return max(0, min(self.shard_size, self.count - shard * self.shard_size))


def run(
    job: Job, processes: int = 1, ray: str | None = None, progress: Progress | None = None
) -> Stats:
    """Make every shard that is missing, then the index.

    Args:
        job: what to make.
        processes: of this machine; 1 works in this one.
        ray: instead, the address of a Ray cluster, ``auto`` for the one at hand, ``local`` for
            one of this machine alone; it spreads the shards.
        progress: called with (shards done, all).

    Raises:
        InputError: the folder holds a set that was made otherwise, or another run writes it.
        ResourceError: Ray is not installed or not reached, or the disk is full.
    """
    with locked(job.out / ".lock", str(job.out)):
        _same_settings(job)
        found = _on_ray(job, ray) if ray is not None else _here(job, processes)
        shards = []
        if progress is not None:
            progress(0, job.shards)
        for plain in found:
            shards.append(plain)
            if progress is not None:
                progress(len(shards), job.shards)
        return write_index(job.out, shards, job.made)


def _same_settings(job: Job) -> None:
    """A half-made set goes on with the settings it was begun with."""
    note = job.out / "stats" / "made.json"
    mine = json.loads(dump({**job.made, "job": _key(job)}))
    if note.exists():
        if json.loads(note.read_text(encoding="utf-8")) != mine:
            raise InputError(
                f"{job.out}: begun with other settings or inputs; name another folder or remove it"
            )
        return
    if any(job.out.glob("*.tar")):
        raise InputError(f"{job.out}: has shards that are not of this run; name another folder")
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, dump(mine))


def _key(job: Job) -> str:
    """A hash of all that decides the bytes of the shards."""
    what = (job.shards, job.shard_size, job.count, getattr(job.maker, "key", repr(job.maker)))
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


# --- processes ---------------------------------------------------------------------------------

_JOB: list[Job] = []  # of this worker process


def _begin(pickled: bytes) -> None:
    _JOB[:] = [pickle.loads(pickled)]


def _make(shard: int) -> dict[str, Any]:
    return _JOB[0].make(shard)


def _here(job: Job, processes: int) -> Iterator[dict[str, Any]]:
    if processes <= 1 or job.shards == 1:
        yield from map(job.make, range(job.shards))
        return
    # Spawned, not forked: browsers and OCR engines have threads. The job is sent once a process.
    context = get_context("spawn")
    workers = min(processes, job.shards)
    sent = (pickle.dumps(job),)
    with ProcessPoolExecutor(workers, context, _begin, sent) as pool:
        tasks = [pool.submit(_make, shard) for shard in range(job.shards)]
        try:
            for task in as_completed(tasks):
                yield task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- Ray ---------------------------------------------------------------------------------------


def _on_ray(job: Job, address: str) -> Iterator[dict[str, Any]]:
    ray = _library()
    data = import_module("ray.data")
    started = not ray.is_initialized()
    if started:
        try:
            # A cluster that is there has its own dashboard, or none.
            more = {"include_dashboard": False} if address == "local" else {}
            ray.init(address, log_to_driver=False, logging_level="ERROR", **more)
        except Exception as error:  # connection errors of many kinds
            reason = " ".join(str(error).split())[:200]
            raise ResourceError(
                f"Ray at {address!r} cannot be reached ({reason}); start one or give 'local'"
            ) from None
    try:
        data.DataContext.get_current().enable_progress_bars = False  # there is our own
        box = ray.put(job)  # once, not with every shard

        def make(row: dict[str, Any]) -> dict[str, Any]:
            return {"stats": json.dumps(ray.get(box).make(int(row["id"])))}

        rows = data.range(job.shards, override_num_blocks=job.shards).map(make)
        for row in rows.iter_rows():
            yield json.loads(row["stats"])
    finally:
        if started:
            ray.shutdown()


def _library() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        raise ResourceError("Ray is not installed; pip install 'cogvlm[ray]'") from None


def described(maker: Any) -> dict[str, Any]:
    """The plain settings of a maker and of what is in it, for the index."""
    found: dict[str, Any] = {}
    for one in fields(maker):
        value = getattr(maker, one.name)
        if isinstance(value, (bool, int, float, str)):
            found[one.name] = value
        elif one.name == "kinds":
            found[one.name] = dict(value)
        elif is_dataclass(value):
            found |= described(value)
    return found


def shards_of(count: int, size: int) -> int:
    """Shards that ``count`` samples fill.

    >>> shards_of(1001, 500)
    3
    """
    return -(-count // size)


def parts_of(inputs: Iterable[Any], shard: int, shards: int) -> Iterator[tuple[int, Any]]:
    """Every ``shards``-th input from the ``shard``-th on, with its number."""
    for number, one in enumerate(inputs):
        if number % shards == shard:
            yield number, one
