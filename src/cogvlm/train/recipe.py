"""A recipe file (YAML) to a checked recipe.

A recipe names its ``stage``; each stage knows its own keys and refuses others.  Everything that
decides the outcome is in the file: seeds, data, schedule, the files it starts from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

import yaml

from ..config import CogVLMConfig, preset
from ..errors import ConfigError, refuse_unknown
from .loop import Schedule
from .pages import PageData

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

    stage: str  # read | align | answer | ctc | instruct
    schedule: Schedule
    name: str = "run"
    seed: int = 0
    model: str = "nano"  # preset
    config: dict[str, Any] = field(default_factory=dict)  # changes to the preset
    init: tuple[str, ...] = ()  # safetensors files to start from; later ones win
    language: str = "smollm2-135m-instruct"  # frozen language model, for align and answer
    data: LineData = field(default_factory=LineData)
    pages: PageData | None = None  # for align: pages of several lines among the lines
    pixels: dict[str, Any] = field(default_factory=dict)  # of the rule for picture sizes
    questions: tuple[str, ...] = ("What does the picture say?",)  # for answer
    adapter_lr: float = 1.0  # learning-rate scale of the adapter in stage answer
    tower_lr: float = 0.1  # learning-rate scale of the tower in stage answer; 0 freezes it
    text_lr: float = 1.0  # of the corrections of the language weights, see config.text_rank
    device: str = "auto"

    @property
    def model_config(self) -> CogVLMConfig:
        """The preset with the recipe's changes."""
        return preset(self.model, **self.config)


@dataclass(frozen=True)
class Part:
    """A part of the model that is trained whole."""

    lr: float = 1.0  # times schedule.lr; 0 freezes it
    weight_decay: float | None = None  # none: schedule.weight_decay


@dataclass(frozen=True)
class Lora:
    """LoRAs beside frozen weights."""

    targets: tuple[str, ...]  # see cogvlm.adapter.TARGETS
    rank: int = 16
    alpha: float | None = None  # none: the rank
    dropout: float = 0.0
    lr: float = 1.0  # times schedule.lr
    weight_decay: float | None = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.targets, tuple) or not self.targets:
            raise ConfigError(f"lora: targets is {self.targets!r}; give a list of names")
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"lora: rank is {self.rank!r}; give 1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora: dropout is {self.dropout}; give 0 or more, below 1")
        if not self.lr > 0:
            raise ConfigError(f"lora: lr is {self.lr}; give more than 0, or leave lora out")


@dataclass(frozen=True)
class TuneRecipe:
    """What a recipe file of stage "tune" holds; what neither parts nor lora name is frozen."""

    stage: str
    schedule: Schedule
    data: tuple[Any, ...]  # entries of cogvlm.data.sft.Mix.open
    name: str = "run"
    seed: int = 0
    model: str = "nano"  # name, folder or hub name
    tokenizer: str | None = None
    precision: str = "auto"  # of what is frozen: see cogvlm.load
    compute: str = "auto"  # fp32 | bf16 | fp16; auto: fp32 for float32 weights, else bf16
    checkpointing: bool = False  # keep no activations inside the layers
    compile: bool = False  # the decoder's layers, see train/compiled.py
    parallel: str = "ddp"  # with several processes, see train/distributed.py
    parts: dict[str, Part] = field(default_factory=dict)  # adapter, experts, tower, cross, language
    lora: Lora | None = None
    held_out: float = 0.1  # share of the records that measures and never trains
    batch_size: int = 8  # rows in memory at once
    accumulate: int = 1  # micro-batches a step
    max_tokens: int | None = None  # of a row
    packing: bool = False  # rows of a step end to end in sequences of max_tokens, one at a time
    too_long: str = "drop"  # drop | cut
    # Pixels a side of square pictures, or from which step on: {0: 224, 30000: 490}.
    resolution: int | dict[int, int] | None = None
    image_loss: float = 0.0  # weight of the loss on pictures themselves, see train/sight.py
    eval_count: int = 64  # held-out records whose loss is measured
    eval_answers: int = 32  # of these, that are answered
    max_new_tokens: int = 64  # of an answer
    samples: int = 4  # answers in the log
    workers: int = 1  # processes that prepare rows
    track: tuple[str, ...] = ()  # tensorboard, wandb
    device: str = "auto"
    base: str = "."  # folder where relative paths of the data begin: that of the recipe

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("accumulate", 1),
            ("eval_count", 0),
            ("eval_answers", 0),
            ("max_new_tokens", 1),
            ("samples", 0),
            ("workers", 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} is {value!r}; give {least} or more")
        if self.max_tokens is not None and (
            type(self.max_tokens) is not int or self.max_tokens < 2
        ):
            raise ConfigError(f"max_tokens is {self.max_tokens!r}; give 2 or more, or leave it out")
        if self.packing and self.max_tokens is None:
            raise ConfigError("packing needs max_tokens, the length of a packed sequence")
        if self.too_long not in ("drop", "cut"):
            raise ConfigError(f"too_long is {self.too_long!r}; give drop or cut")
        steps = self.resolutions
        wrong = [v for pair in steps.items() for v in pair if type(v) is not int or v < 0]
        if wrong or (steps and (0 not in steps or 0 in steps.values())):
            raise ConfigError(
                f"resolution is {self.resolution!r}; give pixels a side, or steps with pixels, "
                "from step 0 on: {0: 224, 30000: 490}"
            )
        if self.parallel not in ("ddp", "zero2", "fsdp", "tensor"):
            raise ConfigError(f"parallel is {self.parallel!r}; give ddp, zero2, fsdp or tensor")
        if self.parallel != "ddp" and self.schedule.optimizer != "adamw":
            raise ConfigError(
                f"parallel {self.parallel}: {self.schedule.optimizer} needs whole matrices; take "
                "adamw, or ddp"
            )
        if not 0 <= self.image_loss < float("inf"):
            raise ConfigError(f"image_loss is {self.image_loss!r}; give 0 or more")
        if self.precision in ("float16", "fp16"):
            raise ConfigError("precision float16 cannot train; take bfloat16, or compute: fp16")
        if self.compute not in ("auto", "fp32", "bf16", "fp16"):
            raise ConfigError(f"compute is {self.compute!r}; give auto, fp32, bf16 or fp16")

    @property
    def resolutions(self) -> dict[int, int]:
        """Step to pixels a side from there on; empty: the model's own."""
        if self.resolution is None:
            return {}
        return self.resolution if isinstance(self.resolution, dict) else {0: self.resolution}

    @property
    def side(self) -> int | None:
        """The most pixels a side; none: the model's own."""
        return max(self.resolutions.values(), default=None)


def _tune(values: dict[str, Any], path: Path) -> TuneRecipe:
    """A recipe of stage "tune" from checked keys."""
    from ..adapter import PARTS

    if not isinstance(values.get("data"), list) or not values["data"]:
        raise ConfigError(
            f"{path}: data is {values.get('data')!r}; give a list of files or folders"
        )
    parts = values.get("parts") or {}
    if not isinstance(parts, dict):
        raise ConfigError(f"{path}: parts is {parts!r}; give names and their settings")
    refuse_unknown(parts, PARTS, f"{path}: parts")
    values["parts"] = {k: build(Part, v or {}, f"{path}: parts.{k}") for k, v in parts.items()}
    if values.get("lora") is not None:
        values["lora"] = build(Lora, values["lora"], f"{path}: lora")
    values.setdefault("base", str(path.parent))
    made = build(TuneRecipe, values, str(path))
    if not made.parts and made.lora is None:
        raise ConfigError(f"{path}: nothing trains; name parts, a lora, or both")
    return made


def build(kind: Callable[..., T], values: Any, where: str) -> T:
    """A frozen dataclass from plain YAML values.

    Raises:
        ConfigError: unknown or missing keys, or a value that is no number, text or such where the
            field is one.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected keys and values, got {type(values).__name__}")
    refuse_unknown(values, [f.name for f in fields(cast(Any, kind))], where)
    ready = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    hints = get_type_hints(kind)
    for name, value in ready.items():
        _check_type(value, get_args(hints[name]) or (hints[name],), f"{where}: {name}")
    try:
        made: T = kind(**ready)
        return made
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text (in quotes)"}


def _check_type(value: Any, allowed: tuple[Any, ...], where: str) -> None:
    """Refuse a value of none of the ``allowed`` types, if all of these are plain ones."""
    if not all(kind in _WORDS or kind is NoneType for kind in allowed):
        return
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        wanted = " or ".join(_WORDS.get(kind, "nothing") for kind in allowed)
        raise ConfigError(f"{where} is {value!r}; give {wanted}")


class _Yaml(yaml.SafeLoader):
    """YAML whose ``1e-4`` is a number, as in version 1.2, and not text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def override(values: dict[str, Any], assignments: list[str]) -> None:
    """Apply ``key.sub=value`` settings (values are YAML) to ``values`` in place.

    >>> d = {"schedule": {"steps": 5}}
    >>> override(d, ["schedule.steps=7"]); d
    {'schedule': {'steps': 7}}
    >>> override(d, ["schedule.lr=1e-4"]); d
    {'schedule': {'steps': 7, 'lr': 0.0001}}
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
        try:
            target[last] = yaml.load(text, _Yaml)
        except yaml.YAMLError as error:
            told = " ".join(str(error).split())
            raise ConfigError(f"--set {assignment}: not valid YAML: {told}") from error


def load(path: Path, assignments: list[str] | None = None) -> Recipe | TuneRecipe:
    """Read and check a recipe file.

    Raises:
        ConfigError: no such file, not YAML, unknown or missing keys.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a file of keys and values")
    override(values, assignments or [])
    kind = TuneRecipe if values.get("stage") == "tune" else Recipe
    refuse_unknown(values, [f.name for f in fields(cast(Any, kind))], str(path))
    values["schedule"] = build(Schedule, values.get("schedule", {}), f"{path}: schedule")
    if kind is TuneRecipe:
        return _tune(values, path)
    if "data" in values:
        values["data"] = build(LineData, values["data"], f"{path}: data")
    if values.get("pages") is not None:
        values["pages"] = build(PageData, values["pages"], f"{path}: pages")
    return build(Recipe, values, str(path))
