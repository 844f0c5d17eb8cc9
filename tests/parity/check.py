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
from cogvlm.models.cogagent import CogAgentForCausalLM
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.glm4v import Glm4vForCausalLM, expand_image_tokens
from cogvlm.models.language import rotary_table
from cogvlm.models.positions import expert_mask

TOLERANCE = {  # absolute, float32
    "position_ids": 0.0,
    "vision_expert_mask": 0.0,
    "greedy": 0.0,
    "image_features": 1e-4,
    "cross_image_features": 1e-4,
    "cross_blocks": 1e-4,
    "hidden_states": 5e-4,
    "final_hidden": 5e-4,
    "glm_image_features": 1e-5,
    "inputs_embeds": 1e-5,
    "rope_cache": 1e-6,
    "blocked": 0.0,
    "expanded_position_ids": 0.0,
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
        self.tolerance = dict(TOLERANCE)

    def add(self, name: str, kind: str, ours: Tensor, theirs: Tensor) -> None:
        """Compare two tensors of equal shape."""
        if ours.shape != theirs.shape:
            self.fail(name, f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
            return
        difference = (ours.double() - theirs.double()).abs()
        largest = float(difference.max()) if difference.numel() else 0.0
        scale = float(theirs.double().abs().max()) if theirs.numel() else 0.0
        within = largest <= self.tolerance[kind]  # false for NaN too
        self.rows[name] = {
            "abs": largest,
            "rel": largest / scale if scale else largest,
            "tolerance": self.tolerance[kind],
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


def check_case(
    model: CogVLMForCausalLM,
    case: str,
    given: Tensors,
    report: Report,
    more: dict[str, Tensor] | None = None,
) -> None:
    """Run one case, with ``more`` inputs, and compare everything recorded of it."""
    ids, types = given["input_ids"], given["token_type_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    images = given.get("pixel_values")
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": mask,
        "pixel_values": images,
        **(more or {}),
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


def check_cogagent_case(
    model: CogAgentForCausalLM, case: str, given: Tensors, report: Report
) -> None:
    """The same with a large picture, and the encoder of that compared block by block."""
    # The recorded model's cross-attention is sharp, so rounding goes further.
    report.tolerance |= {"hidden_states": 1e-3, "logits": 1e-3}
    pixels = given["cross_pixel_values"]
    plain = {k: v for k, v in given.items() if not k.startswith("cross_")}
    check_case(model, case, plain, report, {"cross_pixel_values": pixels})
    blocks: dict[int, Tensor] = {}
    encoder = model.model.cross_vision
    hooks = [
        block.register_forward_hook(lambda m, x, y, n=n: blocks.update({n: y}))
        for n, block in enumerate(encoder.vit.model.blocks)
    ]
    ours = {"cross_image_features": encoder(pixels)}
    ours |= {f"cross_blocks.{n}": block for n, block in blocks.items()}
    for hook in hooks:
        hook.remove()
    for what in given.keys() - plain.keys() - {"cross_pixel_values"}:
        report.add(f"{case}.{what}", what.split(".")[0], ours[what], given[what])


def check_glm4v_case(model: Glm4vForCausalLM, case: str, given: Tensors, report: Report) -> None:
    """Expand the recorded prompt and compare everything, rows of padding too."""
    config, core, prompt = model.config, model.model, given["input_ids"]
    images = given.get("pixel_values")
    ids, types, mask = expand_image_tokens(
        prompt, given["attention_mask"], config.boi_token_id, config.image_tokens
    )
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": mask,
        "pixel_values": images,
    }
    out = model(**inputs, output_hidden_states=True)
    positions = core.position_ids(types, mask, images)
    embeds = core.embed(ids, types, images)
    ours: Tensors = {
        "logits": out.logits,
        "final_hidden": core(**inputs).last_hidden_state,
        "inputs_embeds": embeds,
        "expanded_position_ids": positions,
        "rope_cache": torch.stack(core.rotary(positions, torch.float32), dim=-1),
        **{f"hidden_states.{n}": states for n, states in enumerate(out.hidden_states)},
    }
    if images is not None:
        ours["image_features"] = torch.stack(core.vision.encode(images))
    if "blocked" in given:
        ours["blocked"] = (~core.attention_mask(embeds, types, mask, None)).to(torch.uint8)
    if "greedy" in given:
        new = given["greedy"].shape[1] - prompt.shape[1]
        written = greedy(model, inputs, ids.shape[1] + new)[:, -new:]
        ours["greedy"] = torch.cat((prompt, written), dim=1)
    for what in given.keys() - GIVEN - {"position_ids"}:
        name, kind = f"{case}.{what}", re.sub(r"\.\d+$", "", what)
        if what not in ours:
            report.fail(name, f"this checker does not know {what!r}")
            continue
        kind = "glm_image_features" if kind == "image_features" else kind
        report.add(name, kind, ours[what], given[what])


CHECKS = {  # by the class of the configuration
    "CogVLMConfig": check_case,
    "CogAgentConfig": check_cogagent_case,
    "Glm4vConfig": check_glm4v_case,
}


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
