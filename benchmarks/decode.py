"""How fast one answer goes on: the engine on nano; transformers, llama.cpp on its language model.

Sides, in turn, each ``--tokens`` greedy tokens after the same prompt of text alone:

* ``llama_PRECISION``: transformers' own Llama, eager, on the same language weights.
* ``model_PRECISION``: the steps of our model's own ``forward``, in the engine's buffers.
* ``engine_PRECISION``: the engine's steps as they are.
* ``llama_cpp``: llama.cpp on ``--gguf``, run by the interpreter ``--llama-python`` (that is
  ``llama_cpp.py``) with as many threads.  Nano's language model is made from the Q4_1 GGUF that
  cogvlm fetches.

With no picture nano is its language model, so all float32 sides say the same, which is checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from cogvlm.engine.runner import ModelRunner
from cogvlm.load import Loaded, load
from cogvlm.processor import Encoded, user
from common import CLOCKS, Goal, commit, interleave, machine, ratio, spread

ASKED = "Tell me, in a few words, what a picture is good for."
LLAMA_PRECISIONS = ("float32", "bfloat16")
GOAL = Goal("at_least", 0.5)  # the fastest precision of the engine against llama.cpp
Step = Callable[[int], int]
"""The token after this one."""


def engine_steps(loaded: Loaded, prompt: Encoded, own: bool) -> tuple[int, Step]:
    """The first token and how to go on; ``own``: by the model's ``forward``."""
    runner = ModelRunner(loaded, 1, 0, 0)
    if own:
        runner._fast = None
    seat, scores = runner.start(prompt)
    return int(scores.argmax()), lambda token: int(runner.step([seat], [token]).argmax())


def llama_of(loaded: Loaded, dtype: torch.dtype) -> Any:
    """transformers' Llama over the language weights of a float32 model, which are copied."""
    ours: Any = loaded.model
    c = ours.config
    config_class: Any = transformers.LlamaConfig  # which leaves arguments of its parent unnamed
    config = config_class(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_multi_query_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    heads, kv = c.num_attention_heads * c.head_dim, c.num_multi_query_heads * c.head_dim
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(ours.model.embed_tokens.weight)
        model.model.norm.weight.copy_(ours.model.norm.weight)
        for theirs, layer in zip(model.model.layers, ours.model.layers, strict=True):
            fused = layer.self_attn.language_expert_query_key_value.weight.split((heads, kv, kv))
            for name, part in zip("qkv", fused, strict=True):
                getattr(theirs.self_attn, f"{name}_proj").weight.copy_(part)
            theirs.self_attn.o_proj.weight.copy_(layer.self_attn.language_expert_dense.weight)
            theirs.mlp.load_state_dict(layer.mlp.language_mlp.state_dict())
            for name in ("input_layernorm", "post_attention_layernorm"):
                getattr(theirs, name).weight.copy_(getattr(layer, name).weight)
    return model.to(dtype).eval()


def llama_steps(model: Any, prompt: Encoded) -> tuple[int, Step]:
    """As :func:`engine_steps`."""
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def go(ids: list[int]) -> int:
        out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    return go(prompt.input_ids.tolist()), lambda token: go([token])


def against_llama_cpp(per_token: dict[str, list[float]]) -> dict[str, Any]:
    """Speed of the engine as a share of llama.cpp's."""
    shares = {
        name: ratio(per_token["llama_cpp"], t)
        for name, t in per_token.items()
        if name.startswith("engine_")
    }
    best = max(share["ratio"] for share in shares.values())
    goal = {GOAL.bound: GOAL.value, "best": best, "met": GOAL.met(best)}
    return {"of_llama_cpp": shares, "goals": {"of_llama_cpp": goal}}


class LlamaCpp:
    """llama.cpp in a process of its own, which measures itself."""

    def __init__(self, process: subprocess.Popen[str], tokens: int) -> None:
        self._process, self._tokens = process, tokens
        self.seconds: list[dict[str, float]] = []  # of every round, by clock

    def __call__(self, _: int) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(self._tokens, file=self._process.stdin, flush=True)
        self.seconds.append(json.loads(self._process.stdout.readline()))


@contextmanager
def llama_cpp(python: str, gguf: Path, prompt: Encoded, tokens: int) -> Iterator[LlamaCpp]:
    """A side that is llama.cpp, with as many threads as torch has."""
    ids = ",".join(map(str, prompt.input_ids.tolist()))
    script = str(Path(__file__).with_name("llama_cpp.py"))
    with subprocess.Popen(
        [python, script, str(gguf), str(torch.get_num_threads()), ids],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # its log
        text=True,
    ) as process:
        yield LlamaCpp(process, tokens)  # the end of its input ends it


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--precisions", default="float32,int8,int4", help="float32 is always one")
    parser.add_argument("--tokens", type=int, default=16, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--llama-python", help="an interpreter that has xllamacpp")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp")
    given = parser.parse_args()
    if (given.llama_python is None) != (given.gguf is None):
        parser.error("give --llama-python and --gguf together")
    if given.threads:
        torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    about = machine()
    models = {
        p: load(given.model, dtype=p)
        for p in {"float32": 0} | dict.fromkeys(given.precisions.split(","))
    }
    prompt = models["float32"].processor.encode([user(ASKED)])
    starts: dict[str, tuple[int, Step]] = {}
    for precision in LLAMA_PRECISIONS:
        llama = llama_of(models["float32"], getattr(torch, precision))
        starts[f"llama_{precision}"] = llama_steps(llama, prompt)
    for precision, loaded in models.items():
        for name, own in (("model", True), ("engine", False)):
            starts[f"{name}_{precision}"] = engine_steps(loaded, prompt, own)
    said = {name: [first] for name, (first, _) in starts.items()}

    def side(name: str) -> Callable[[int], None]:
        def work(_: int) -> None:
            for _ in range(given.tokens):
                said[name].append(starts[name][1](said[name][-1]))

        return work

    sides = {name: side(name) for name in starts}
    if given.gguf is None:
        times = interleave(sides, given.repeats, clock=CLOCKS[given.clock])
    else:
        with llama_cpp(given.llama_python, given.gguf, prompt, given.tokens) as theirs:
            together = {**sides, "llama_cpp": theirs}
            times = interleave(together, given.repeats, clock=CLOCKS[given.clock])
        # Of its own process, the first round to warm up.
        times["llama_cpp"] = [found[given.clock] for found in theirs.seconds[1:]]
    per_token = {name: [t / given.tokens for t in each] for name, each in times.items()}
    agree = said["llama_float32"] == said["model_float32"] == said["engine_float32"]
    found = {
        "name": "decode",
        "commit": commit(),
        "machine": about,
        "clock": given.clock,
        "model": given.model,
        "tokens": given.tokens,
        "agree": agree,
        "milliseconds": {name: spread(t) for name, t in per_token.items()},
        "tokens_a_second": {name: round(1 / median(t), 1) for name, t in per_token.items()},
        "ratios": {
            name: ratio(per_token["llama_float32"], t)
            for name, t in per_token.items()
            if name != "llama_float32"
        },
        "ratio_is": "transformers' Llama in float32 over the side, per token",
    }
    if "llama_cpp" in per_token:
        found |= against_llama_cpp(per_token)
    print(json.dumps(found), flush=True)
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
