"""Several processes, each with a model of its own and an interleaved share of the pictures.

Only the first process writes files; the others send it what they found.  One that dies takes with
it what it had not sent: the rest goes on, and another run does what is missing.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TypeAlias

from ..backend import Backend
from ..errors import CogVLMError, ResourceError
from ..journal import one_line
from .work import Job, Result, work

Opener: TypeAlias = "Callable[[str, int], Backend]"
"""From a device and the number of processes to a backend; can be sent to another process."""

_END = None  # sent last: nothing is left


def spread(job: Job, opener: Opener, devices: Sequence[str]) -> Generator[list[Result], None, None]:
    """Captions and failures of all shares as they come, one process for every device.

    Raises:
        ResourceError: processes failed; raised at the end, when the others are done.
    """
    context = get_context("spawn")  # CUDA survives no fork
    running: dict[Connection, str] = {}
    processes = []
    faults: list[str] = []
    try:
        for rank, device in enumerate(devices):
            here, there = context.Pipe(duplex=False)
            share = replace(job, share=(rank, len(devices)))
            process = context.Process(
                target=_serve, args=(there, opener, device, share), daemon=True
            )
            process.start()
            processes.append(process)
            there.close()  # so that its end is seen here
            running[here] = f"process {rank} on {device}"
        while running:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    item: list[Result] | str | None = ready.recv()
                except (EOFError, OSError):
                    item = "was killed"
                if isinstance(item, list):
                    yield item
                    continue
                name = running.pop(ready)
                ready.close()
                if item is not _END:
                    faults.append(f"{name}: {item}")
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for connection in running:
            connection.close()
    if faults:
        raise ResourceError(
            f"{len(faults)} of {len(devices)} processes failed ({'; '.join(faults)}); what they "
            "did is kept, another run does the rest"
        )


def _serve(there: Connection, opener: Opener, device: str, job: Job) -> None:
    # Ctrl-C reaches every process of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Where the first process is gone, nobody is left to tell.
    with suppress(BrokenPipeError):
        try:
            for results in work(job, opener(device, job.share[1])):
                there.send(results)
            there.send(_END)
        except BrokenPipeError:
            raise
        except CogVLMError as error:
            there.send(one_line(error))
        except Exception as error:
            there.send(f"{type(error).__name__}: {one_line(error)}")
