"""One more text token for every row, or a few for one, in as few operators as the decoder allows.

A step on a CPU spends as long on small operators as on reading some weights, so what a text token
does not need is left out: routing between experts, masks made anew, keys repeated for every head,
modules around the kernels.  What is computed is what ``models/language.py`` computes, to rounding,
with its weights; a model that this does not know takes its steps through its own ``forward``.

``b`` tokens, each of a row of its own or all of one, ``D`` width, ``H`` query heads, ``K`` key and
value heads, ``d`` head width, ``C`` columns, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear import FEW, Product, QuantisedLinear
from ..models.cogvlm import CogVLMForCausalLM, CogVLMModel
from ..models.language import DecoderLayer, LowRank, RMSNorm, spoken
from .slots import View


def is_known(model: Any) -> bool:
    """Whether :class:`Steps` computes what the model does: its own classes, whole on one device."""
    if (getattr(model, "tp_size", None) or 1) > 1:  # its layers add up over processes
        return False
    return (
        type(model) is CogVLMForCausalLM
        and type(model.model) is CogVLMModel
        and all(type(layer) is DecoderLayer for layer in model.model.layers)
        and model.config._attn_implementation == "sdpa"
        and model.dtype in (torch.float32, torch.bfloat16)  # float16 has its own rules (half.py)
        and not hasattr(model, "hf_device_map")
        and len({parameter.device for parameter in model.parameters()}) == 1
    )


class Steps:
    """The steps of one model, whose modules must stay in their places.

    The head of a quantised model, where it is float32 and on a CPU for which torch has the kernel
    (x86 with AVX2), is multiplied in float16: its weights are rounded to eleven bits, and lie in
    memory a second time.

    Args:
        model: one that :func:`is_known`.
        lasting: whether there will be many steps, several tokens at a time: float32 weights are
            laid out for that, see :func:`lay_out`.
    """

    def __init__(self, model: Any, lasting: bool = False) -> None:
        self._model = model
        self._few = [_Layer.of(layer, _bare) for layer in model.model.layers]
        self._many = [_Layer.of(layer, lambda module: module) for layer in model.model.layers]
        self._half = _half_head(model)
        self._head = lay_out(model) if lasting and self._half is None else None

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        view: View,
        mask: Tensor | None,
        behind_picture: Tensor | None = None,
    ) -> Tensor:
        """The scores of the next tokens; call it without gradients.

        Args:
            tokens: ``int64[b]``, text.
            positions: ``int64[b, 1]``, or ``int64[2, b, 1]``.
            view: of the rows, as many as tokens or one; the tokens are put behind them.
            mask: ``bool[b, 1, 1, C]``, or ``bool[1, 1, b, C]`` for one row, true where a token
                looks; none for everywhere.
            behind_picture: ``bool[b, 1]``, true behind a picture; none for nowhere, and where
                the model does not care.

        Returns:
            ``float32[b, V]``.
        """
        inner = self._model.model
        x = inner.embed_tokens(tokens)  # [b, D]
        cos, sin = inner.rotary(positions, x.dtype)  # [b, 1, d]
        half = sin.shape[-1] // 2
        # For halves that change places.
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        if mask is not None:  # once, not in every layer
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
            if mask.shape[2] > 1:  # tokens of one row, see _Layer.attention
                mask = mask.repeat(1, 1, self._few[0].attn.num_key_value_groups, 1)
        behind = None if behind_picture is None else behind_picture.to(x.dtype)
        for layer in self._few if len(x) < FEW else self._many:
            x = x + layer.attention(x, cos, sin, view, mask, behind)
            x = x + layer.mlp(x)
        x = _norm(inner.norm, x)
        scores: Tensor
        if self._half is not None:
            scores = torch.ops.quantized.linear_dynamic_fp16(x, self._half)
            return scores
        if self._head is not None:
            return F.linear(x, self._head, self._model.lm_head.bias)
        scores = self._model.lm_head(x[:, None])
        return scores[:, -1].float()


def lay_out(model: Any) -> Tensor | None:
    """Let float32 matrices of the language model lie column by column, in place.

    So MKL multiplies eight tokens with them in 0.65 of the time, one in 0.95 (two and three take
    1.3 times as long): for a few rows it puts a matrix that lies row by row in order each time.
    They are the same matrices, with other strides; their memory is exchanged one by one, which for
    nano takes half a second.

    Returns:
        The head's, where it is the embedding too, which must lie as it is: a copy.
    """
    if not torch.backends.mkl.is_available():
        return None
    head, embedding = model.lm_head, model.model.embed_tokens.weight
    tied = _is_plain(head) and head.weight is embedding
    for module in (
        *(() if tied else (head,)),
        *(m for layer in model.model.layers for m in _language(layer)),
    ):
        if _is_plain(module) and module.weight.is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()
    return embedding.detach().t().contiguous().t() if tied else None


def _is_plain(module: Any) -> bool:
    """Whether it is multiplied in float32 on a CPU."""
    if type(module) is not nn.Linear:
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype is torch.float32


def _language(layer: Any) -> tuple[nn.Module, ...]:
    """The matrices that text tokens of a layer meet."""
    attn, mlp = layer.self_attn, layer.mlp.language_mlp
    qkv, dense = attn.language_expert_query_key_value, attn.language_expert_dense
    return qkv, dense, mlp.gate_proj, mlp.up_proj, mlp.down_proj


@dataclass(frozen=True)
class _Layer:
    """One layer's modules, or what computes the same for a few rows."""

    attn: Any
    activation: nn.Module
    norms: tuple[RMSNorm, RMSNorm]
    qkv: Product
    dense: Product
    gate: Product
    up: Product
    down: Product
    behind_qkv: LowRank | None
    behind_dense: LowRank | None

    @classmethod
    def of(cls, layer: Any, product: Callable[[nn.Module], Product]) -> _Layer:
        attn = layer.self_attn
        qkv, dense, gate, up, down = map(product, _language(layer))
        return cls(
            attn,
            layer.mlp.language_mlp.activation,
            (layer.input_layernorm, layer.post_attention_layernorm),
            qkv,
            dense,
            gate,
            up,
            down,
            attn.vision_expert_text_query_key_value,
            attn.vision_expert_text_dense,
        )

    def attention(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        view: View,
        mask: Tensor | None,
        behind: Tensor | None,
    ) -> Tensor:
        """``float[b, D]`` -> the same shape."""
        heads, kv, width = self.attn.heads, self.attn.kv_heads, self.attn.head_dim
        qkv = spoken(_norm(self.norms[0], x), self.qkv, self.behind_qkv, behind)
        qkv = qkv.view(len(x), heads + 2 * kv, width)
        turned, value = qkv[:, : heads + kv], qkv[:, heads + kv :]
        turned = turned * cos + turned.roll(width // 2, dims=-1) * sin
        rows = view.rows
        # [rows, K, tokens of each, d]
        new = (part.unflatten(0, (rows, -1)).transpose(1, 2) for part in (turned[:, heads:], value))
        key, value = view.update(*new, self.attn.layer_idx)
        # Heads that share keys stand where tokens of a sequence do otherwise: no copies of keys.
        query = turned[:, :heads].unflatten(1, (kv, -1))  # [b, K, H / K, d]
        if rows < len(x):  # head by head its tokens, [1, K, H / K * b, d]
            query = query.permute(1, 2, 0, 3).flatten(1, 2)[None]
        mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=self.attn.scaling)
        if rows < len(x):
            mixed = mixed[0].unflatten(1, (-1, len(x))).permute(2, 0, 1, 3)
        return spoken(mixed.flatten(1), self.dense, self.behind_dense, behind)

    def mlp(self, x: Tensor) -> Tensor:
        """``float[b, D]`` -> the same shape."""
        x = _norm(self.norms[1], x)
        return self.down(self.activation(self.gate(x)) * self.up(x))


def _bare(module: nn.Module) -> Product:
    """What computes the same as a linear layer for a few rows, without the module's detours."""
    if isinstance(module, QuantisedLinear):
        return module.bare()
    if type(module) is nn.Linear:  # the weights of now, also when they are changed in place
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module


def _half_head(model: Any) -> Any:
    """The head's weights as torch's kernel takes them; none where that is not to be, see above."""
    head = model.lm_head
    if (
        type(head) is not nn.Linear
        or head.weight.dtype is not torch.float32
        or head.weight.device.type != "cpu"
        or not any(isinstance(module, QuantisedLinear) for module in model.model.layers.modules())
    ):
        return None
    try:
        return torch.ops.quantized.linear_prepack_fp16(head.weight.detach(), head.bias)
    except RuntimeError:  # no kernel for this CPU
        return None


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """As the module, in float32 too: ``sqrt(D) / sqrt(|x|^2 + D eps)``, in fewer operators."""
    wide, width = x.float(), x.shape[-1]
    floor, root = _roots(width, norm.eps, x.device)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = root / torch.hypot(length, floor)
    return (wide * scale).mul_(norm.weight.float()).to(x.dtype)


@lru_cache(maxsize=16)
def _roots(width: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """``sqrt(D eps)`` and ``sqrt(D)``: ``float32[]`` each."""
    floor, root = torch.tensor([(width * eps) ** 0.5, width**0.5], device=device)
    return floor, root
