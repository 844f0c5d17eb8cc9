"""CogVLM2: tower, adapter and decoder put together.

Shapes: ``B`` rows, ``L`` tokens, ``D`` width, ``V`` vocabulary, ``N`` images.

Sequence of a row with one image (placeholders take the image's features, in row-major order)::

    input_ids       bos  *    *  *  *  *    text text
    token_type_ids  0    1    1  1  1  1    0    0
                         boi  patches  eoi

Several images in a row are several such blocks.  Padding is on the left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..config import CogVLMConfig
from ..errors import InputError
from . import positions
from .half import saturated, widened
from .language import (
    DecoderLayer,
    RMSNorm,
    Step,
    ZeroLinear,
    inverse_frequencies,
    rotary_table,
)
from .positions import Route
from .vision import VisionModel

Images = Tensor | list[Tensor] | None

LOGITS = 1 << 25  # that the loss holds at one time: 134 MB in float32

# How layers are cut over processes, in transformers' words; see parallel.py.  A fused
# query_key_value is gathered, since a plain cut through it is no cut between heads.
VISION_CUTS = {
    "vision.transformer.layers.*.mlp.fc1": "colwise",
    "vision.transformer.layers.*.mlp.fc2": "rowwise",
    "vision.linear_proj.gate_proj": "colwise",
    "vision.linear_proj.dense_h_to_4h": "colwise",
    "vision.linear_proj.dense_4h_to_h": "rowwise",
}
_LAYER_CUTS = {
    "self_attn.language_expert_query_key_value": "colwise_gather_output",
    "self_attn.vision_expert_query_key_value": "colwise_gather_output",
    "self_attn.language_expert_dense": "rowwise_split_input",
    "self_attn.vision_expert_dense": "rowwise_split_input",
    "mlp.language_mlp.gate_proj": "colwise",
    "mlp.language_mlp.up_proj": "colwise",
    "mlp.language_mlp.down_proj": "rowwise",
    "mlp.vision_mlp.gate_proj": "colwise",
    "mlp.vision_mlp.up_proj": "colwise",
    "mlp.vision_mlp.down_proj": "rowwise",
}


class CogVLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every model here."""

    config_class = CogVLMConfig
    config: CogVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "VisionLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def device(self) -> torch.device:
        """Where inputs go: that of the weights, or of the hooks where weights lie elsewhere."""
        hook = getattr(self, "_hf_hook", None)
        where = getattr(hook, "execution_device", None)
        return torch.device(where) if where is not None else super().device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, ZeroLinear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def can_attend_alone(mask: Any) -> bool:
    """Whether one query can be taken out of a kernel's mask (flex attention's blocks cannot)."""
    return mask is None or isinstance(mask, Tensor)


class CogVLMModel(CogVLMPreTrainedModel):
    """Embeddings, tower and decoder; gives hidden states."""

    layer_class: type[DecoderLayer] = DecoderLayer  # a family may have its own
    vision_class: type[VisionModel] = VisionModel
    _tp_plan = {f"layers.*.{name}": style for name, style in _LAYER_CUTS.items()} | VISION_CUTS
    last_state_normed = True  # the last of all hidden states is the one after the final norm

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.layer_class(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = self.vision_class(config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: Tensor, types: Tensor | None, images: Images) -> Tensor:
        """Token embeddings with image features in place of the placeholders: ``float[B, L, D]``.

        Raises:
            InputError: the number of placeholders is not what the images give.
        """
        embeds: Tensor = self.embed_tokens(input_ids)
        wanted = 0 if types is None else int((types == 1).sum())
        if images is None or len(images) == 0:
            if wanted:
                raise InputError(f"{wanted} image tokens in input_ids, but no pixel_values")
            return embeds
        features = torch.cat(self.vision.encode(images))
        if wanted != len(features):
            raise InputError(
                f"{wanted} image tokens in input_ids, but the {len(images)} images give "
                f"{len(features)}; encode them together with the model's own processor"
            )
        assert types is not None
        place = (types == 1).to(embeds.device)[..., None]
        return embeds.masked_scatter(place, saturated(features.to(embeds)))

    def token_grids(self, images: Images) -> list[positions.Grid]:
        """Rows and columns of tokens of every image."""
        if images is None:
            return []
        vision = self.config.vision
        grids = [self.vision.grid(*image.shape[-2:]) for image in images]
        return [vision.token_grid(*grid) for grid in grids]

    def position_ids(self, types: Tensor, mask: Tensor | None, images: Images) -> Tensor:
        """Position ids of a whole prompt: ``int64[B, L]``, or ``int64[2, B, L]`` for RoPE-Tie."""
        kind = self.config.image_positions
        if kind == "shared":
            return positions.shared_positions(types, mask)
        if kind == "flat":
            return positions.flat_positions(types, mask)
        return positions.tie_positions(types, mask, self.token_grids(images))

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary tables ``[B, L, d]`` in the configured mode."""
        stored: Tensor = self.layers[0].self_attn.rotary_emb.inv_freq  # type: ignore[union-attr, assignment]
        if self.config.rotary == "float32":
            dim = self.config.head_dim
            assert dim is not None
            stored = inverse_frequencies(dim, self.config.rope_theta).to(stored.device)
        return rotary_table(stored, position_ids.to(stored.device), dtype)

    def packed_position_ids(self, types: Tensor, places: Tensor, images: Images) -> Tensor:
        """Position ids of sequences packed into rows: each has those it would have on its own."""
        lengths = positions.packed_lengths(places)
        apart = nn.utils.rnn.pad_sequence(list(types.flatten().split(lengths)), batch_first=True)
        found = self.position_ids(apart, None, images)
        pieces = [found[..., i, :length] for i, length in enumerate(lengths)]
        return torch.cat(pieces, dim=-1).view(*found.shape[:-2], *types.shape)

    def attention_mask(
        self,
        embeds: Tensor,
        types: Tensor | None,
        mask: Tensor | None,
        cache: Cache | None,
        places: Tensor | None = None,
    ) -> Any:
        """What the attention kernel takes; none where plain causal attention will do."""
        blocks = None
        if types is not None and embeds.shape[1] > 1 and self.config.image_attention == "full":
            blocks = positions.block_ids(types)
        if places is not None and "flash" in (self.config._attn_implementation or ""):
            raise InputError("packed sequences: this attention takes no mask; take sdpa")
        return create_causal_mask(
            self.config, embeds, mask, cache, position_ids=places, block_sequence_ids=blocks
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Images = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        last_only: bool = False,
        sequence_positions: Tensor | None = None,
        behind_picture: Tensor | None = None,
        **extra: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the given tokens.

        Args:
            input_ids: ``int64[B, L]``; placeholders stand where images go.
            token_type_ids: ``int64[B, L]``, 0 language, 1 image; none means all language.
            attention_mask: ``int64[B, past + L]``, 1 real, 0 padding.
            position_ids: of these tokens; needed when ``past_key_values`` holds any.
            pixel_values: ``float[N, 3, H, W]`` or a list of ``float[3, H, W]``, in order of
                appearance over the batch.
            inputs_embeds: ``float[B, L, D]`` instead of ``input_ids``, features put in.
            past_key_values: keys and values of earlier tokens; extended in place.
            use_cache: make a cache if none is given.
            output_hidden_states: also return the input of the first layer and the output of
                every layer, the last after the final norm.
            last_only: ``last_hidden_state`` is of the last token of each row alone,
                ``float[B, 1, D]``: what the last layer computes for the others is left out.
            sequence_positions: ``int64[B, L]`` where rows hold several sequences that do not see
                each other: the place of each token in its own, from 0.  Each ends with text;
                there is no padding and no cache.
            behind_picture: ``bool[B, L]`` or longer, of which the last ``L`` count: tokens of a
                picture or behind one, where ``past_key_values`` may hold it; without it
                ``token_type_ids`` tell.

        Raises:
            InputError: images and placeholders do not fit, or positions are missing.
        """
        types = token_type_ids
        if inputs_embeds is None:
            if input_ids is None:
                raise InputError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, types, pixel_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if types is None:
            types = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long)
            types = types.to(inputs_embeds.device)
        if position_ids is None:
            if past:
                raise InputError(f"{past} tokens are cached: give position_ids for the new ones")
            if sequence_positions is None:
                position_ids = self.position_ids(types, attention_mask, pixel_values)
            else:
                position_ids = self.packed_position_ids(types, sequence_positions, pixel_values)
        if sequence_positions is not None and (attention_mask is not None or past or use_cache):
            raise InputError("packed sequences take no attention_mask and no cache")
        cos, sin = self.rotary(position_ids, inputs_embeds.dtype)
        decoding = inputs_embeds.shape[1] == 1 or self.config.visual_expert == "none"
        experts = None if decoding else positions.expert_mask(types)
        route = Route.text(*inputs_embeds.shape[:2]) if experts is None else Route.of(experts)
        if getattr(self.config, "text_rank", None) is not None:  # GLM-4V has no such thing
            behind = behind_picture
            if behind is None:
                behind = positions.behind_picture(types, sequence_positions)
            behind = behind[:, -inputs_embeds.shape[1] :].to(inputs_embeds.device)
            route = route.marking(behind, inputs_embeds.dtype)
        kernel_mask = self.attention_mask(
            inputs_embeds, types, attention_mask, past_key_values, sequence_positions
        )
        step = Step(route, cos, sin, kernel_mask, past_key_values)
        step = self.extend_step(step, types, extra)
        inputs_embeds = widened(inputs_embeds)
        if last_only and not output_hidden_states and can_attend_alone(kernel_mask):
            return self.decode_last(inputs_embeds, step)
        out = self.decode(inputs_embeds, step, bool(output_hidden_states))
        if last_only:
            hidden = out.last_hidden_state
            assert hidden is not None
            out.last_hidden_state = hidden[:, -1:]
        return out

    def extend_step(self, step: Step, types: Tensor, extra: dict[str, Any]) -> Step:
        """What a family adds to what its layers share, from further arguments of ``forward``."""
        return step

    def decode_last(self, embeds: Tensor, step: Step) -> BaseModelOutputWithPast:
        """Run the decoder over ``float[B, L, D]`` for the last token of each row.

        Every layer but the last needs all tokens; the last one needs their keys and values only.
        """
        x = step.route.split(embeds)
        for layer in self.layers[:-1]:
            x = layer(x, step)
        last = self.norm(self.layers[-1](x, step, last=True))  # [B, D]
        return BaseModelOutputWithPast(last_hidden_state=last[:, None], past_key_values=step.cache)

    def decode(self, embeds: Tensor, step: Step, all_states: bool) -> BaseModelOutputWithPast:
        """Run the decoder layers over ``float[B, L, D]``."""
        x = step.route.split(embeds)
        states = [embeds]
        for layer in self.layers:
            x = layer(x, step)
            if all_states:
                states.append(step.route.join(x))
        last = step.route.join(self.norm(x))
        if all_states and self.last_state_normed:
            states[-1] = last
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=step.cache,
            hidden_states=tuple(states) if all_states else None,
        )


class CogVLMForCausalLM(CogVLMPreTrainedModel, GenerationMixin):
    """CogVLM2 with its head: logits, loss, ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    model_class: type[CogVLMModel] = CogVLMModel
    image_inputs: tuple[str, ...] = ("pixel_values",)  # arguments of forward that hold pictures

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Images = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with ``labels`` the loss; other arguments as :class:`CogVLMModel`.

        Args:
            labels: ``int64[B, L]``, -100 where nothing is predicted.  Logits are then computed
                at the places that predict a label only, and returned as none.
            logits_to_keep: the last so many positions get logits; 0 means all.
            num_items_in_batch: divides the summed loss instead of the number of labels here.
        """
        out = self.model(
            input_ids,
            token_type_ids,
            attention_mask,
            position_ids,
            pixel_values,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_hidden_states,
            last_only=logits_to_keep == 1 and labels is None,
            **kwargs,
        )
        hidden = out.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = self.answer_loss(hidden, labels, num_items_in_batch)
        else:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden).float()
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )

    def answer_loss(self, hidden: Tensor, labels: Tensor, count: int | Tensor | None) -> Tensor:
        """Mean cross-entropy of the labels, each predicted from the place before it.

        Many labels are taken some at a time, and the backward pass computes their logits again:
        of 4,096 answers of CogVLM2, those would be 2.1 GB, and their gradients as much.

        With no label at all it is zero, and still has a gradient (of zero).
        """
        row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # where the labels are
        truths = labels[:, 1:][row, column].to(hidden.device)
        asked = hidden[row.to(hidden.device), column.to(hidden.device)]  # [labels, D]
        step = max(1, LOGITS // self.lm_head.out_features)
        parts = list(zip(asked.split(step), truths.split(step), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            total = sum(checkpoint(self._loss_of, *part, use_reentrant=False) for part in parts)
        else:
            total = sum(self._loss_of(*part) for part in parts)
        loss: Tensor = total / (count if count is not None else max(1, len(truths)))
        return loss

    def _loss_of(self, hidden: Tensor, truths: Tensor) -> Tensor:
        """Summed cross-entropy of the places ``float[n, D]``."""
        return F.cross_entropy(self.lm_head(hidden).float(), truths, reduction="sum")

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        types = model_kwargs.get("token_type_ids")
        mask = model_kwargs.get("attention_mask")
        if types is None:
            types = torch.zeros_like(inputs_tensor if mask is None else mask)
        found: Tensor = self.model.position_ids(types, mask, model_kwargs.get("pixel_values"))
        return found

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        types = model_kwargs.pop("token_type_ids", None)
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if types is not None:  # what is generated is language, whatever the prompt ended with
            updated["token_type_ids"] = types = F.pad(types, (0, num_new_tokens))
            if getattr(self.config, "text_rank", None) is not None:  # GLM-4V has no such thing
                updated["behind_picture"] = positions.behind_picture(types)
        return updated

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        if expand_size > 1 and any(kwargs.get(name) is not None for name in self.image_inputs):
            raise InputError(
                "several sequences a prompt (num_beams, num_return_sequences) are not supported "
                "with images; repeat the prompt in the batch instead"
            )
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        rows: tuple[Tensor, dict[str, Any]] = expand(expand_size, *args, **kwargs)
        return rows
