"""Compare this package with recorded numbers of the released code.

    python tests/parity/check.py DIR

``DIR`` holds ``config.json``, ``model.safetensors`` and ``outputs.safetensors`` with tensors named
``<case>.<what>`` (see README.md beside this file).  Prints one JSON line with the largest absolute
and relative difference of every recorded output; exit status 1 when one is past its tolerance,
2 when the folder cannot be checked.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvlm.errors import CogVLMError
from cogvlm.load import load_model
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.language import rotary_table
from cogvlm.models.positions import expert_mask

TOLERANCE = {  # absolute, float32
    "position_ids": 0.0,
    "vision_expert_mask": 0.0,
    "greedy": 0.0,
    "image_features": 1e-4,
    "hidden_states": 5e-4,
    "logits": 5e-4,
    "loss": 5e-4,
    "rope_float32": 1e-6,
    "rope_bfloat16": 0.0,
}
GIVEN = {"input_ids", "token_type_ids", "attention_mask", "pixel_values", "labels", "greedy_margin"}

Tensors = dict[str, Tensor]


class Report:
    """Collects differences and whether each is within its tolerance."""

    def __init__(self) -> None:
        """Begin with nothing compared."""
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, name: str, kind: str, ours: Tensor, theirs: Tensor) -> None:
        """Compare two tensors of equal shape."""
        if ours.shape != theirs.shape:
            self.fail(name, f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
            return
        difference = (ours.double() - theirs.double()).abs()
        largest = float(difference.max()) if difference.numel() else 0.0
        scale = float(theirs.double().abs().max()) if theirs.numel() else 0.0
        within = largest <= TOLERANCE[kind]  # false for NaN too
        self.rows[name] = {
            "abs": largest,
            "rel": largest / scale if scale else largest,
            "tolerance": TOLERANCE[kind],
            "ok": within,
        }

    def fail(self, name: str, why: str) -> None:
        """Record something that could not be compared."""
        self.rows[name] = {"ok": False, "why": why}

    @property
    def ok(self) -> bool:
        """Whether anything was compared and all of it is within tolerance."""
        return bool(self.rows) and all(row["ok"] for row in self.rows.values())


def cases(outputs: Tensors) -> dict[str, Tensors]:
    """Recorded tensors by case."""
    found: dict[str, Tensors] = {}
    for name, tensor in outputs.items():
        case, what = name.split(".", 1)
        found.setdefault(case, {})[what] = tensor
    chat, base = found.get("chat"), found.get("base")
    if chat and base and "pixel_values" not in base:  # the frames of both, stored once
        base["pixel_values"] = chat["pixel_values"]
    return found


def check_case(model: CogVLMForCausalLM, case: str, given: Tensors, report: Report) -> None:
    """Run one case and compare everything recorded of it."""
    ids, types = given["input_ids"], given["token_type_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    images = given.get("pixel_values")
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": mask,
        "pixel_values": images,
    }
    real = mask.bool()
    out = model(**inputs, output_hidden_states=True)
    exact: Tensors = {"position_ids": model.model.position_ids(types, mask, images)}
    exact["vision_expert_mask"] = expert_mask(types).to(torch.uint8)
    for what, theirs in given.items():
        name, kind = f"{case}.{what}", re.sub(r"\.\d+$", "", what)
        if what in GIVEN:
            continue
        if kind == "hidden_states":
            ours = out.hidden_states[int(what.rsplit(".", 1)[1])]
            report.add(name, kind, ours[real], theirs[real])
        elif kind == "logits":
            report.add(name, kind, out.logits[real], theirs[real])
        elif kind in exact:
            report.add(name, kind, exact[kind], theirs)
        elif kind == "image_features":
            assert images is not None
            report.add(name, kind, torch.stack(model.model.vision.encode(images)), theirs)
        elif kind == "loss":
            loss = model(**inputs, labels=given["labels"]).loss
            report.add(name, kind, loss.reshape(theirs.shape), theirs)
        elif kind == "greedy":
            report.add(name, kind, greedy(model, inputs, theirs.shape[1]), theirs)
        else:
            report.fail(name, f"this checker does not know {what!r}")


CHECKS = {"CogVLMConfig": check_case}  # by the class of the configuration


def greedy(model: CogVLMForCausalLM, inputs: dict[str, Any], length: int) -> Tensor:
    """Prompt and greedy continuation up to ``length`` tokens; nothing stops it."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        **inputs, max_new_tokens=length - inputs["input_ids"].shape[1], do_sample=False
    )
    assert isinstance(out, Tensor)
    return out


def check_rope(path: Path, report: Report) -> None:
    """Rotary tables in float32 and as a bfloat16 model computes them."""
    recorded = load_file(path)
    for dtype in ("float32", "bfloat16"):
        inv_freq = recorded[f"{dtype}.inv_freq"]
        theirs = torch.stack((recorded[f"{dtype}.cos"], recorded[f"{dtype}.sin"]))
        positions = torch.arange(theirs.shape[1])[None]
        half = theirs.shape[-1]
        ours = torch.stack(rotary_table(inv_freq, positions, inv_freq.dtype))[:, 0, :, :half]
        report.add(f"rope_{dtype}", f"rope_{dtype}", ours, theirs)


def main(folder: Path) -> int:
    """Check one folder; returns the exit status."""
    try:
        model = load_model(folder, dtype="float32", device="cpu")
        outputs = load_file(folder / "outputs.safetensors")
    except (CogVLMError, OSError) as error:
        print(json.dumps({"folder": folder.name, "ok": False, "error": str(error)}))
        return 2
    report = Report()
    check_case = CHECKS[type(model.config).__name__]
    with torch.no_grad():
        for case, given in cases(outputs).items():
            check_case(model, case, given, report)
    if (folder / "rope_bf16.safetensors").exists():
        check_rope(folder / "rope_bf16.safetensors", report)
    print(json.dumps({"folder": folder.name, "ok": report.ok, "tensors": report.rows}))
    return 0 if report.ok else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/parity/check.py DIR")
    sys.exit(main(Path(sys.argv[1])))
