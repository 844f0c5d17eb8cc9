"""What was tuned on top of a model: LoRA in peft's layout, and whole parts, in one folder.

::

    adapter_config.json          as peft writes it
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight and .lora_B.weight
    parts.safetensors            tensors that replace the model's own, under the released names

Either kind may be absent.  Knows the parts of a model by the names of its tensors, and nothing
about training.  peft is imported when a LoRA is put in or taken up.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .errors import CheckpointError, ConfigError, InputError, ResourceError
from .linear import QuantisedLinear
from .models import parallel
from .models.checkpoint import read_safetensors, report
from .tensors import save_tensors

Model = TypeVar("Model", bound=nn.Module)

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
PART_WEIGHTS = "parts.safetensors"
PREFIX = "base_model.model."
"""In front of every name in peft's files."""

PARTS = ("adapter", "experts", "tower", "cross", "language")
"""``cross`` is CogAgent's: its cross-attention and the encoder that this reads."""

_PARTS = (
    (r"\.cross_attn\.|\.post_cross_attention_|(^|\.)cross_vision\.", "cross"),
    (r"\.vision_expert_|\.vision_mlp\.", "experts"),
    (r"(^|\.)vision\.(transformer|patch_embedding|pos_embed)", "tower"),
    (r"(^|\.)vision\.ctc\.", "ctc"),  # learns in a stage of its own
    (r"(^|\.)vision\.", "adapter"),
)
_GLM = r"encoder\.layers\.\d+\.mlp\.dense_(?:h_to_4h|4h_to_h)"
TARGETS = {
    "adapter": r"vision\.linear_proj\.(?:linear_proj|gate_proj|dense_h_to_4h|dense_4h_to_h)",
    "tower": r"vision\.transformer\.layers\.\d+\."
    r"(?:attention\.(?:query_key_value|dense)|mlp\.fc[12])",
    "experts.qkv": r"self_attn\.vision_expert_query_key_value",
    "experts.dense": r"self_attn\.vision_expert_dense",
    "experts.mlp": r"mlp\.vision_mlp\.(?:gate|up|down)_proj",
    "language.qkv": r"self_attn\.language_expert_query_key_value|self_attention\.query_key_value",
    "language.dense": r"self_attn\.language_expert_dense|self_attention\.dense",
    "language.mlp": rf"mlp\.language_mlp\.(?:gate|up|down)_proj|{_GLM}",
}
"""Short names of where a LoRA goes, and the ends of the modules' names as regular expressions."""

_LORA = re.compile(r"(.+)\.lora_([AB])\.default\.weight")
_STORED = re.compile(r"(.+)\.lora_([AB])\.weight")


def part_of(name: str) -> str:
    """The part that a tensor belongs to.

    >>> part_of("model.vision.conv.weight"), part_of("model.norm.weight")
    ('adapter', 'language')
    """
    found = (part for pattern, part in _PARTS if re.search(pattern, name))
    return next(found, "language")


def is_lora(name: str) -> bool:
    """Whether a parameter is of a LoRA put in here (nano's own experts are named alike)."""
    return _LORA.fullmatch(name) is not None


def plain_name(name: str) -> str:
    """A parameter's name as if no LoRA were in the model."""
    return name.replace(".base_layer.", ".")


def _expression(targets: Iterable[str]) -> str:
    """One regular expression for modules; ``experts`` and ``language`` are their three each."""
    wanted: list[str] = []
    for target in targets:
        group = [v for k, v in TARGETS.items() if k == target or k.startswith(f"{target}.")]
        wanted += group or [target]
    return rf"(?:.*\.)?(?:{'|'.join(wanted)})"


def _carries(module: nn.Module) -> bool:
    """Whether a LoRA on the module does something; a subclass may read the weights uncalled."""
    kind = type(module)
    by_bits = kind.__module__.startswith("bitsandbytes")
    return kind is nn.Linear or isinstance(module, QuantisedLinear) or by_bits


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError as error:
        raise ResourceError("LoRA needs peft: pip install 'cogvlm[train]'") from error
    return peft


def inject(
    model: nn.Module, targets: Iterable[str], rank: int, alpha: float, dropout: float = 0.0
) -> Any:
    """Put a fresh LoRA, which changes nothing yet, on the linear layers that ``targets`` name.

    Args:
        model: changed in place; in any precision.
        targets: keys of :data:`TARGETS`, ``experts``, ``language``, or regular expressions for the
            ends of modules' names.
        rank: of the LoRA.
        alpha: its output counts ``alpha / rank`` times.
        dropout: of its input, while training.

    Returns:
        peft's configuration.

    Raises:
        ConfigError: a target that the model does not have, or that carries none.
        ResourceError: peft is not installed.
    """
    peft = _peft()
    targets = list(targets)
    modules = dict(model.named_modules())
    for target in targets:
        try:
            pattern = re.compile(_expression([target]))
        except re.error as error:
            raise ConfigError(
                f"lora: target {target!r} is no regular expression ({error})"
            ) from error
        found = [name for name in modules if pattern.fullmatch(name)]
        if low := [name for name in found if ".lora_" in name or hasattr(modules[name], "lora_A")]:
            raise ConfigError(
                f"lora: {low[0]} is a low-rank correction itself; train it whole, with "
                "parts: {experts: {}}"
            )
        if not found or not all(_carries(modules[name]) for name in found):
            known = ", ".join([*TARGETS, "experts", "language"])
            where = found[0] if found else "nothing in this model"
            raise ConfigError(
                f"lora: target {target!r} is {where}, no linear layer; known: {known}, and "
                "regular expressions for names of linear layers"
            )
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=_expression(targets)
    )
    _put_in(peft, config, model)
    return config


def _put_in(peft: Any, config: Any, model: nn.Module) -> None:
    from peft.tuners.lora import Linear

    # peft would take the layers of eight and four bits for torchao's own.
    config._register_custom_module({QuantisedLinear: Linear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tied embedding, which is not touched
        with parallel.looking_whole(model):
            peft.inject_adapter_in_model(config, model)
    parallel.cut_pairs(model)


def lora_tensors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA among parameters of a model, under the names of peft's files."""
    found = ((_LORA.fullmatch(name), value) for name, value in values.items())
    return {f"{PREFIX}{m[1]}.lora_{m[2]}.weight": value for m, value in found if m}


def save(folder: Path, values: Mapping[str, Tensor], lora: Any, base: str) -> None:
    """Write the adapter folder.

    Args:
        folder: exists.
        values: the parameters that were trained, by their names in the model.
        lora: peft's configuration; none: there is no LoRA among them.
        base: name of the model below, for people and for peft.
    """
    files = {PART_WEIGHTS: {plain_name(n): v for n, v in values.items() if not is_lora(n)}}
    if lora is not None:
        files[LORA_WEIGHTS] = lora_tensors(values)
        config = {**lora.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
        text = json.dumps({k: _plain(v) for k, v in config.items()}, indent=2, sort_keys=True)
        (folder / LORA_CONFIG).write_text(text + "\n", encoding="utf-8")
    for name, tensors in files.items():
        if tensors:
            ready = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_tensors(ready, folder / name)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else value


@dataclass(frozen=True)
class Stored:
    """An adapter folder, read: peft's settings or none, the LoRA's pairs, whole tensors."""

    folder: Path
    config: dict[str, Any] | None
    pairs: dict[str, dict[str, Tensor]]  # module -> {"A": float[r, K], "B": float[N, r]}
    parts: dict[str, Tensor]

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied with."""
        assert self.config is not None
        rank, alpha = int(self.config["r"]), float(self.config["lora_alpha"])
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


# Settings of peft's LoRA that are more than ``W + s B A``, and their values that are not.
_MORE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


def read(folder: str | Path) -> Stored:
    """Read an adapter folder, ours or peft's.

    Raises:
        CheckpointError: there is no adapter in it, a file is damaged, or half of a pair is missing.
        InputError: a kind of adapter other than plain LoRA.
    """
    folder = Path(folder)
    config = None
    pairs: dict[str, dict[str, Tensor]] = {}
    if (folder / LORA_CONFIG).is_file():
        config = _settings(folder / LORA_CONFIG)
        for name, tensor in read_safetensors(folder / LORA_WEIGHTS).items():
            found = _STORED.fullmatch(name.removeprefix(PREFIX))
            if found is None:
                raise CheckpointError(f"{folder / LORA_WEIGHTS}: {name!r} belongs to no LoRA")
            pairs.setdefault(found[1], {})[found[2]] = tensor
        report((), [f"{n} (A or B)" for n, ab in pairs.items() if len(ab) < 2], str(folder))
    parts: dict[str, Tensor] = {}
    if (folder / PART_WEIGHTS).is_file():
        parts = read_safetensors(folder / PART_WEIGHTS)
    if not pairs and not parts:
        raise CheckpointError(
            f"{folder} holds no adapter ({LORA_CONFIG} with {LORA_WEIGHTS}, or {PART_WEIGHTS}); "
            "give the folder of a finished run"
        )
    return Stored(folder, config, pairs, parts)


def _settings(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: an adapter other than LoRA; only LoRA can be taken up")
    for key, allowed in _MORE.items():
        if config.get(key, allowed[0]) not in allowed:
            raise InputError(f"{path}: {key} is {config[key]!r}; only plain LoRA can be taken up")
    if not isinstance(config.get("r"), int) or not isinstance(
        config.get("lora_alpha"), int | float
    ):
        raise CheckpointError(f"{path}: r or lora_alpha is no number; save the adapter again")
    return config


def beside(model: Model, folder: str | Path) -> Model:
    """The same model with an adapter on it, as a second one that shares the weights.

    ``model`` stays what it was, to the bit; what the adapter adds is all the memory it takes.

    Raises:
        InputError: a model that is spread over devices; and as :func:`attach`.
    """
    if hasattr(model, "hf_device_map"):
        raise InputError("an adapter beside a model that is spread: merge it (cogvlm merge)")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    made = deepcopy(model, shared)
    attach(made, folder)
    return made


def attach(model: nn.Module, folder: str | Path) -> None:
    """Put an adapter folder on a model; the LoRA stays beside the weights.

    Modules are changed in place, tensors are not: another model that has them keeps its values.

    Raises:
        CheckpointError: it belongs to another model, or is damaged.
        InputError: whole parts for weights that are quantised, or no plain LoRA.
        ResourceError: peft is not installed.
    """
    stored = read(folder)
    _replace(model, stored)
    if not stored.pairs:
        return
    peft = _peft()
    modules = dict(model.named_modules())
    report([n for n in stored.pairs if n not in modules], (), f"{folder}, for this model")
    wrong = [n for n in stored.pairs if not _carries(modules[n])]
    report(wrong, (), f"{folder}, for linear layers of this model")
    assert stored.config is not None
    names = "|".join(map(re.escape, stored.pairs))
    config = peft.LoraConfig(
        r=stored.config["r"],
        lora_alpha=stored.config["lora_alpha"],
        use_rslora=bool(stored.config.get("use_rslora")),
        target_modules=f"(?:{names})",
    )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    _put_in(peft, config, model)
    for name, parameter in model.named_parameters():
        if found := _LORA.fullmatch(name):
            value = stored.pairs[found[1]][found[2]]
            _fit(name, value, parameter, stored)
            parameter.data = value.to(parameter.device, dtype)
        parameter.requires_grad_(False)
    model.eval()


def _replace(model: nn.Module, stored: Stored) -> None:
    own: dict[str, Tensor] = dict(model.named_parameters())
    holders: dict[int, list[nn.Module]] = {}
    for holder in model.modules():
        for parameter in holder._parameters.values():
            holders.setdefault(id(parameter), []).append(holder)
    report([n for n in stored.parts if n not in own], (), f"{stored.folder}, for this model")
    for name, value in stored.parts.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, QuantisedLinear) or type(module).__module__.startswith(
            "bitsandbytes"
        ):
            raise InputError(
                f"{stored.folder}: {name} is trained whole, and this model is quantised: merge "
                "first (cogvlm merge), or load the model in bfloat16"
            )
        old = own[name]
        _fit(name, value, old, stored)
        new = nn.Parameter(value.to(old.device, old.dtype, copy=True), requires_grad=False)
        for owner in holders[id(old)]:  # the embedding may be the head, too
            for key, parameter in owner._parameters.items():
                if parameter is old:
                    owner._parameters[key] = new


def _fit(name: str, value: Tensor, own: Tensor, stored: Stored) -> None:
    if value.shape != own.shape:
        raise CheckpointError(
            f"{stored.folder}: {name} is {tuple(value.shape)} in the adapter, {tuple(own.shape)} "
            "in the model; take the model that it was trained on"
        )
