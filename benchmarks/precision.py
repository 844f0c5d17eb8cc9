"""How far each precision is from float32: logits of the recorded toy models of the family.

Prints a table, and ends with one JSON line: for every folder and precision the length of the
difference of the logits over the length of the exact ones, over all recorded prompts.

    python benchmarks/precision.py              # seconds

The toys are small and random, rows have 32 to 128 weights: a trained model of the real width errs
less.  What the table is for is the order of the precisions, and that none of them is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvlm.load import load_model
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.glm4v import Glm4vForCausalLM, expand_image_tokens
from cogvlm.quantize import PRECISIONS
from common import commit, machine

FOLDER = Path(__file__).parents[1] / "tests" / "parity"
ASKED = ("bfloat16", "float16", *PRECISIONS)
INPUTS = {"input_ids", "token_type_ids", "attention_mask", "pixel_values", "cross_pixel_values"}


def prompts(folder: Path) -> list[dict[str, Tensor]]:
    """The recorded prompts of a folder."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "outputs.safetensors").items():
        case, what = name.split(".", 1)
        if what in INPUTS:
            found.setdefault(case, {})[what] = tensor
    if "chat" in found and "base" in found:  # the frames of both are stored once
        found["base"].setdefault("pixel_values", found["chat"]["pixel_values"])
    return [given for given in found.values() if "input_ids" in given]


@torch.inference_mode()
def logits(model: CogVLMForCausalLM, given: dict[str, Tensor]) -> Tensor:
    """Of the real tokens of a prompt: ``float32[tokens, V]``."""
    asked: dict[str, Any] = dict(given)
    asked.setdefault("attention_mask", torch.ones_like(asked["input_ids"]))
    if isinstance(model, Glm4vForCausalLM):
        config = model.config
        ids, types, mask = expand_image_tokens(
            asked["input_ids"], asked["attention_mask"], config.boi_token_id, config.image_tokens
        )
        asked |= {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    out: Tensor = model(**asked).logits
    return out[asked["attention_mask"].bool()].float()


def errors(folder: Path) -> dict[str, float]:
    """Relative error by precision."""
    given = prompts(folder)
    exact_model = load_model(folder, "float32", "cpu")
    exact = torch.cat([logits(exact_model, each) for each in given])
    found = {}
    for precision in ASKED:
        model = load_model(folder, precision, "cpu")
        near = torch.cat([logits(model, each) for each in given])
        found[precision] = float((near - exact).norm() / exact.norm())
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="default: all recorded ones")
    given = parser.parse_args()
    folders = given.folders or sorted(p.parent for p in FOLDER.glob("*/outputs.safetensors"))
    table = {folder.name: errors(folder) for folder in folders}
    print(f"| {'model':14} | {' | '.join(f'{name:>8}' for name in ASKED)} |")
    print(f"|{'-' * 16}|{'|'.join(['-' * 9 + ':'] * len(ASKED))}|")
    for name, row in table.items():
        print(f"| {name:14} | {' | '.join(f'{row[p]:8.4f}' for p in ASKED)} |")
    line = {"name": "precision", "commit": commit(), "machine": machine(), "device": "cpu"}
    short = {n: {p: float(f"{e:.3g}") for p, e in row.items()} for n, row in table.items()}
    print(json.dumps({**line, "relative_error": short}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
