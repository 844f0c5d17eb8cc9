"""A name or a folder to a model and its processor.

Two kinds of folders are read: the released layout (config.json, safetensors, tokenizer.json), and
ours for nano, which holds the vision part alone and names its language model in config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from . import adapter as adapters
from . import devices, memory, packed, quantize
from .config import CogVLMConfig, FamilyConfig, recognise
from .errors import CheckpointError, InputError, ResourceError
from .hub import language_model, resolve
from .models import parallel, shards, spread
from .models.build import skeleton
from .models.checkpoint import from_llama, is_vision, read_safetensors, report
from .models.cogvlm import CogVLMForCausalLM
from .models.language import inverse_frequencies
from .processor import Processor, open_tokenizer
from .processor.tokenizer import FastTokenizer, read_json
from .reader import StripReader


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, and what prepares its input."""

    model: CogVLMForCausalLM
    processor: Processor
    name: str


@dataclass(frozen=True)
class _Folder:
    """What config.json says, read once."""

    path: Path
    values: dict[str, Any]
    config: FamilyConfig
    form: packed.Format | None  # how another program quantised it

    @property
    def kept(self) -> str | None:
        """What the weights are quantised to; none: they are not."""
        where = f"{self.path}/config.json"
        return self.form.name if self.form else quantize.stored(self.values, where)

    @property
    def language_model(self) -> str | None:
        """The language model that is not in the folder; none: all of it is."""
        return self.config.language_model if isinstance(self.config, CogVLMConfig) else None


def _read(folder: Path) -> _Folder:
    """Recognise a folder by its ``config.json``, without running any code of it.

    Raises:
        CheckpointError: it is missing, or of an architecture that is not supported.
        ConfigError: unknown keys or impossible values.
    """
    values = read_json(folder / "config.json")
    if values is None:
        packed.refuse_gguf(folder)
        raise CheckpointError(f"{folder} has no config.json; give a model's folder or name")
    where = f"{folder}/config.json"
    plain = {k: v for k, v in values.items() if k not in (quantize.KEY, packed.KEY)}
    return _Folder(folder, values, recognise(plain, where), packed.stored(values, where))


def stored_precision(folder: Path) -> str | None:
    """What the weights of a folder are quantised to, by its config.json; none: they are not."""
    return _read(folder).kept


def configuration(folder: Path) -> tuple[FamilyConfig, str | None]:
    """What a folder holds by its config.json, and what it is quantised to; none: it is not."""
    source = _read(folder)
    return source.config, source.kept


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
        known = ", ".join([*names, *quantize.ON_LOADING])
        raise ResourceError(f"precision {dtype!r} is not one of {known}")
    return names[dtype]


def load_model(
    folder: Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: spread.DeviceMap | None = None,
    allow_pickle: bool = False,
    tp_plan: str | None = None,
) -> CogVLMForCausalLM:
    """The model of a folder, in evaluation mode.

    Args:
        folder: released layout, or nano's.
        dtype: of the weights; none or ``"auto"`` takes the best that fits the free memory (see
            :func:`cogvlm.memory.choose`).  ``"int8"``, ``"int4"`` and ``"int4-all"`` quantise
            while loading, on CUDA ``"nf4"`` too (see :mod:`cogvlm.quantize`), and what stays is
            bfloat16; of a folder that is quantised already, by us or by others
            (:mod:`cogvlm.packed`), another dtype is that of the rest.
        device: none takes the best one here.
        device_map: spread the model instead: ``"auto"``, or module names to devices, ``"disk"``
            among them (see :mod:`cogvlm.models.spread`); needs accelerate.
        allow_pickle: read pickled weights where there are no others, tensors only.
        tp_plan: ``"auto"`` cuts every layer over the processes that ``torchrun`` started instead
            (see :mod:`cogvlm.models.parallel`).

    Raises:
        CheckpointError: files or tensors are missing, damaged or left over.
        ConfigError: config.json has unknown keys or impossible values.
        InputError: ``device_map`` leaves something out, or is given beside ``device``; ``tp_plan``
            without ``torchrun``, or beside what it excludes.
        ResourceError: no such device, or not enough memory on it.
    """
    return _load(_read(folder), dtype, device, device_map, allow_pickle, tp_plan)


def _load(
    source: _Folder,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    device_map: spread.DeviceMap | None,
    allow_pickle: bool,
    tp_plan: str | None,
) -> CogVLMForCausalLM:
    folder, config, form = source.path, source.config, source.form
    if device_map is not None and device not in (None, "auto"):
        raise InputError(f"device {str(device)!r} and a device_map: give one of the two")
    place = pick(device)
    kept = source.kept
    if kept is None and device_map is None and tp_plan is None and dtype in (None, "auto"):
        place, dtype = _choose(source, None if device in (None, "auto") else place)
    wanted = quantize.choose(dtype, kept, str(folder))
    precision = pick_dtype(None if dtype == wanted else dtype, place)
    if wanted is not None and device_map is not None:
        raise InputError(f"precision {wanted} and a device_map: give device, no device_map")
    if tp_plan is not None:
        low = isinstance(config, CogVLMConfig) and config.expert_rank is not None  # nano's kind
        if low or wanted or form or device_map is not None or device is not None or allow_pickle:
            raise InputError(
                "tp_plan cuts full weights in safetensors over the devices of torchrun: leave out "
                "device, device_map and allow_pickle, and give no low-rank experts, int8 or int4"
            )
        parallel.processes(tp_plan)
    if wanted is not None and form is None:
        quantize.refuse(wanted, place)
    if form is not None:
        model = _packed(folder, config, form, precision, place, allow_pickle)
    elif isinstance(config, CogVLMConfig) and (language := source.language_model):
        if device_map is not None:
            raise InputError(f"{folder} is small enough for one device: give device, no device_map")
        model = compose(config, vision_tensors(folder), language_tensors(language))
        move: Any = model.to  # its stub has lost the bound self
        move(device=place, dtype=precision)
        if wanted is not None:
            quantize.quantise(model, wanted)
    elif wanted is not None:
        # Who quantises wants memory: the embedding and the head alone are 4 GB in float32.
        rest = torch.bfloat16 if dtype in (None, "auto", wanted) else precision
        model = _quantised(folder, config, wanted, rest, place, allow_pickle)
    else:
        model = _released(folder, config, precision, place, device_map, allow_pickle, tp_plan)
    # Generation settings of the 4.x series, written into config.json, are not ours.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.eval()
    return model


def _choose(source: _Folder, place: torch.device | None) -> tuple[torch.device, str]:
    """The first device, or the one given, on which the model fits, and the best precision there."""
    found = devices.find_devices()
    if place is not None:
        index = place.index or 0
        found = [d for d in found if d.place in (str(place), f"{place.type}:{index}")]
        if not found:  # nothing is known about it
            return place, "bfloat16"
    needs = memory.needs(source.config)
    if chosen := memory.choose(needs, found):
        device, precision = chosen
        return torch.device(device.place), precision
    least = min((p for d in found for p in memory.MIXES[d.kind]), key=needs.__getitem__)
    rooms = ", ".join(f"{d.place} {d.room / 1e9:.1f} GB" for d in found)
    raise ResourceError(
        f"{source.path} needs {needs[least] / 1e9:.1f} GB in {least} for a picture and "
        f"{memory.PROMPT} tokens, free: {rooms}; free memory, spread it (device_map='auto'), or "
        "name a precision to try it all the same"
    )


def _released(
    folder: Path,
    config: FamilyConfig,
    dtype: torch.dtype,
    device: torch.device,
    device_map: spread.DeviceMap | None,
    allow_pickle: bool,
    tp_plan: str | None,
) -> CogVLMForCausalLM:
    files = shards.weight_files(folder, allow_pickle)
    found = shards.survey(files)
    model = skeleton(config)
    shards.check(model, {name: entry.shape for name, entry in found.items()}, str(folder))
    if tp_plan is not None:
        cut: CogVLMForCausalLM = parallel.load(type(model), folder, config, dtype)
        return cut
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


def _packed(
    folder: Path,
    config: FamilyConfig,
    form: packed.Format,
    dtype: torch.dtype,
    device: torch.device,
    allow_pickle: bool,
) -> CogVLMForCausalLM:
    files = shards.weight_files(folder, allow_pickle)
    model = skeleton(config)
    found = shards.survey(files, packed=True)
    shards.check(model, packed.whole(found, model, form, str(folder)), str(folder))
    packed.fill(model, files, form, dtype, device)
    model.tie_weights()
    return model


def quantise_folder(name: str | Path, out: str | Path, precision: str) -> Path:
    """Write a model of the released layout again, quantised; :func:`load` reads what is written.

    Args:
        name: a folder or a hub name.
        out: the new folder.
        precision: ``"int8"``, ``"int4"`` or ``"int4-all"``, see :mod:`cogvlm.quantize`.

    Raises:
        InputError: another precision, ``out`` exists, or the model is nano or quantised already.
        CheckpointError: files of the model are missing or damaged.
        ResourceError: ``out`` cannot be written.
    """
    if precision not in quantize.PRECISIONS:
        known = " and ".join(quantize.PRECISIONS)
        raise InputError(f"precision {precision!r} cannot be stored quantised; {known} can")
    folder = resolve(name)
    source = _read(folder)
    if source.language_model is not None:
        raise InputError(
            f"{name} stands on a language model that is stored elsewhere; load it in {precision} "
            f"instead (--precision {precision})"
        )
    if source.form is not None:
        raise InputError(
            f"{folder} is stored in {source.form.name} already; give the folder with the full "
            "weights"
        )
    return quantize.write(folder, skeleton(source.config), source.values, Path(out), precision)


def vision_tensors(folder: Path) -> dict[str, Tensor]:
    """Tower, adapter and experts of a folder that holds only them."""
    return read_safetensors(folder / "model.safetensors")


def language_tensors(name: str) -> dict[str, Tensor]:
    """A Llama-type language model under our names, fetched if need be."""
    return from_llama(read_safetensors(language_model(name) / "model.safetensors"))


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
    shards.check(model, {n: tuple(t.shape) for n, t in state.items()}, "model")
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
    tp_plan: str | None = None,
    adapter: str | Path | None = None,
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
        tp_plan: ``"auto"`` cuts the model over the processes of ``torchrun``.
        adapter: folder of what was tuned on the model, see :mod:`cogvlm.adapter`.
    """
    if adapter is not None and (device_map is not None or tp_plan is not None):
        raise InputError("an adapter and device_map or tp_plan: merge it first (cogvlm merge)")
    folder = resolve(name, allow_pickle)
    source = _read(folder)
    words = None
    if tokenizer is not None:
        words = open_tokenizer(tokenizer, source.values)
    elif source.language_model is not None:
        words = FastTokenizer.from_folder(language_model(source.language_model))
    processor = Processor.from_folder(folder, words)
    model = _load(source, dtype, device, device_map, allow_pickle, tp_plan)
    if adapter is not None:
        adapters.attach(model, adapter)
    if getattr(processor.pixels, "shown", None) is not None:
        processor = replace(processor, reader=StripReader.of(model, folder))
    return Loaded(model, processor, str(name))
