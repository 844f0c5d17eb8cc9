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

from .config import CogVLMConfig, recognise
from .errors import CheckpointError, ResourceError
from .hub import language_model, resolve
from .models.checkpoint import from_llama, is_vision, read_safetensors, report
from .models.cogvlm import CogVLMForCausalLM
from .models.language import inverse_frequencies
from .processor import Processor
from .processor.tokenizer import FastTokenizer, read_json


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, and what prepares its input."""

    model: CogVLMForCausalLM
    processor: Processor
    name: str


def read_config(folder: Path) -> CogVLMConfig:
    """``config.json`` of a folder, recognised without running any code of the folder.

    Raises:
        CheckpointError: it is missing, or of an architecture that is not supported.
        ConfigError: unknown keys or impossible values.
    """
    values = read_json(folder / "config.json")
    if values is None:
        raise CheckpointError(f"{folder} has no config.json; give a model's folder or name")
    return recognise(values, f"{folder}/config.json")


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
        raise ResourceError(f"precision {dtype!r} is not one of {', '.join(names)}")
    return names[dtype]


def load_model(
    folder: Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> CogVLMForCausalLM:
    """The model of a folder, in evaluation mode.

    Args:
        folder: released layout, or nano's.
        dtype: of the weights; none takes float32 on the CPU and bfloat16 elsewhere.
        device: none takes the best one here.

    Raises:
        CheckpointError: files or tensors are missing, damaged or left over.
        ConfigError: config.json has unknown keys or impossible values.
        ResourceError: no such device.
    """
    config = read_config(folder)
    place = pick(device)
    precision = pick_dtype(dtype, place)
    if config.language_model is None:
        model = _released(folder, config, precision)
    else:
        model = compose(config, vision_tensors(folder), language_tensors(config.language_model))
    # Generation settings of the 4.x series, written into config.json, are not ours.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    move: Any = model.to  # its stub has lost the bound self
    move(device=place, dtype=precision)
    model.eval()
    return model


def _released(folder: Path, config: CogVLMConfig, dtype: torch.dtype) -> CogVLMForCausalLM:
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has no *.safetensors; give a folder with the weights")
    try:
        loaded: Any = CogVLMForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())[:400]}") from error
    model: CogVLMForCausalLM = loaded[0]
    report(loaded[1]["unexpected_keys"], loaded[1]["missing_keys"], str(folder))
    return model


def vision_tensors(folder: Path) -> dict[str, Tensor]:
    """Tower, adapter and experts of a folder that holds only them."""
    return read_safetensors(folder / "model.safetensors")


def language_tensors(name: str) -> dict[str, Tensor]:
    """A Llama-type language model under our names, fetched if need be."""
    return from_llama(read_safetensors(language_model(name) / "model.safetensors"))


def skeleton(config: CogVLMConfig) -> CogVLMForCausalLM:
    """A model whose tensors have shapes but no memory."""
    with torch.device("meta"):
        return CogVLMForCausalLM(config)


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
) -> Loaded:
    """Model and processor by name (``nano``), folder or hub name; see :func:`load_model`."""
    folder = resolve(name)
    config = read_config(folder)
    tokenizer = None
    if config.language_model is not None:
        tokenizer = FastTokenizer.from_folder(language_model(config.language_model))
    processor = Processor.from_folder(folder, tokenizer)
    return Loaded(load_model(folder, dtype, device), processor, str(name))
