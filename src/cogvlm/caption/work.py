"""Captions, batch by batch: what is left to do, read ahead by threads, answered by a backend.

Writes nothing.  Reading ahead is bounded: at most two batches of pictures are in memory.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from ..backend import Backend, Reply
from ..errors import CogVLMError, ConfigError, RemoteError
from ..journal import one_line
from ..processor import Image, Message, Text
from ..settings import GenerationSettings
from .pictures import Failure, Picture, find
from .prompt import Prompt


@dataclass(frozen=True)
class Caption:
    """One picture's caption.

    Attributes:
        name: Of the picture within the folder.
        text: With what goes before and after it.
        prompt: What was asked.
        stop: Why it ended; ``length``: it was cut off.
    """

    name: str
    text: str
    prompt: str
    stop: str


Result: TypeAlias = "Caption | Failure"


def never(picture: Picture) -> bool:
    """No picture is done."""
    return False


@dataclass(frozen=True)
class Job:
    """What is to be done; can be sent to another process.

    Raises:
        ConfigError: a batch of none.
        MessageError: before or after a caption is to stand what is no text.
    """

    folder: Path
    prompt: Prompt
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    prefix: str = ""
    suffix: str = ""
    recursive: bool = True
    batch_size: int = 8
    done: Callable[[Picture], bool] = never
    beside: bool = True  # a caption for every name, and one for pictures that share a stem
    share: tuple[int, int] = (0, 1)  # which of how many

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} is out of range: give 1 or more")
        Text(self.prefix), Text(self.suffix)

    def mine(self, name: str) -> bool:
        """Whether this share has the picture; depends on its name alone."""
        which, count = self.share
        return zlib.crc32(os.fsencode(name)) % count == which


def todo(job: Job) -> Iterator[Picture | Failure]:
    """What of the folder is to be done, in order."""
    for found in find(job.folder, job.recursive):
        if not job.mine(found.name):
            continue
        if isinstance(found, Failure):
            yield found
        elif job.beside and found.twin is not None:
            yield Failure(
                found.name,
                f"its caption would have the name of that of {found.twin}; rename one of them, or "
                "write JSON lines",
            )
        elif not (found.link and not job.beside) and not job.done(found):
            yield found


def work(job: Job, backend: Backend) -> Generator[list[Result], None, None]:
    """Captions and failures, a batch at a time.

    Raises:
        RemoteError: the server will answer no more; what it answered was yielded before.
    """
    threads = min(job.batch_size, os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(threads, thread_name_prefix="cogvlm-caption") as pool:
        source = _ahead(job, backend, pool)
        try:
            while batch := list(islice(source, job.batch_size)):
                yield from _answer(job, backend, batch)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Ready:
    name: str
    prompt: str
    input: Any  # what the backend made of picture and prompt


def _ahead(job: Job, backend: Backend, pool: ThreadPoolExecutor) -> Iterator[_Ready | Failure]:
    waiting: deque[Future[_Ready | Failure]] = deque()
    for found in todo(job):
        waiting.append(pool.submit(_read, job, backend, found))
        if len(waiting) >= 2 * job.batch_size:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(job: Job, backend: Backend, found: Picture | Failure) -> _Ready | Failure:
    if isinstance(found, Failure):
        return found
    try:
        prompt = job.prompt.fill(found, job.folder)
        message = Message("user", (Image(found.path), Text(prompt)))
        return _Ready(found.name, prompt, backend.prepare([message]))
    except (CogVLMError, OSError) as error:
        return Failure(found.name, one_line(error))
    except MemoryError:
        return Failure(found.name, "not enough memory to read it")


def _answer(job: Job, backend: Backend, batch: list[_Ready | Failure]) -> Iterator[list[Result]]:
    ready = [item for item in batch if isinstance(item, _Ready)]
    results: list[Result] = [item for item in batch if isinstance(item, Failure)]
    replies = backend.answer_batch([item.input for item in ready], job.settings) if ready else []
    stopped: RemoteError | None = None
    for item, reply in zip(ready, replies, strict=True):
        if isinstance(reply, RemoteError) and reply.stops:
            stopped = stopped or reply
        else:
            results.append(_result(job, item, reply))
    yield results
    if stopped is not None:
        raise stopped


def _result(job: Job, item: _Ready, reply: Reply | CogVLMError) -> Result:
    if isinstance(reply, CogVLMError):
        return Failure(item.name, one_line(reply))
    text = reply.text.strip()
    if not text:
        return Failure(item.name, "the answer is empty; try another prompt")
    return Caption(item.name, f"{job.prefix}{text}{job.suffix}", item.prompt, reply.stop)
