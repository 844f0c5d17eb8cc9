"""What the benchmarks share: command line, timing, memory, facts of the machine, the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sides import Prompt, Side, Sizes

Seconds = list[float]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Run:
    """What the command line asked for."""

    sizes: Sizes
    quick: bool = False
    # "cpu": seconds of this process, all threads added; what to look at, with one thread, when
    # other programs hold the cores.
    clock: str = "wall"

    @property
    def now(self) -> Clock:
        """The clock."""
        return CLOCKS[self.clock]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).abs().max())


def interleave(
    sides: Mapping[str, Callable[[int], object]],
    repeats: int,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Seconds]:
    """Time every side in turn, ABAB...: what else the machine does hits all of them alike.

    Args:
        sides: functions of the number of the round, warm-up rounds included.
        repeats: timed rounds.
        warmup: rounds before them.
        clock: in seconds.
    """
    times: dict[str, Seconds] = {name: [] for name in sides}
    for round_ in range(warmup + repeats):
        for name, side in sides.items():
            start = clock()
            side(round_)
            seconds = clock() - start
            if round_ >= warmup:
                times[name].append(seconds)
    return times


def time_prefill(sides: Mapping[str, Side], prompt: Prompt, run: Run) -> dict[str, Seconds]:
    """Prefills of all sides in turn."""

    def reader(side: Side) -> Callable[[int], object]:
        return lambda _: side.prefill(prompt)

    readers = {name: reader(side) for name, side in sides.items()}
    return interleave(readers, run.sizes.repeats, clock=run.now)


def time_decode(
    sides: Mapping[str, Side], tokens: Sequence[Tensor], run: Run
) -> dict[str, Seconds]:
    """Decode steps of all sides in turn, after a prefill; every cache grows alike."""

    def stepper(side: Side) -> Callable[[int], object]:
        return lambda i: side.step(tokens[i])

    steppers = {name: stepper(side) for name, side in sides.items()}
    warmup = min(3, len(tokens) - 1)
    return interleave(steppers, len(tokens) - warmup, warmup, clock=run.now)


class CountOperators(TorchDispatchMode):
    """Counts what torch is asked to compute; views of tensors are free and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 0 if func.is_view else 1
        return func(*args, **(kwargs or {}))


def operators(work: Callable[[], object]) -> int:
    """How many operators ``work`` calls: on an accelerator, about the number of launches."""
    counter = CountOperators()
    with counter:
        work()
    return counter.count


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that were allocated at one time by ``work``, beyond what existed before.

    Exact and the same on every run: the sum of the live blocks that torch's CPU allocator
    reports to the profiler.  Scratch space that BLAS takes for itself is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    blocks = [event["args"] for event in events if event.get("name") == "[memory]"]
    live: dict[int, int] = {}
    now = peak = 0
    for block in sorted(blocks, key=lambda b: b["Ev Idx"]):
        if block["Bytes"] > 0:
            live[block["Addr"]] = block["Bytes"]
            now += block["Bytes"]
            peak = max(peak, now)
        else:  # a block of before the recording has no entry
            now -= live.pop(block["Addr"], 0)
    return peak


def spread(times: Seconds) -> dict[str, float]:
    """Median and quartiles in milliseconds, and their number."""
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    rounded = {"median": median(times), "q1": low, "q3": high}
    return {k: round(1e3 * v, 3) for k, v in rounded.items()} | {"n": len(times)}


def ratio(above: Seconds, below: Seconds) -> dict[str, float]:
    """Ratio of the medians, and quartiles of the ratios of the rounds."""
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    low, _, high = (
        quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else (rounds[0],) * 3
    )
    values = {"ratio": median(above) / median(below), "q1": low, "q3": high}
    return {k: round(v, 3) for k, v in values.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, load and versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Of the last minute, before anything is timed; near 0 on a quiet machine.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def commit() -> str:
    """The checkout's commit; ``-dirty`` if model or benchmarks differ from it."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src/cogvlm", "benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Goal:
    """A bound on one ratio."""

    bound: str  # at_most or at_least
    value: float

    def met(self, ratio_: float) -> bool:
        """Whether the ratio keeps to it."""
        return ratio_ <= self.value if self.bound == "at_most" else ratio_ >= self.value


@dataclass
class Result:
    """What a benchmark found; :meth:`line` is its JSON line."""

    name: str
    run: Run
    machine: dict[str, Any]
    times: dict[str, dict[str, float]]  # milliseconds
    ratios: dict[str, dict[str, float]]
    goals: dict[str, Goal]  # by the name of the ratio
    differences: dict[str, float]  # largest absolute difference of logits, both sides
    tolerance: float
    more: dict[str, Any]

    @property
    def agree(self) -> bool:
        """Whether both sides computed the same."""
        return all(value <= self.tolerance for value in self.differences.values())  # not NaN

    def line(self) -> str:
        """One line of JSON."""
        goals = {
            name: {goal.bound: goal.value, "met": goal.met(self.ratios[name]["ratio"])}
            for name, goal in self.goals.items()
        }
        found = {
            "name": self.name,
            "commit": commit(),
            "quick": self.run.quick,
            "machine": self.machine,
            "clock": self.run.clock,
            "dtype": "float32",
            "sizes": asdict(self.run.sizes),
            "max_abs_difference": {k: float(f"{v:.3g}") for k, v in self.differences.items()},
            "agree": self.agree,
            "milliseconds": self.times,
            "ratios": self.ratios,
            **self.more,
            "goals": goals,
            "ok": self.agree and all(goal["met"] for goal in goals.values()),
        }
        return json.dumps(found)


def finish(result: Result) -> int:
    """Print the line, last; exit status 1 if the two sides did not compute the same."""
    print(result.line(), flush=True)
    return 0 if result.agree else 1


def main(doc: str | None, measure: Callable[[Run], Result]) -> int:
    """The command line of a benchmark: ``--quick``, ``--threads``, and one option per size."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a smoke test")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="see README.md")
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    given = vars(parser.parse_args())
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    sizes = Sizes.tiny() if given["quick"] else Sizes()
    changes = {f.name: given[f.name] for f in fields(Sizes) if given[f.name] is not None}
    sizes = replace(sizes, **changes)
    most = sizes.prompt - sizes.padding - 2  # a begin token before the image, text after it
    if sizes.image > most:
        parser.error(
            f"--image {sizes.image} leaves no text in a prompt of {sizes.prompt} tokens of which "
            f"{sizes.padding} may be padding; give at most {most}"
        )
    transformers.logging.set_verbosity_error()
    return finish(measure(Run(sizes, given["quick"], given["clock"])))
