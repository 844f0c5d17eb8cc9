"""Expert routing against a dense Llama of the same shape.

    python benchmarks/routing.py [--quick] [--width 768 ...]

Both sides read the same embeddings, with and without an image among them; then both decode.  The
vision experts hold the language model's weights (in storage of their own, as a model about to be
trained does), so with Llama's positions both sides must give the same logits with an image too.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlamaConfig, LlamaForCausalLM

import common
from cogvlm.models.checkpoint import to_llama
from cogvlm.models.cogvlm import CogVLMForCausalLM
from common import Goal, Result, Run
from sides import Ours, Prompt, Side, Sizes, build, make_prompt, make_tokens

GOALS = {"prefill_text": Goal("at_most", 1.05), "prefill_image": Goal("at_most", 1.10)}


class Dense:
    """transformers' own Llama, which knows of no image."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.cache: Cache | None = None

    def prefill(self, prompt: Prompt) -> Tensor:
        out = self.model(inputs_embeds=prompt.embeds, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        logits: Tensor = out.logits
        return logits

    def step(self, token: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=token, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits


def copy_experts(model: CogVLMForCausalLM) -> None:
    """Vision experts start as copies of the language model's weights, biases zero."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.vision_expert_query_key_value.bias.zero_()
        for vision, language in (
            (
                attention.vision_expert_query_key_value.weight,
                attention.language_expert_query_key_value.weight,
            ),
            (attention.vision_expert_dense.weight, attention.language_expert_dense.weight),
            *zip(mlp.vision_mlp.parameters(), mlp.language_mlp.parameters(), strict=True),
        ):
            vision.copy_(language)


def llama_of(model: CogVLMForCausalLM, sizes: Sizes) -> LlamaForCausalLM:
    """The language half of the model, as transformers has it."""
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=model.config.max_position_embeddings,
        rms_norm_eps=model.config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    dense = LlamaForCausalLM(config)
    dense.eval().requires_grad_(False)
    tensors = to_llama(model.state_dict(), sizes.heads, sizes.kv_heads)
    dense.load_state_dict(tensors)
    return dense


@torch.inference_mode()
def measure(run: Run) -> Result:
    """Build both sides, compare what they compute, time them."""
    sizes, machine = run.sizes, common.machine()
    model = build(sizes)
    copy_experts(model)
    ours, dense = Ours(model), Dense(llama_of(model, sizes))
    image = make_prompt(model, sizes)
    text = Prompt(image.embeds, torch.zeros_like(image.types), None)
    tokens = make_tokens(sizes)
    row = torch.arange(sizes.prompt)[None]
    differences = {
        "text": common.difference(ours.prefill(text), dense.prefill(text)),
        "decode": common.difference(ours.step(tokens[0]), dense.step(tokens[0])),
        "image": common.difference(ours.prefill(image, row), dense.prefill(image)),
        "decode_image": common.difference(ours.step(tokens[0]), dense.step(tokens[0])),
    }
    times: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    sides: dict[str, Side] = {"ours": ours, "dense": dense}
    for kind, prompt in (("text", text), ("image", image)):
        parts = {
            "prefill": common.time_prefill(sides, prompt, run),
            "decode": common.time_decode(sides, tokens, run),
        }
        for part, taken in parts.items():
            times |= {f"{part}_{kind}_{s}": common.spread(t) for s, t in taken.items()}
            ratios[f"{part}_{kind}"] = common.ratio(taken["ours"], taken["dense"])
    more: dict[str, Any] = {"ratio_is": "our time / time of the dense Llama"}
    return Result("routing", run, machine, times, ratios, GOALS, differences, 1e-4, more)


if __name__ == "__main__":
    sys.exit(common.main(__doc__, measure))
