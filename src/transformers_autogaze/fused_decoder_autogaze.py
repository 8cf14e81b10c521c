"""
The gaze decoder, and its layers and heads with fused weights, for reading few tokens at a time.

Callers of the fused decoder provide the attention, and with it the key-value cache and the mask.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeGuard, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, eager_attention_forward

from .configuration_autogaze import AutoGazeDecoderConfig


# Takes the index of a layer, and query, key and value of the new tokens, all `(heads, clips, new, head size)`. Returns the
# attention output `(clips * new, heads * head size)`, in the last layer of one token per clip.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class AutoGazeDecoder(nn.Module):
    """A Llama that predicts the logits of the next `k` patches and the loss before each of them."""

    def __init__(self, config: AutoGazeDecoderConfig):
        super().__init__()
        self.step_size = config.num_multi_token_pred
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size * self.step_size, bias=False)
        self.task_loss_prediction_head = nn.Linear(config.hidden_size, self.step_size, bias=False)

    def heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits `(.., k, vocabulary)` and predicted losses `(.., k)` of hidden states `(.., hidden)`."""
        return self.lm_head(hidden).unflatten(-1, (self.step_size, -1)), self.task_loss_prediction_head(hidden)


class FusedDecoder:
    """
    Runs the layers and heads of a gaze decoder with fused weights.

    The result is that of `LlamaModel`. Projections of the same input are one matrix product, and the last layer is computed
    for the last token of each clip only. Weights are fused once, so a new instance is needed after they change.

    Args:
        decoder ([`AutoGazeDecoder`]): the model's gaze decoder.
        implementation (`str`, *optional*): attention implementation: `"eager"`; anything else means sdpa.
        like (`torch.Tensor`, *optional*):
            A tensor with the device and dtype of the hidden states; by default the embeddings of the patch ids.
    """

    def __init__(self, decoder: AutoGazeDecoder, implementation: str | None, like: torch.Tensor | None = None):
        self.decoder, self.model = decoder, decoder.model
        self.like = (self.model.embed_tokens.weight if like is None else like).new_empty(0)
        self.is_eager = implementation == "eager"
        self.layers = [
            (
                layer,
                _fused_projections(
                    layer.self_attn.head_dim,
                    layer.input_layernorm,
                    layer.self_attn.q_proj,
                    layer.self_attn.k_proj,
                    layer.self_attn.v_proj,
                ),
                _fused_residual(layer.self_attn.o_proj),
                _fused_projections(
                    layer.mlp.intermediate_size,
                    layer.post_attention_layernorm,
                    layer.mlp.gate_proj,
                    layer.mlp.up_proj,
                ),
                _fused_residual(layer.mlp.down_proj),
            )
            for layer in cast(Iterable[LlamaDecoderLayer], self.model.layers)
        ]
        self.last = len(self.layers) - 1
        config = self.model.config
        self.num_heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.scaling = self.layers[0][0].self_attn.scaling
        self._project_heads = self._fused_heads()

    @property
    def is_fused(self) -> bool:
        """Whether all weights are plain ones, and so are fused."""
        linear = [module for module in self.decoder.modules() if hasattr(module, "weight") and module.weight.ndim == 2]
        return all(type(module) in (nn.Linear, nn.Embedding) and not module.weight.is_meta for module in linear)

    def heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits `(clips, k, vocabulary)` and predicted losses `(clips, k)` of the output of `read`."""
        if self._project_heads is None:
            return self.decoder.heads(self.model.norm(hidden))
        both = self._project_heads(hidden)
        both = both.unflatten(-1, (-1, self.model.config.vocab_size + 1)).transpose(0, 1).flatten(1, 2)
        return both[..., :-1], both[..., -1]

    def _fused_heads(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Fuses both heads into one product, in parts that the CPU cores can share."""
        heads, step_size = (self.decoder.lm_head, self.decoder.task_loss_prediction_head), self.decoder.step_size
        if not _are_plain(heads):
            return None
        weight = torch.cat([head.weight.unflatten(0, (step_size, -1)) for head in heads], dim=1).flatten(0, 1)
        num_parts = math.gcd(step_size, torch.get_num_threads())
        return _normed_product(self.model.norm, weight.T, len(weight) // num_parts)

    def rotations(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines `(clips, new, head size)` of positions `(clips, new)`."""
        cos, sin = self.model.rotary_emb(self.like, position_ids=positions)
        # `rotate_half` maps (a, b) to (-b, a); with the sign in the sines, `read` only has to roll.
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def read(
        self,
        tokens: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
        take_last: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """
        Runs the layers on tokens.

        Args:
            tokens (`torch.FloatTensor` of shape `(clips, new, hidden)`): embeddings of the new tokens.
            rotations (`tuple[torch.FloatTensor, torch.FloatTensor]` of shape `(clips or 1, new, head size)`):
                Cosines and sines, as `rotations` returns them.
            attend (`Attend`): the attention.
            take_last (`Callable`): selects one token of each clip, `(clips, new, hidden)` to `(clips, hidden)`.

        Returns:
            `torch.FloatTensor` of shape `(clips, hidden)`: its hidden state before the final norm, which `heads` applies.
        """
        cos, sin = rotations
        clips, new, _ = tokens.shape
        hidden = tokens.flatten(0, 1)
        for index, (layer, project_heads, add_attended, project_gate_up, add_projected) in enumerate(self.layers):
            heads = project_heads(hidden)
            heads = heads.view(len(heads), clips, new, -1)
            rotated, value = heads.split((len(heads) - self.key_heads, self.key_heads))
            rotated = torch.addcmul(rotated * cos, rotated.roll(rotated.shape[-1] // 2, dims=-1), sin)
            query, key = rotated.split((len(rotated) - self.key_heads, self.key_heads))
            attended = attend(index, query, key, value)
            if index == self.last:
                hidden = take_last(hidden.view(clips, new, -1))
            hidden = add_attended(hidden, attended)
            gate, up = project_gate_up(hidden)
            hidden = add_projected(hidden, layer.mlp.act_fn(gate) * up)
        return hidden

    def attend(
        self, index: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Computes the attention of a layer.

        Args:
            index (`int`): index of the layer.
            query (`torch.FloatTensor` of shape `(heads, clips, new, head size)`): queries.
            keys, values (`torch.FloatTensor` of shape `(key/value heads, clips, seen, head size)`): keys and values.
            mask (`torch.FloatTensor` of shape `(clips or 1, 1, new, seen)`, *optional*): 0 or -inf.

        Returns:
            `torch.FloatTensor` of shape `(clips * new, heads * head size)`.
        """
        attention = self.layers[index][0].self_attn
        query, keys, values = (heads.transpose(0, 1) for heads in (query, keys, values))
        if self.is_eager:
            attended = eager_attention_forward(attention, query, keys, values, mask, scaling=attention.scaling)[0]
        else:
            attended = F.scaled_dot_product_attention(
                query, keys, values, mask, scale=attention.scaling, enable_gqa=attention.num_key_value_groups > 1
            ).transpose(1, 2)
        return attended.flatten(2).flatten(0, 1)


def _fused_projections(
    width: int, norm: LlamaRMSNorm, *projections: nn.Module
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Fuses a norm and projections into one function of `(tokens, hidden)`, which returns `(parts, tokens, width)`."""
    weight = _fused_weight(*projections)
    if weight is None:
        return lambda hidden: _in_parts(_project_each(norm(hidden), projections), width)
    return _normed_product(norm, weight, width)


def _normed_product(norm: LlamaRMSNorm, weight: torch.Tensor, width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Fuses a norm and a weight into one function of `(tokens, hidden)`, which returns `(parts, tokens, width)`."""
    if weight.dtype not in (torch.float32, torch.float64):
        return lambda hidden: _in_parts(norm(hidden) @ weight, width)
    # For x of size n, RMSNorm's x / sqrt(|x|^2 / n + eps) is sqrt(n) * x / hypot(|x|, sqrt(n * eps)). The factor and the
    # norm's own weight are multiplied into the projection's weight, which leaves three fast operations of the norm.
    size = len(weight)
    floor = weight.new_tensor(math.sqrt(size * norm.variance_epsilon))
    weight = norm.weight[:, None] * weight * math.sqrt(size)

    def normalise(hidden: torch.Tensor) -> torch.Tensor:
        return hidden / torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), floor)

    if weight.device.type != "cpu":
        return lambda hidden: _in_parts(normalise(hidden) @ weight, width)
    # One small product per part is shared better by the CPU cores, and gives contiguous parts.
    weight = weight.unflatten(1, (-1, width)).transpose(0, 1).contiguous()
    return lambda hidden: torch.bmm(normalise(hidden).expand(len(weight), -1, -1), weight)


def _in_parts(product: torch.Tensor, width: int) -> torch.Tensor:
    return product.unflatten(-1, (-1, width)).movedim(-2, 0)


def _fused_residual(projection: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Fuses a projection and the addition to the residual stream into one operation."""
    weight = _fused_weight(projection)
    if weight is None:
        return lambda hidden, inputs: hidden + projection(inputs)
    return lambda hidden, inputs: torch.addmm(hidden, inputs, weight)


def _project_each(inputs: torch.Tensor, projections: Sequence[nn.Module]) -> torch.Tensor:
    return torch.cat([projection(inputs) for projection in projections], dim=-1)


def _fused_weight(*projections: nn.Module) -> torch.Tensor | None:
    """Joins the weights of projections; `None` where adapted, quantised or offloaded ones must be called instead."""
    if not _are_plain(projections):
        return None
    # On a CPU, a product of few tokens is up to twice as fast with the transposed weight contiguous.
    return torch.cat([projection.weight for projection in projections]).T.contiguous()


def _are_plain(projections: Sequence[nn.Module]) -> TypeGuard[Sequence[nn.Linear]]:
    return all(
        type(projection) is nn.Linear and projection.bias is None and not projection.weight.is_meta
        for projection in projections
    )
