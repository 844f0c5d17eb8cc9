"""Builders: a recipe in, the objective of its stage out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.render import HELD_OUT_SEED, line_stream
from ..errors import ConfigError
from ..hub import language_model
from ..load import compose, language_tensors
from ..models.build import skeleton
from ..models.checkpoint import is_vision, read_safetensors
from ..models.vision import VisionModel
from ..processor import Processor
from ..processor.image import NativePixels, pixels_from_dict
from ..processor.lines import LinePixels
from ..processor.template import TEMPLATES
from ..processor.tokenizer import FastTokenizer
from .align import AlignObjective, CellPieces, ReaderWithAdapter
from .answer import AnswerObjective, Prompt
from .ctc import CTCObjective
from .instruct import InstructObjective
from .lines import LinePools
from .loop import Objective
from .pages import Pages
from .read import Reader, ReadObjective
from .recipe import Recipe

_POSITIONS = "patch_embedding.position_embedding.weight"  # of the tower
IMAGE_TOKEN = "<empty_output>"  # of SmolLM2, unused in text; its embedding is replaced


def pixel_plan(recipe: Recipe) -> NativePixels:
    """The picture rule of the recipe's model."""
    vision = recipe.model_config.vision
    rows, cols = vision.table_grid
    usual = {"kind": "native", "patch": vision.patch_size, "merge": vision.merge}
    values = {**usual, "max_rows": rows, "max_cols": cols, **recipe.pixels}
    if values["kind"] == "square":
        raise ConfigError("recipe: pixels: kind 'square' has no lines; give native or lines")
    plan = pixels_from_dict(values, "recipe: pixels", {"lines": LinePixels})
    assert isinstance(plan, NativePixels)
    return plan


def line_pools(recipe: Recipe, held_out: bool) -> LinePools:
    """Training or held-out pools of a recipe."""
    seed = HELD_OUT_SEED if held_out else recipe.seed
    data = recipe.data
    stream = line_stream(
        seed,
        held_out=held_out,
        min_chars=data.min_chars,
        max_chars=data.max_chars,
        strength=data.strength,
        fonts=data.fonts,
        texts=data.texts,
    )
    return LinePools(stream, pixel_plan(recipe), data.batch_size, data.pool_size, seed)


def pages(recipe: Recipe) -> dict[str, Any]:
    """Training and held-out pages of a recipe that has any."""
    if recipe.pages is None:
        return {}
    plan = pixel_plan(recipe)
    return {
        "pages": Pages(recipe.pages, plan, recipe.seed, held_out=False),
        "eval_pages": Pages(recipe.pages, plan, HELD_OUT_SEED, held_out=True),
    }


def read_tensors(files: tuple[str, ...]) -> dict[str, Tensor]:
    """All tensors of some safetensors files; later files win."""
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors.update(read_safetensors(Path(name)))
    return tensors


def initialise(module: torch.nn.Module, std: float = 0.02) -> None:
    """Fresh weights: normal matrices, zero biases, unit norms, small embeddings and markers."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)


def fresh_vision(recipe: Recipe) -> VisionModel:
    """Tower and adapter with fresh weights, then those of the recipe's ``init`` files."""
    vision = VisionModel(recipe.model_config)
    initialise(vision)
    given = {k.removeprefix("model.vision."): v for k, v in read_tensors(recipe.init).items()}
    shapes = {k: v.shape for k, v in vision.state_dict().items()}
    found = {k: v for k, v in given.items() if k in shapes}
    if _POSITIONS in found:
        found[_POSITIONS] = grown(found[_POSITIONS], recipe.model_config.vision.table_grid)
    other = [k for k, v in found.items() if v.shape != shapes[k]]
    if other:
        print(f"fresh, since init has them in another shape: {', '.join(other)}", file=sys.stderr)
    vision.load_state_dict({k: v for k, v in found.items() if k not in other}, strict=False)
    return vision


def grown(table: Tensor, shape: tuple[int, int]) -> Tensor:
    """A table of positions with as many columns and other rows, for ``shape`` rows and columns.

    A column keeps its mean over the old rows; what tells the new rows apart is a wave for every
    feature, as large as the old rows differed. A table that fits, or has other columns, stays.
    """
    rows, cols = shape
    old, odd = divmod(len(table) - 1, cols)
    if odd or old == rows:
        return table
    cells = table[1:].view(old, cols, -1)
    mean = cells.mean(0)
    size = (cells.mean(1) - cells.mean((0, 1))).std() * 2**0.5
    half = table.shape[1] // 2
    angles = torch.arange(rows)[:, None] * 64.0 ** (-torch.arange(half) / half)
    waves = torch.cat((angles.sin(), angles.cos()), 1) * size  # [rows, C]
    return torch.cat((table[:1], (mean[None] + waves[:, None]).flatten(0, 1)))


def take_head(reader: Reader, recipe: Recipe) -> None:
    """The character head of the recipe's ``init`` files, where they have one."""
    for name, tensor in read_tensors(recipe.init).items():
        if name.startswith("head."):
            reader.get_parameter(name).data.copy_(tensor)


def common(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What every objective on lines takes."""
    return {
        "train_pools": line_pools(recipe, held_out=False),
        "eval_pools": line_pools(recipe, held_out=True),
        "device": device,
        "workers": recipe.data.workers,
    }


def read(recipe: Recipe, device: torch.device) -> Objective:
    """Stage "read": tower and character head."""
    vision = recipe.model_config.vision
    reader = Reader(fresh_vision(recipe), vision.hidden_size)
    take_head(reader, recipe)
    return ReadObjective(
        trained=reader.to(device), patch=vision.patch_size, **common(recipe, device)
    )


def align(recipe: Recipe, device: torch.device) -> Objective:
    """Stage "align": tower, character head and adapter, towards the frozen embeddings."""
    config = recipe.model_config
    reader = ReaderWithAdapter(fresh_vision(recipe), config.vision.hidden_size)
    take_head(reader, recipe)
    folder = language_model(recipe.language)
    tokenizer = FastTokenizer.from_folder(folder)
    embeddings = read_safetensors(folder / "model.safetensors")["model.embed_tokens.weight"]
    return AlignObjective(
        trained=reader.to(device),
        patch=config.vision.patch_size,
        embeddings=embeddings,
        pieces=CellPieces(tokenizer),
        blank=tokenizer.encode("\n")[0],
        merge=config.vision.merge,
        **pages(recipe),
        **common(recipe, device),
    )


def ctc(recipe: Recipe, device: torch.device) -> Objective:
    """Stage "ctc": a head that spells strips, on the frozen tower."""
    if recipe.model_config.vision.ctc_hidden is None:
        raise ConfigError("stage 'ctc' trains the head of that name: set vision_config.ctc_hidden")
    if recipe.pages is None:
        raise ConfigError("stage 'ctc' reads the lines of pages: give pages")
    return CTCObjective(
        trained=fresh_vision(recipe).to(device), **pages(recipe), **common(recipe, device)
    )


def fresh_experts(recipe: Recipe) -> dict[str, Tensor]:
    """Expert tensors that change nothing yet: low-rank corrections with a zero second factor."""
    shapes = {k: v.shape for k, v in skeleton(recipe.model_config).state_dict().items()}
    generator = torch.Generator().manual_seed(recipe.seed)
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if is_vision(name) and not name.startswith("model.vision."):
            out[name] = torch.zeros(shape)
            if "lora_A" in name:
                out[name].normal_(std=shape[1] ** -0.5, generator=generator)
    return out


def answer(recipe: Recipe, device: torch.device) -> Objective:
    """Stage "answer": adapter and experts (and the tower) through the frozen language model."""
    return AnswerObjective(**through_model(recipe, device))


def instruct(recipe: Recipe, device: torch.device) -> Objective:
    """Stage "instruct": the same with questions about pages, and corrections of the language."""
    if recipe.pages is None or not recipe.pages.turns:
        raise ConfigError("stage 'instruct' asks about pages: give pages, with turns of 1 or more")
    return InstructObjective(**through_model(recipe, device), **pages(recipe))


def through_model(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What the objectives take that train through the language model."""
    config = recipe.model_config
    if config.expert_rank is None:
        raise ConfigError("stage 'answer' trains low-rank experts: set config.expert_rank")
    vision = {f"model.vision.{k}": v for k, v in fresh_vision(recipe).state_dict().items()}
    given = read_tensors(recipe.init)
    experts = {k: given.get(k, v) for k, v in fresh_experts(recipe).items()}
    tensors = {**experts, **vision}
    language = language_tensors(recipe.language)
    tokenizer = FastTokenizer.from_folder(language_model(recipe.language))
    newline = language["model.embed_tokens.weight"][tokenizer.encode("\n")[0]]
    for marker in ("model.vision.boi", "model.vision.eoi"):
        if not tensors[marker].any():  # fresh: something the language model knows
            tensors[marker] = newline.clone().view(1, 1, -1)
    model = compose(config, tensors, language)
    image_token = tokenizer.token_id(IMAGE_TOKEN)
    assert image_token is not None
    plan = pixel_plan(recipe)
    processor = Processor(tokenizer, TEMPLATES["chatml"], plan, image_token)
    unread = replace(plan, shown=None) if isinstance(plan, LinePixels) else plan
    asker = replace(processor, pixels=unread)
    move: Any = model.to  # its stub has lost the bound self
    move(device)
    scales = {"tower": recipe.tower_lr, "adapter": recipe.adapter_lr, "experts": 1.0}
    return {
        "trained": model,
        "processor": processor,
        "prompts": [Prompt.of(asker, q) for q in recipe.questions],
        "scales": {**scales, "text": recipe.text_lr},
        "seed": recipe.seed,
        **common(recipe, device),
    }


STAGES: dict[str, Callable[[Recipe, torch.device], Objective]] = {
    "read": read,
    "align": align,
    "ctc": ctc,
    "answer": answer,
    "instruct": instruct,
}
