"""All of it: from a job, a source of results and a sink to files and a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from ..journal import dump
from .pictures import Failure, find
from .sinks import Sink
from .work import Caption, Job, Result, todo

Source = Callable[[Job], Generator[list[Result], None, None]]
"""What makes results of a job: :func:`work` or :func:`spread`, with their rest filled in."""

Progress = Callable[[int, int, int], None]
"""Called with (done, failed, all) at the start and after every batch."""


@dataclass(frozen=True)
class Summary:
    """What a run did.

    ``pictures`` is all that were found: ``captioned`` and ``failed`` now, ``skipped`` because they
    had a caption before, ``links`` because they were met under another name.
    """

    pictures: int
    captioned: int
    failed: int
    skipped: int
    links: int
    seconds: float
    failures: str | None  # the file that lists them


def caption_folder(
    job: Job,
    sink: Sink,
    source: Source,
    progress: Progress | None = None,
) -> Summary:
    """Caption what has no caption yet.

    Args:
        job: What; ``done`` and ``beside`` are the sink's.
        sink: Where captions go.
        source: What answers; it is not called where nothing is to be done.
        progress: Called as the work goes on.

    Raises:
        RemoteError, ResourceError: the work cannot go on; what was done is kept.
    """
    started = time.monotonic()
    job = replace(job, done=sink.done, beside=sink.beside)
    pictures, links, unread = _count(job)
    left = sum(1 for _ in todo(job))
    done = 0
    with _FailureList(sink.failed) as failures:
        if left:
            with closing(source(job)) as batches:
                for results in batches:
                    captions = [result for result in results if isinstance(result, Caption)]
                    failures.add(result for result in results if isinstance(result, Failure))
                    lost = sink.put(captions)
                    failures.add(lost)
                    done += len(_names(captions) - {failure.name for failure in lost})
                    if progress is not None:
                        progress(done, failures.count, left)
        failures.add(sink.finish())
    skipped = pictures + unread - links - left
    listed = str(sink.failed) if failures.count else None
    seconds = round(time.monotonic() - started, 3)
    return Summary(pictures, done, failures.count, skipped, links, seconds, listed)


def _names(captions: list[Caption]) -> set[str]:
    return {caption.name for caption in captions}


def _count(job: Job) -> tuple[int, int, int]:
    """Pictures, those of them that are left to their other name, and folders without access."""
    pictures = links = unread = 0
    for found in find(job.folder, job.recursive):
        if isinstance(found, Failure):
            unread += 1
        else:
            pictures += 1
            links += found.link and not job.beside
    return pictures, links, unread


class _FailureList:
    """The list of failures of this run, complete under its name at the end, gone if it is empty."""

    def __init__(self, path: Path) -> None:
        self._path, self._half = path, path.with_name(f".{path.name}.part")
        self.count = 0

    def __enter__(self) -> _FailureList:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._half.open("wb")
        return self

    def add(self, failures: Iterable[Failure]) -> None:
        """Note failures."""
        for failure in failures:
            self._file.write(dump({"file_name": failure.name, "reason": failure.reason}))
            self.count += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self.count:
            self._half.replace(self._path)
        else:
            self._half.unlink()
            self._path.unlink(missing_ok=True)
