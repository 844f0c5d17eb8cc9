"""A folder in the released layout, pictures with labels, and a recipe: all of toy size."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from safetensors.torch import save_file

from fakes import toy_model
from processor.standin import toy_tokenizer

COLOURS = {"red": (220, 30, 30), "blue": (20, 40, 230), "lime": (70, 240, 60)}


def write_model(folder: Path, **changes: Any) -> Path:
    """Random weights and a byte-level tokenizer that ``load`` reads."""
    folder.mkdir()
    words = toy_tokenizer()
    start, end, pad = (words.token_to_id(n) for n in ("<|im_start|>", "<|im_end|>", "<image>"))
    model = toy_model(template_version="chatml", pad_token_id=pad, **changes)
    config = model.config.to_dict() | {"bos_token_id": start, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    words.no_truncation()
    words.no_padding()
    words.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<image>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def write_data(folder: Path, count: int = 24) -> Path:
    """Coloured squares; answers of one to three words, some in two turns."""
    folder.mkdir()
    chance = random.Random(5)
    lines = []
    for i in range(count):
        name = chance.choice(list(COLOURS))
        Image.new("RGB", (40 + i, 40), COLOURS[name]).save(folder / f"{i}.png")
        answer = " ".join([name] * chance.randint(1, 3))
        talk = [
            {"role": "user", "content": "<image>What colour?"},
            {"role": "assistant", "content": answer},
        ]
        if i % 3 == 0:
            talk += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "conversations": talk}))
    (folder / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "labels.jsonl"


def write_recipe(path: Path, model: Path, labels: Path, **changes: Any) -> Path:
    """A recipe that ends after a few steps."""
    schedule = {
        "steps": 6,
        "lr": 5e-3,
        "warmup": 2,
        "log_every": 1,
        "eval_every": 3,
        "save_every": 2,
        **changes.pop("schedule", {}),
    }
    values = {
        "stage": "tune",
        "name": path.stem,
        "model": str(model),
        "data": [str(labels)],
        "precision": "float32",
        "device": "cpu",
        "held_out": 0.25,
        "batch_size": 4,
        "eval_count": 3,
        "eval_answers": 2,
        "max_new_tokens": 4,
        "workers": 0,
        "schedule": schedule,
        **changes,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def losses(folder: Path, key: str = "loss") -> dict[int, float]:
    """Step to loss, from the log; a step that stands there twice is an error."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    pairs = [(line["step"], line[key]) for line in lines if key in line]
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found
