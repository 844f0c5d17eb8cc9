"""A name or a folder to a model and its processor.

Two kinds of folders are read: the released layout (config.json, safetensors, tokenizer.json), and
ours for nano, which holds the vision part alone and names its language model in config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from . import quantize
from .config import CogAgentConfig, CogVLMConfig, FamilyConfig, Glm4vConfig, recognise
from .errors import CheckpointError, InputError, ResourceError
from .hub import language_model, resolve
from .models import shards, spread
from .models.checkpoint import from_llama, is_vision, read_safetensors, report
from .models.cogagent import CogAgentForCausalLM
from .models.cogvlm import CogVLMForCausalLM
from .models.glm4v import Glm4vForCausalLM
from .models.language import inverse_frequencies
from .processor import Processor, open_tokenizer
from .processor.tokenizer import FastTokenizer, read_json

_CLASSES: dict[type[FamilyConfig], type[CogVLMForCausalLM]] = {
    CogVLMConfig: CogVLMForCausalLM,
    CogAgentConfig: CogAgentForCausalLM,
    Glm4vConfig: Glm4vForCausalLM,
}


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, and what prepares its input."""

    model: CogVLMForCausalLM
    processor: Processor
    name: str


def read_config(folder: Path) -> FamilyConfig:
    """``config.json`` of a folder, recognised without running any code of the folder.

    Raises:
        CheckpointError: it is missing, or of an architecture that is not supported.
        ConfigError: unknown keys or impossible values.
    """
    values = read_json(folder / "config.json")
    if values is None:
        raise CheckpointError(f"{folder} has no config.json; give a model's folder or name")
    values.pop(quantize.KEY, None)
    return recognise(values, f"{folder}/config.json")


def stored_precision(folder: Path) -> str | None:
    """What the weights of a folder are quantised to, by its config.json; none: they are not."""
    return quantize.stored(read_json(folder / "config.json") or {}, f"{folder}/config.json")


def pick(device: str | torch.device | None) -> torch.device:
    """The device named, or the best one here: CUDA, Apple's MPS, CPU.

    Raises:
        ResourceError: no such device.
    """
    if device is None or str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(
            f"device {str(device)!r} is not usable here ({str(error).splitlines()[0]}); "
            "leave it out to take the best one"
        ) from error
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The precision named, or float32 on the CPU and bfloat16 elsewhere.

    Raises:
        ResourceError: an unknown precision.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    names |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in names:
        known = ", ".join([*names, *quantize.PRECISIONS])
        raise ResourceError(f"precision {dtype!r} is not one of {known}")
    return names[dtype]


def load_model(
    folder: Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: spread.DeviceMap | None = None,
    allow_pickle: bool = False,
) -> CogVLMForCausalLM:
    """The model of a folder, in evaluation mode.

    Args:
        folder: released layout, or nano's.
        dtype: of the weights; none takes float32 on the CPU and bfloat16 elsewhere.  ``"int8"`` and
            ``"int4"`` quantise while loading (see :mod:`cogvlm.quantize`); of a folder that is
            quantised already, another dtype is that of the rest.
        device: none takes the best one here.
        device_map: spread the model instead: ``"auto"``, or module names to devices, ``"disk"``
            among them (see :mod:`cogvlm.models.spread`); needs accelerate.
        allow_pickle: read pickled weights where there are no others, tensors only.

    Raises:
        CheckpointError: files or tensors are missing, damaged or left over.
        ConfigError: config.json has unknown keys or impossible values.
        InputError: ``device_map`` leaves something out, or is given beside ``device``.
        ResourceError: no such device, or not enough memory on it.
    """
    config = read_config(folder)
    if device_map is not None and device not in (None, "auto"):
        raise InputError(f"device {str(device)!r} and a device_map: give one of the two")
    place = pick(device)
    wanted = quantize.choose(dtype, stored_precision(folder), str(folder))
    precision = pick_dtype(None if dtype == wanted else dtype, place)
    if wanted is not None:
        if device_map is not None:
            raise InputError(f"precision {wanted} and a device_map: give device, no device_map")
        quantize.refuse(wanted, place)
    if isinstance(config, CogVLMConfig) and config.language_model is not None:
        if device_map is not None:
            raise InputError(f"{folder} is small enough for one device: give device, no device_map")
        model = compose(config, vision_tensors(folder), language_tensors(config.language_model))
        move: Any = model.to  # its stub has lost the bound self
        move(device=place, dtype=precision)
        if wanted is not None:
            quantize.quantise(model, wanted)
    elif wanted is not None:
        model = _quantised(folder, config, wanted, precision, place, allow_pickle)
    else:
        model = _released(folder, config, precision, place, device_map, allow_pickle)
    # Generation settings of the 4.x series, written into config.json, are not ours.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.eval()
    return model


def _released(
    folder: Path,
    config: FamilyConfig,
    dtype: torch.dtype,
    device: torch.device,
    device_map: spread.DeviceMap | None,
    allow_pickle: bool,
) -> CogVLMForCausalLM:
    files = shards.weight_files(folder, allow_pickle)
    found = shards.survey(files)
    model = skeleton(config)
    shards.check(model, {name: entry.shape for name, entry in found.items()}, str(folder))
    plan = None if device_map is None else spread.plan(model, device_map, dtype)
    place: shards.Place = lambda name: device  # noqa: E731
    if plan is not None:
        place = spread.placing(model, plan)
    shards.fill(model, files, dtype, place)
    model.tie_weights()
    if plan is not None:
        spread.dispatch(model, plan, found, dtype)
    return model


def _quantised(
    folder: Path,
    config: FamilyConfig,
    wanted: str,
    dtype: torch.dtype,
    device: torch.device,
    allow_pickle: bool,
) -> CogVLMForCausalLM:
    files = shards.weight_files(folder, allow_pickle)
    found = {name: entry.shape for name, entry in shards.survey(files).items()}
    model = skeleton(config)
    groups = quantize.plan(model, wanted)
    shards.check(model, quantize.whole(found, model, groups, str(folder)), str(folder))
    quantize.fill(model, files, groups, dtype, device)
    model.tie_weights()
    return model


def quantise_folder(name: str | Path, out: str | Path, precision: str) -> Path:
    """Write a model of the released layout again, quantised; :func:`load` reads what is written.

    Args:
        name: a folder or a hub name.
        out: the new folder.
        precision: ``"int8"`` or ``"int4"``, see :mod:`cogvlm.quantize`.

    Raises:
        InputError: another precision, ``out`` exists, or the model is nano or quantised already.
        CheckpointError: files of the model are missing or damaged.
        ResourceError: ``out`` cannot be written.
    """
    if precision not in quantize.PRECISIONS:
        known = " and ".join(quantize.PRECISIONS)
        raise InputError(f"precision {precision!r} cannot be stored quantised; {known} can")
    folder = resolve(name)
    config = read_config(folder)
    if isinstance(config, CogVLMConfig) and config.language_model is not None:
        raise InputError(
            f"{name} stands on a language model that is stored elsewhere; load it in {precision} "
            f"instead (--precision {precision})"
        )
    values = read_json(folder / "config.json") or {}
    return quantize.write(folder, skeleton(config), values, Path(out), precision)


def vision_tensors(folder: Path) -> dict[str, Tensor]:
    """Tower, adapter and experts of a folder that holds only them."""
    return read_safetensors(folder / "model.safetensors")


def language_tensors(name: str) -> dict[str, Tensor]:
    """A Llama-type language model under our names, fetched if need be."""
    return from_llama(read_safetensors(language_model(name) / "model.safetensors"))


def skeleton(config: FamilyConfig) -> CogVLMForCausalLM:
    """A model whose tensors have shapes but no memory."""
    build: Any = _CLASSES[type(config)]  # each takes its own configuration
    with torch.device("meta"):
        model: CogVLMForCausalLM = build(config)
    return model


def compose(
    config: CogVLMConfig, vision: dict[str, Tensor], language: dict[str, Tensor]
) -> CogVLMForCausalLM:
    """A model from the tensors of its two parts; the language part is used as it is, not copied.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape.
    """
    model = skeleton(config)
    tensors = {**language, **{k: v.float() for k, v in vision.items()}}
    report([n for n in vision if not is_vision(n)], (), "vision part")
    buffers = {n: b for n, b in fresh_buffers(config, model).items() if n not in tensors}
    state = {**tensors, **buffers}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    expected = model.state_dict()
    report(state.keys() - expected.keys(), expected.keys() - state.keys(), "model")
    wrong = [n for n, t in state.items() if t.shape != expected[n].shape]
    if wrong:
        name = sorted(wrong)[0]
        raise CheckpointError(
            f"{len(wrong)} tensors have another shape than config.json says, the first is {name}: "
            f"{tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        )
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def fresh_buffers(config: CogVLMConfig, model: nn.Module) -> dict[str, Tensor]:
    """Buffers that files of Llama-type models do not store: the rotary frequencies."""
    assert config.head_dim is not None
    table = inverse_frequencies(config.head_dim, config.rope_theta)
    return {name: table for name, _ in model.named_buffers() if name.endswith("inv_freq")}


def load(
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
    device_map: spread.DeviceMap | None = None,
    allow_pickle: bool = False,
) -> Loaded:
    """Model and processor by name (``nano``), folder or hub name; see :func:`load_model`.

    Args:
        name: of the model.
        dtype: of the weights.
        device: none takes the best one here.
        tokenizer: a file or folder instead of the model's own; the released folders of the first
            generation have none, see :func:`cogvlm.processor.open_tokenizer`.
        device_map: spread the model over several devices.
        allow_pickle: read pickled weights where there are no others.
    """
    folder = resolve(name, allow_pickle)
    config = read_config(folder)
    words = None
    if tokenizer is not None:
        words = open_tokenizer(tokenizer, read_json(folder / "config.json"))
    elif config.language_model is not None:
        words = FastTokenizer.from_folder(language_model(config.language_model))
    processor = Processor.from_folder(folder, words)
    model = load_model(folder, dtype, device, device_map, allow_pickle)
    return Loaded(model, processor, str(name))
