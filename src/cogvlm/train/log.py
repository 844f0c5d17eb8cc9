"""Figures of a run: lines of JSON, other programs that want them, and a picture at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, ResourceError

Points = list[tuple[float, float]]


class Tracker(Protocol):
    """Another program that shows figures."""

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


class Log:
    """``log.jsonl`` in ``folder``, and what goes with it."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.folder, self.trackers = folder, trackers
        self.path = folder / "log.jsonl"

    def __call__(self, record: dict[str, Any]) -> None:
        """Append a line and print it."""
        rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in record.items()}
        line = json.dumps(rounded, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
        print(line, flush=True)
        figures = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for tracker in self.trackers:
            tracker.add(int(record["step"]), figures)

    def lines(self) -> list[dict[str, Any]]:
        """What is written; a torn last line is left out."""
        found = []
        if self.path.exists():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    found.append(json.loads(text))
                except ValueError:
                    continue
        return [line for line in found if isinstance(line, dict) and "step" in line]

    def measured(self, step: int) -> bool:
        """Whether the figures of an evaluation at ``step`` are written."""
        here = (line for line in self.lines() if line["step"] == step)
        return any(key.startswith("eval_") for line in here for key in line)

    def rewind(self, step: int) -> None:
        """Forget lines of later steps, which are about to be made again; of 0: all lines."""
        if not self.path.exists():
            return
        kept = [line for line in self.lines() if line["step"] <= step and step]
        temporary = self.path.with_suffix(".tmp")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path)

    def close(self) -> None:
        """Draw the losses; tell the trackers."""
        lines = self.lines()
        curves = {
            label: [(float(x["step"]), float(x[key])) for x in lines if key in x]
            for label, key in (("training", "loss"), ("held out", "eval_loss"))
        }
        if any(len(points) > 1 for points in curves.values()):
            (self.folder / "loss.svg").write_text(plot(curves), encoding="utf-8")
        for tracker in self.trackers:
            tracker.close()


COLOURS = ("#1f77b4", "#d62728")


def plot(curves: dict[str, Points], width: int = 640, height: int = 360) -> str:
    """Curves as an SVG with their scales.

    >>> plot({"training": [(1, 2.0), (5, 1.0)]}).count("<polyline")
    1
    """
    points = [point for curve in curves.values() for point in curve]
    left, top, right, bottom = 56, 16, width - 16, height - 40
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = min(x for x, _ in points), max(x for x, _ in points)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1)
        down = (high - y) / ((high - low) or 1)
        return round(left + across * (right - left), 1), round(top + down * (bottom - top), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i in range(5):
        y = low + (high - low) * i / 4
        x, down = at(first, y)
        parts.append(f'<path d="M{x} {down}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{down + 4}" text-anchor="end">{y:.3g}</text>')
        step = first + (last - first) * i / 4
        x, _ = at(step, low)
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{step:.0f}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">step</text>')
    shown = [(label, curve) for label, curve in curves.items() if curve]
    for i, (label, curve) in enumerate(shown):
        line = " ".join(f"{x},{y}" for x, y in (at(*point) for point in curve))
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = top + 14 + 16 * i
        parts.append(f'<text x="{right - 80}" y="{y}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


class _TensorBoard:
    def __init__(self, folder: Path, name: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ResourceError(
                "track: tensorboard is not installed; pip install tensorboard"
            ) from error
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def add(self, step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ResourceError("track: wandb is not installed; pip install wandb") from error
        self.run: Any = wandb.init(project="cogvlm", name=name, dir=str(folder), resume="allow")

    def add(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


_TRACKERS: dict[str, Callable[[Path, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}


def trackers(names: Iterable[str], folder: Path, name: str) -> list[Tracker]:
    """What a recipe asks for under ``track``.

    Raises:
        ConfigError: an unknown name.
        ResourceError: it is not installed.
    """
    made: list[Tracker] = []
    for wanted in names:
        if wanted not in _TRACKERS:
            raise ConfigError(f"track: {wanted!r} is not one of {', '.join(_TRACKERS)}")
        made.append(_TRACKERS[wanted](folder, name))
    return made
