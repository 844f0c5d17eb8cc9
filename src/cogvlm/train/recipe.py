"""A recipe file (YAML) to a checked recipe.

A recipe names its ``stage``; each stage knows its own keys and refuses others.  Everything that
decides the outcome is in the file: seeds, data, schedule, the files it starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from ..config import CogVLMConfig, preset
from ..errors import ConfigError, refuse_unknown
from .loop import Schedule

T = TypeVar("T")


@dataclass(frozen=True)
class LineData:
    """Rendered lines of text (:mod:`cogvlm.data.lines`)."""

    min_chars: int = 1
    max_chars: int = 24
    strength: float = 1.0  # of the augmentation, 0 to 1
    texts: tuple[str, ...] = ()  # text files; none: the documentation every Python carries
    fonts: tuple[str, ...] = ()  # folders; none: the system's
    batch_size: int = 64
    pool_size: int = 256  # lines rendered and sorted together
    workers: int = 1  # rendering processes


@dataclass(frozen=True)
class Recipe:
    """What a recipe file holds."""

    stage: str  # read | align | answer
    schedule: Schedule
    name: str = "run"
    seed: int = 0
    model: str = "nano"  # preset
    config: dict[str, Any] = field(default_factory=dict)  # changes to the preset
    init: tuple[str, ...] = ()  # safetensors files to start from; later ones win
    language: str = "smollm2-135m-instruct"  # frozen language model, for align and answer
    data: LineData = field(default_factory=LineData)
    questions: tuple[str, ...] = ("What does the picture say?",)  # for answer
    adapter_lr: float = 1.0  # learning-rate scale of the adapter in stage answer
    tower_lr: float = 0.1  # learning-rate scale of the tower in stage answer; 0 freezes it
    device: str = "auto"

    @property
    def model_config(self) -> CogVLMConfig:
        """The preset with the recipe's changes."""
        return preset(self.model, **self.config)


def build(kind: Callable[..., T], values: Any, where: str) -> T:
    """A frozen dataclass from plain YAML values.

    Raises:
        ConfigError: unknown or missing keys.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected keys and values, got {type(values).__name__}")
    refuse_unknown(values, [f.name for f in fields(cast(Any, kind))], where)
    ready = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        made: T = kind(**ready)
        return made
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def override(values: dict[str, Any], assignments: list[str]) -> None:
    """Apply ``key.sub=value`` settings (values are YAML) to ``values`` in place.

    >>> d = {"schedule": {"steps": 5}}
    >>> override(d, ["schedule.steps=7"]); d
    {'schedule': {'steps': 7}}
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write key=value")
        *parents, last = path.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {assignment}: {parent!r} holds a value, not keys")
        target[last] = yaml.safe_load(text)


def load(path: Path, assignments: list[str] | None = None) -> Recipe:
    """Read and check a recipe file.

    Raises:
        ConfigError: no such file, not YAML, unknown or missing keys.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a file of keys and values")
    override(values, assignments or [])
    refuse_unknown(values, [f.name for f in fields(Recipe)], str(path))
    values["schedule"] = build(Schedule, values.get("schedule", {}), f"{path}: schedule")
    if "data" in values:
        values["data"] = build(LineData, values["data"], f"{path}: data")
    return build(Recipe, values, str(path))
