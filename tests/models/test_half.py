"""Float16: weights that overflow it give what float32 gives, not NaN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cogvlm.models import half
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.models.language import RMSNorm, eager_attention
from fakes import image, row, toy_model
from models import test_cogagent as agent
from models import test_glm4v as glm

HUGE = 300.0  # gate and up of this size multiply to 90000, beyond 65504


def family(name: str) -> tuple[CogVLMForCausalLM, dict[str, Any]]:
    """A toy and a prompt with a picture."""
    if name == "cogagent":
        model = agent.toy()
        return model, agent.seen(model, 2, image(1), 5)
    if name == "glm4v":
        return glm.toy_model(), glm.row(2, image(1), 5)
    changes = {"expert_rank": 4} if name == "low rank" else {}
    model = toy_model(**changes)
    return model, row(model, 2, image(1), 5)


def enlarge(model: nn.Module, kind: str) -> None:
    """Make a product, the residual or the adapter of every token too large for float16."""
    gates = ("gate_proj", "up_proj", "dense_h_to_4h", "w1", "w2")
    factors: dict[str, float] = {
        "product": dict.fromkeys(gates, 120.0) | {"down_proj": 1e-4, "4h_to_h": 1e-4},
        "residual": dict.fromkeys(gates, 40.0) | {"down_proj": 60.0, "4h_to_h": 60.0},
        "tower": {"fc1": 1000.0, "fc2": 60.0},
    }[kind]
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or "lora" in name:
                continue
            if ("vision." in name) == (kind == "tower"):
                found = [factor for word, factor in factors.items() if word in name]
                module.weight.mul_(found[-1] if found else 1.0)


def rough(model: CogVLMForCausalLM, prompt: dict[str, Any]) -> torch.Tensor:
    """The logits in bfloat16."""
    logits: torch.Tensor = copy.deepcopy(model).float().bfloat16()(**prompt).logits
    return logits


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", ["cogvlm2", "low rank", "cogagent", "glm4v"])
@pytest.mark.parametrize("kind", ["product", "residual", "tower"])
def test_what_overflows_gives_what_float32_gives(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = family(name)
    enlarge(model, kind)
    small = copy.deepcopy(model).half()
    exact = small.float()(**prompt).logits  # the rounded weights: float16's arithmetic alone
    small.half()
    found = small(**prompt).logits
    assert torch.isfinite(found).all()
    # Ten bits of mantissa against seven; how much a toy makes of rounding differs between them.
    assert worst(found, exact) < 0.5 * worst(rough(small, prompt), exact)
    for guard in ("widened", "saturated"):
        for module in ("language", "cogvlm", "vision", "glm4v", "cogagent", "eva_large"):
            place = f"cogvlm.models.{module}.{guard}"
            monkeypatch.setattr(place, lambda x: x, raising=False)
    for module in ("language", "vision", "glm4v"):
        bare = lambda act, gate, up, down: down(act(gate) * up)  # noqa: E731
        monkeypatch.setattr(f"cogvlm.models.{module}.gated", bare, raising=False)
    monkeypatch.setattr("cogvlm.models.vision.biased", lambda layer, x: layer(x.half()))
    monkeypatch.setattr("cogvlm.models.vision.fitted", lambda x, dtype: x)
    without = small(**prompt).logits
    assert not torch.isfinite(without).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["cogvlm2", "low rank", "cogagent", "glm4v"])
def test_ordinary_weights_in_float16(name: str) -> None:
    model, prompt = family(name)
    small = copy.deepcopy(model).half()
    exact = small.float()(**prompt).logits
    small.half()
    assert worst(small(**prompt).logits, exact) < 0.5 * worst(rough(small, prompt), exact)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    again = copy.deepcopy(small).float().generate(**prompt, **settings)
    assert torch.equal(small.generate(**prompt, **settings), again)


def test_norms_and_softmax_are_computed_in_float32() -> None:
    large = torch.full((2, 64), 3e4).half()
    large[:, ::2] *= -0.5
    norm = RMSNorm(64, 1e-5)
    for layer in (norm, nn.LayerNorm(64)):
        wanted = layer(large.float())
        found = copy.deepcopy(layer).half()(large)
        assert found.dtype is torch.float16
        torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=1e-3)
    out = copy.deepcopy(norm).half()(large.float() * 1e3)  # the residual of float16 is float32
    assert out.dtype is torch.float16
    torch.testing.assert_close(out.float(), norm(large.float() * 1e3), rtol=2e-3, atol=1e-3)

    class Layer(nn.Module):
        num_key_value_groups, scaling = 1, 0.125

    generator = torch.Generator().manual_seed(0)
    query = 1000 * torch.randn(1, 1, 4, 64, generator=generator).half()
    mixed, _ = eager_attention(Layer(), query, query, query, None)
    exact, _ = eager_attention(Layer(), query.float(), query.float(), query.float(), None)
    assert float((query @ query.mT * 0.125).abs().max()) == float("inf")
    torch.testing.assert_close(mixed.float(), exact, rtol=2e-3, atol=1e-2)


def test_shrinking_is_exact_and_only_where_needed() -> None:
    x = torch.tensor([[0.0, 0.0], [100.0, -256.0], [257.0, 1.0], [-7e6, 3.0]])
    small, scale = half.shrunk(x)
    assert scale.flatten().tolist() == [1, 1, 2, 2**15]
    assert small.dtype is torch.float16 and float(small.abs().max()) <= 256
    assert (small.float() * scale)[:3].tolist() == [[0, 0], [100, -256], [257, 1]]


def test_other_precisions_are_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([float("inf"), -1e38, 1.0], dtype=dtype)
        assert half.saturated(x) is x and half.widened(x) is x
    x = torch.tensor([float("inf"), -float("inf"), 1.0]).half()
    assert half.saturated(x).tolist() == [65504, -65504, 1]


def test_the_loss_has_a_gradient_where_products_are_shrunk() -> None:
    gate = torch.tensor([[HUGE, -1.0], [0.0, 0.0]]).half().requires_grad_()
    y = half.gated(nn.functional.silu, gate, gate, lambda inner: inner.sum(-1, keepdim=True))
    y.sum().backward()
    assert y.dtype is torch.float32
    assert float(y.detach()[0]) == pytest.approx(HUGE**2, rel=1e-2)
    assert gate.grad is not None and torch.isfinite(gate.grad).all() and gate.grad[0, 0] > HUGE
