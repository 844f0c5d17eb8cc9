"""Our model against the same maths written the released way, on the same weights.

    python benchmarks/released_way.py [--quick] [--width 768 ...]

The released way, as the notes on the released code describe it:

* every layer finds its expert masks anew, for attention and for the MLP, and scatters what each
  expert gives for its tokens into fresh zeros: queries/keys/values, attention output, MLP output;
* the causal mask is a 4-D float tensor; every attention looks whether it is plain causal (or all
  visible), then uses the fused kernel, else adds the mask and takes the softmax in float32;
* keys and values grow by concatenation, and are repeated for the query heads at each use;
* logits of the whole prompt, in float32;
* a decode step rebuilds the positions from the whole row.

What is not known to differ is shared (norms, rotary tables once a forward, vectorised positions),
so the released way is shown at its best.  The batch case has a left-padded row, which is where
the released way leaves the fused kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.language import Attention, DecoderLayer, ExpertMLP, rotate
from cogvlm.models.positions import shared_positions
from common import Goal, Result, Run
from sides import Ours, Prompt, Side, build, make_prompt, make_tokens

GOALS = {
    "prefill": Goal("at_least", 1.5),
    "decode": Goal("at_least", 2.0),
    "memory": Goal("at_most", 0.7),
}
KeysValues = tuple[Tensor, Tensor]


def expert_masks(types: Tensor) -> tuple[Tensor, Tensor]:
    """Vision and language tokens: ``bool[B, L]`` each; see ``cogvlm.models.positions``."""
    vision = torch.zeros_like(types, dtype=torch.bool)
    vision[:, :-1] = (types[:, :-1] == 1) & (types[:, 1:] == 1)
    return vision, ~vision


def scattered(
    x: Tensor,
    width: int,
    masks: tuple[Tensor, Tensor],
    vision: Callable[[Tensor], Tensor],
    language: Callable[[Tensor], Tensor],
) -> Tensor:
    """Each expert on its tokens, put into zeros ``float[B, L, width]``."""
    vision_mask, language_mask = masks
    out = torch.zeros(*x.shape[:-1], width, dtype=x.dtype)
    out[vision_mask] = vision(x[vision_mask])
    out[language_mask] = language(x[language_mask])
    return out


def causal_mask(mask: Tensor, length: int) -> Tensor:
    """0 where a query sees a key, else the smallest float: ``float[B, 1, length, past + length]``.

    A query of padding sees nothing.
    """
    rows, keys = mask.shape
    lowest = torch.finfo(torch.float32).min
    future = torch.full((length, keys), lowest).triu(keys - length + 1)
    padding = torch.zeros(rows, 1, 1, keys).masked_fill(mask[:, None, None] == 0, lowest)
    return future + padding


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """``float[B, H, L, d]``; the mask decides between the fused kernel and plain products."""
    visible = mask == 0
    everything = bool(visible.all())
    if everything or bool((visible == torch.ones_like(visible).tril()).all()):
        return F.scaled_dot_product_attention(query, key, value, is_causal=not everything)
    scores = query / query.shape[-1] ** 0.5 @ key.transpose(-1, -2) + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


class ReleasedWay:
    """The same modules, hence the same weights, put together the released way."""

    def __init__(self, model: CogVLMForCausalLM) -> None:
        self.model = model
        self.cache: list[KeysValues] = []

    def prefill(self, prompt: Prompt) -> Tensor:
        self.cache = []
        self.types = prompt.types
        self.mask = prompt.real.long()
        return self.forward(prompt.embeds)

    def step(self, token: Tensor) -> Tensor:
        self.types = F.pad(self.types, (0, 1))
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self.forward(self.model.model.embed_tokens(token))

    def forward(self, x: Tensor) -> Tensor:
        """``float[B, L, D]`` -> logits of all of them, ``float32[B, L, V]``."""
        length = x.shape[1]
        types = self.types[:, -length:]
        positions = shared_positions(self.types, self.mask)[:, -length:]
        table = self.model.model.rotary(positions, x.dtype)
        mask = causal_mask(self.mask, length)
        grown = []
        for i, layer in enumerate(self.model.model.layers):
            assert isinstance(layer, DecoderLayer)
            past = self.cache[i] if self.cache else None
            mixed, kept = self.attention(
                layer.self_attn, layer.input_layernorm(x), types, table, mask, past
            )
            grown.append(kept)
            x = x + mixed
            x = x + self.mlp(layer.mlp, layer.post_attention_layernorm(x), types)
        self.cache = grown
        logits: Tensor = self.model.lm_head(self.model.model.norm(x))
        return logits.float()

    def attention(
        self,
        part: Attention,
        x: Tensor,
        types: Tensor,
        table: tuple[Tensor, Tensor],
        mask: Tensor,
        past: KeysValues | None,
    ) -> tuple[Tensor, KeysValues]:
        """Attention of one layer, and its keys and values from the first token on."""
        heads, kv, dim = part.heads, part.kv_heads, part.head_dim
        masks = expert_masks(types)
        qkv = scattered(
            x,
            (heads + 2 * kv) * dim,
            masks,
            part.vision_expert_query_key_value,
            part.language_expert_query_key_value,
        )
        parts = qkv.split((heads * dim, kv * dim, kv * dim), dim=-1)
        query, key, value = (p.unflatten(-1, (-1, dim)).transpose(1, 2) for p in parts)
        query, key = rotate(query, *table), rotate(key, *table)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        groups = heads // kv
        mixed = attend(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), mask
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        out = scattered(
            mixed, x.shape[-1], masks, part.vision_expert_dense, part.language_expert_dense
        )
        return out, (key, value)

    def mlp(self, part: ExpertMLP, x: Tensor, types: Tensor) -> Tensor:
        """Gated MLP of one layer."""
        vision: nn.Module | None = part.vision_mlp
        assert vision is not None
        return scattered(x, x.shape[-1], expert_masks(types), vision, part.language_mlp)


def logit_differences(
    model: CogVLMForCausalLM, prompt: Prompt, tokens: Sequence[Tensor]
) -> dict[str, float]:
    """Over all real tokens of the prompt, and over the decode steps."""
    ours, released = Ours(model, logits_to_keep=0), ReleasedWay(model)
    mine, theirs = (side.prefill(prompt)[prompt.real] for side in (ours, released))
    steps = max(common.difference(ours.step(t), released.step(t)) for t in tokens[:8])
    return {"prefill": common.difference(mine, theirs), "decode": steps}


def peak(side: Side, prompt: Prompt, tokens: Sequence[Tensor]) -> int:
    """Peak bytes of a prefill and a few decode steps, beyond weights and prompt."""

    def work() -> None:
        side.prefill(prompt)
        for token in tokens[:4]:
            side.step(token)

    return common.peak_bytes(work)


@dataclass
class Found:
    """What the cases of this benchmark add up to."""

    times: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)

    def case(self, model: CogVLMForCausalLM, run: Run, padding: Sequence[int], suffix: str) -> None:
        """Compare and measure with one row for each entry of ``padding``."""
        prompt = make_prompt(model, run.sizes, padding)
        tokens = make_tokens(run.sizes, len(padding))
        found = logit_differences(model, prompt, tokens)
        self.differences |= {f"{k}{suffix}": v for k, v in found.items()}
        sides: dict[str, Side] = {"ours": Ours(model), "released": ReleasedWay(model)}
        self.measure_memory(model, {k: peak(s, prompt, tokens) for k, s in sides.items()}, suffix)
        # How much of the prefill's difference is the head: ours with logits of the whole prompt.
        readers = {**sides, "ours_all_logits": Ours(model, logits_to_keep=0)}
        prefill = common.time_prefill(readers, prompt, run)
        decode = common.time_decode(sides, tokens, run)
        self.operators |= {
            f"{k}{suffix}": common.operators(partial(s.step, tokens[0])) for k, s in sides.items()
        }
        for part, taken in (("prefill", prefill), ("decode", decode)):
            self.times |= {f"{part}{suffix}_{k}": common.spread(t) for k, t in taken.items()}
            self.ratios[f"{part}{suffix}"] = common.ratio(taken["released"], taken["ours"])
        self.ratios[f"prefill{suffix}_all_logits"] = common.ratio(
            prefill["released"], prefill["ours_all_logits"]
        )

    def measure_memory(self, model: nn.Module, peaks: dict[str, int], suffix: str) -> None:
        """Ratios of the peaks, without the weights and with them."""
        self.memory |= {f"{k}{suffix}": v for k, v in peaks.items()}
        weights = self.memory["weights"] = sum(p.nbytes for p in model.parameters())
        for name, more in ((f"memory{suffix}", 0), (f"memory{suffix}_with_weights", weights)):
            ratio = (peaks["ours"] + more) / (peaks["released"] + more)
            self.ratios[name] = {"ratio": round(ratio, 3)}


@torch.inference_mode()
def measure(run: Run) -> Result:
    """A single row, then a batch of which one row is padded."""
    machine = common.machine()
    model = build(run.sizes)
    found = Found()
    found.case(model, run, (0,), "")
    found.case(model, run, (0, run.sizes.padding), "_batch")
    more = {
        "ratio_is": "time of the released way / our time; memory: our peak / peak of the other",
        "peak_bytes": found.memory,
        "peak_is": "live blocks of torch's CPU allocator, from its profiler; weights not in it",
        "operators_a_decode_step": found.operators,
    }
    return Result(
        "released_way",
        run,
        machine,
        found.times,
        found.ratios,
        GOALS,
        found.differences,
        1e-4,
        more,
    )


if __name__ == "__main__":
    sys.exit(common.main(__doc__, measure))
