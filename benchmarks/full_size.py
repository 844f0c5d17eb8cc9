"""CogVLM2-19B of random weights in eight or four bits: built, and asked about one picture.

The released shape, built a matrix at a time: each is drawn, quantised and put in place by the code
that loads a folder, so that the full weights are never in memory.  Then one picture of 1344 pixels
and a short prompt go through ``generate``.  Ends with one JSON line: peak resident memory of the
process, weights by part, seconds of the tower, of the prefill and of a token, and what share of
the machine's matrix rate, measured in the same run, the first token reached.

    python benchmarks/full_size.py --precision int4        # tower in int8; half an hour or more
    python benchmarks/full_size.py --precision int4 --layers 2 --tower-layers 1   # minutes

With fewer layers than released the line holds an extrapolation too.  With glibc, a variable makes
it give freed memory back at once (otherwise it keeps about 0.5 GB): MALLOC_MMAP_THRESHOLD_=1000000
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cogvlm import linear, memory, quantize
from cogvlm.config import CogVLMConfig, preset
from cogvlm.models.build import skeleton
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.language import inverse_frequencies
from common import commit, machine

GOALS = {"int4": 15.0, "int4-all": 13.0}  # GB at the full size
DTYPE = torch.bfloat16


QUICK: dict[str, Any] = {  # a smoke test
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_multi_query_heads": 2,
}
QUICK_TOWER = {"hidden_size": 128, "num_heads": 4, "intermediate_size": 256}


def configure(given: argparse.Namespace) -> CogVLMConfig:
    """The released shape with fewer layers, for a smaller picture, or as narrow as a toy."""
    side = given.image // 14
    vision: dict[str, Any] = {
        "num_hidden_layers": given.tower_layers,
        "image_size": given.image,
        "num_positions": side * side + 1,
    }
    if given.quick:
        vision |= QUICK_TOWER
    widths = QUICK if given.quick else {}
    return preset("cogvlm2", num_hidden_layers=given.layers, vision_config=vision, **widths)


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Random weights that keep activations at about one; ones for norms, zeros for biases."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=DTYPE)
    if len(shape) < 2:
        return torch.zeros(shape, dtype=DTYPE)
    fan = shape[1:].numel()
    bound = 0.02 if "embed" in name else (3 / fan) ** 0.5
    return torch.empty(shape, dtype=DTYPE).uniform_(-bound, bound)


def build(config: CogVLMConfig, precision: str) -> CogVLMForCausalLM:
    """A random model, quantised as it is drawn."""
    model = skeleton(config)
    groups, types = quantize.plan(model, precision), linear.backend()
    assert config.head_dim is not None
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta).to(DTYPE)
    plain = {n: drawn(n, p.shape) for n, p in model.named_parameters() if n not in groups}
    plain |= {n: frequencies for n, _ in model.named_buffers()}
    model.load_state_dict(plain, strict=False, assign=True)
    del plain
    for done, (name, group) in enumerate(groups.items(), 1):
        weight = drawn(name, model.get_parameter(name).shape)
        quantize.install(model, name, weight, group, DTYPE, types)
        if done % 50 == 0:
            say(f"{done} of {len(groups)} matrices, {resident('VmRSS') / 1e9:.2f} GB")
    return model.eval().requires_grad_(False)


def say(text: str) -> None:
    """To the one who waits."""
    print(text, file=sys.stderr, flush=True)


def resident(key: str = "VmHWM") -> int:
    """Bytes of this process in main memory: the peak, or ``VmRSS``, now."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(rf"{key}:\s+(\d+) kB", status)
        assert found
        return 1024 * int(found[1])
    except OSError:  # no Linux: the peak in either case
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights by part, as they lie in memory."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        tensor: Any = parameter
        names = getattr(tensor, "tensor_data_names", None)
        tensors = [getattr(tensor, n) for n in names] if names else [tensor]
        part = memory.part_of(name)
        found[part] = found.get(part, 0) + sum(t.nbytes for t in tensors)
    return found


def rate(dtype: torch.dtype, clock: Callable[[], float], size: int = 2048) -> float:
    """Operations a second of a product of matrices, the best of three."""
    a, b = torch.rand(1024, size).to(dtype), torch.rand(size, size).to(dtype).t()
    times = []
    for _ in range(3):
        start = clock()
        torch.mm(a, b)
        times.append(clock() - start)
    return 2 * len(a) * size * size / min(times)


@dataclass
class Watch:
    """Hooks that note when the tower and each token were done, and count products."""

    clock: Callable[[], float]
    start: float = 0.0
    tower: float = 0.0
    adapter: float = 0.0  # when it was done, the tower before it
    tokens: list[float] = field(default_factory=list)
    operations: float = 0.0

    def attach(self, model: CogVLMForCausalLM) -> None:
        """To every linear layer, the tower and the head."""
        vision = model.model.vision
        for name, module in (("tower", vision.transformer), ("adapter", vision.linear_proj)):
            module.register_forward_hook(self.done(name))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self.count)
        model.lm_head.register_forward_hook(self.token)

    def done(self, name: str) -> Callable[..., None]:
        """A hook that notes the time under ``name``."""
        return lambda *_: setattr(self, name, self.clock() - self.start)

    def count(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        """Two operations for each weight and row, up to the first token."""
        if not self.tokens:
            self.operations += 2 * given[0].numel() * out.shape[-1]

    def token(self, *_: object) -> None:
        """A token is as good as written."""
        self.tokens.append(self.clock() - self.start)
        say(f"token {len(self.tokens)} after {self.tokens[-1]:.1f} s")


def prompt(config: CogVLMConfig, text: int) -> dict[str, Any]:
    """A begin token, a picture of noise, and ``text`` tokens."""
    seen = memory.image_tokens(config)
    types = torch.tensor([[0] + [1] * seen + [0] * text])
    side = config.vision.image_size
    return {
        "input_ids": torch.randint(100, config.vocab_size, types.shape),
        "token_type_ids": types,
        "attention_mask": torch.ones_like(types),
        "pixel_values": torch.randn(1, 3, side, side),
    }


def attention(config: CogVLMConfig, tokens: int) -> float:
    """Operations of attention up to the first token; the decoder's is causal."""
    vision = config.vision
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    tower = 4 * patches**2 * vision.hidden_size * vision.num_hidden_layers
    return tower + 2 * tokens**2 * config.hidden_size * config.num_hidden_layers


@torch.inference_mode()
def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Build, run, and say what was seen."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[given.clock]
    torch.manual_seed(0)
    config = configure(given)
    before = resident("VmRSS")
    start = clock()
    model = build(config, given.precision)
    built, after = clock() - start, resident()
    asked = prompt(config, given.prompt)
    tokens = asked["input_ids"].shape[1]
    watch = Watch(clock)
    watch.attach(model)
    model.generation_config.eos_token_id = None
    watch.start = clock()
    model.generate(**asked, max_new_tokens=given.tokens, do_sample=False)
    peak = resident()
    rates = {str(d).removeprefix("torch."): rate(d, clock) for d in (torch.float32, DTYPE)}
    work = watch.operations + attention(config, tokens)
    first = watch.tokens[0]
    later = [b - a for a, b in zip(watch.tokens, watch.tokens[1:], strict=False)]
    parts = memory.parts_of(config)
    said = sum(memory.held_bytes(part, size, given.precision) for part, size in parts.items())
    cache = memory.cache_bytes(config, tokens)
    prefill = memory.prefill_bytes(config, tokens)
    weights = held(model)
    found = {
        "peak_gb": peak / 1e9,
        "before_gb": before / 1e9,
        "peak_of_building_gb": after / 1e9,
        "weights_gb": {part: size / 1e9 for part, size in weights.items()},
        "weights_measured_over_said": sum(weights.values()) / said,
        "peak_measured_over_said": peak / (before + said + cache + prefill),
        "said_gb": {"weights": said / 1e9, "cache": cache / 1e9, "prefill": prefill / 1e9},
        "prompt_tokens": tokens,
        "seconds": {
            "build": built,
            "tower": watch.tower,
            "adapter": watch.adapter - watch.tower,
            "prefill": first - watch.adapter,
            "first_token": first,
            "token": sorted(later)[len(later) // 2] if later else None,
        },
        "operations_to_first_token": work,
        "rate": rates,
        "share_of_rate": {name: work / first / value for name, value in rates.items()},
    }
    full = preset("cogvlm2")
    layers, tower = full.num_hidden_layers, full.vision.num_hidden_layers
    asked_for = (given.layers, given.tower_layers, given.image, given.quick)
    whole = asked_for == (layers, tower, 1344, False)
    if whole and given.precision in GOALS:
        goal = GOALS[given.precision]
        found["goal"] = {"peak_gb_at_most": goal, "met": peak <= goal * 1e9}
    elif not whole and given.image == 1344 and not given.quick:
        # The last layer of the decoder works for one token, so it is as good as none.
        more = max(1, layers - 1) / max(1, given.layers - 1)
        tower_s = watch.tower * tower / given.tower_layers
        adapter_s, prefill_s = watch.adapter - watch.tower, (first - watch.adapter) * more
        missing = sum(
            memory.held_bytes(part, size, given.precision)
            for part, size in memory.parts_of(full).items()
        )
        grown = missing - said + memory.cache_bytes(full, tokens) - cache
        found["extrapolated"] = {
            # Too much where the peak is the tower's: the cache is not there yet.
            "peak_gb_at_most": (peak + grown) / 1e9,
            "tower": tower_s,
            "prefill": prefill_s,
            "first_token": tower_s + adapter_s + prefill_s,
            "token": (found["seconds"]["token"] or 0) * layers / given.layers,
            "build": built * missing / said,
        }
    return found


def rounded(value: Any) -> Any:
    """Numbers to four digits, inside anything."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=quantize.PRECISIONS, default="int4")
    parser.add_argument("--layers", type=int, default=32, help="of the decoder")
    parser.add_argument("--tower-layers", type=int, default=63)
    parser.add_argument("--image", type=int, default=1344, help="pixels a side, a multiple of 28")
    parser.add_argument("--prompt", type=int, default=12, help="tokens of text")
    parser.add_argument("--tokens", type=int, default=4, help="to write")
    parser.add_argument("--quick", action="store_true", help="as narrow as a toy, a smoke test")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="see README.md")
    given = parser.parse_args()
    if given.image % 28 or min(given.image, given.layers, given.tower_layers, given.tokens) < 1:
        parser.error("--image is a multiple of 28, and layers and tokens are at least 1")
    if given.threads:
        torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    line = {
        "name": "full_size",
        "commit": commit(),
        "machine": machine(),
        "clock": given.clock,
        "precision": given.precision,
        "layers": given.layers,
        "tower_layers": given.tower_layers,
        "image": given.image,
        "quick": given.quick,
    }
    print(json.dumps(rounded({**line, **measure(given)})), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
