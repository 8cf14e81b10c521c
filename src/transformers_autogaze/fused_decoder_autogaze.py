"""
The gaze decoder's arithmetic, made for many short reads.

This module owns what a layer computes and how its weights are joined; where keys and values are kept, and who attends to
whom, its callers say.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import eager_attention_forward


# Attends from query, with key and value of the new tokens, all `(clips, heads, new, head size)`, in a layer of some number;
# gives `(clips, new, heads * head size)`, in the last layer for one token of each clip.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_FEW_ROWS = 32  # queries of a head up to which attention by hand is quicker on a CPU


class FusedDecoder:
    """
    Runs the layers and heads of a gaze decoder on its own weights.

    It does what `LlamaModel` does: projections that share their input are one product, with weights laid out for few rows,
    and the last layer is computed for the one token whose hidden state is asked for. Weights are joined once, so an
    instance serves until they change.

    Args:
        decoder (`nn.Module`): the model's gaze decoder.
        implementation (`str`, *optional*): how it attends: `"eager"`, or sdpa for everything else.
    """

    def __init__(self, decoder: nn.Module, implementation: str | None):
        self.decoder, self.model = decoder, decoder.model
        self.is_eager = implementation == "eager"
        self.layers = [
            (
                layer,
                _product_of_normed(
                    layer.input_layernorm, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
                ),
                _sum_with_product(layer.self_attn.o_proj),
                _product_of_normed(layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj),
                _sum_with_product(layer.mlp.down_proj),
            )
            for layer in self.model.layers
        ]
        self.last = len(self.layers) - 1
        self._heads = _fused_weight(decoder.lm_head, decoder.task_loss_prediction_head)
        self._scores = self.weight.new_empty(0)

    @property
    def weight(self) -> torch.Tensor:
        """The embeddings of the patch ids, whose device and dtype are those of everything."""
        return self.model.embed_tokens.weight

    @property
    def is_fused(self) -> bool:
        """Whether all weights could be joined, so that nothing but them is computed with."""
        linear = [module for module in self.decoder.modules() if hasattr(module, "weight") and module.weight.ndim == 2]
        return all(type(module) in (nn.Linear, nn.Embedding) for module in linear)

    def heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives logits `(clips, k, vocabulary)` and predicted losses `(clips, k)` of hidden states `(clips, hidden)`."""
        if self._heads is None:
            return self.decoder.heads(hidden)
        both = hidden @ self._heads
        num_rows = self.decoder.num_rows
        return both[:, :-num_rows].unflatten(-1, (num_rows, -1)), both[:, -num_rows:]

    def rotations(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives cosines and sines `(clips, new, head size)` of positions `(clips, new)`."""
        cos, sin = self.model.rotary_emb(self.weight, position_ids=positions)
        # Rotating turns (a, b) into (-b, a); the sign is put into the sines instead.
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
        Gives the hidden state `(clips, hidden)` of one of each clip's new tokens `(clips, new, hidden)`.

        `rotations` are `(clips, new, head size)`, of one clip where all are equal; `take_last` picks that token out of
        hidden states, `(clips, 1, hidden)`.
        """
        cos, sin = (table[:, :, None] for table in rotations)
        hidden = tokens
        for index, (layer, project_qkv, add_attended, project_gate_up, add_projected) in enumerate(self.layers):
            attention = layer.self_attn
            key_heads = attention.config.num_key_value_heads
            projected = project_qkv(hidden).unflatten(-1, (-1, attention.head_dim))
            rotated, value = projected[:, :, :-key_heads], projected[:, :, -key_heads:].transpose(1, 2)
            rotated = torch.addcmul(rotated * cos, rotated.roll(attention.head_dim // 2, dims=-1), sin)
            query, key = rotated[:, :, :-key_heads].transpose(1, 2), rotated[:, :, -key_heads:].transpose(1, 2)
            attended = attend(index, query, key, value)
            if index == self.last:
                hidden = take_last(hidden)
            hidden = add_attended(hidden, attended)
            gate, up = project_gate_up(hidden).chunk(2, dim=-1)
            hidden = add_projected(hidden, layer.mlp.act_fn(gate) * up)
        return self.model.norm(hidden[:, 0])

    def attend(
        self, index: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Attends in a layer from queries `(clips, heads, new, head size)` to keys and values `(clips, heads, seen, head size)`.

        `mask` is 0 or -inf, `(clips or 1, 1, new, seen)`. Gives `(clips, new, heads * head size)`.
        """
        attention = self.layers[index][0].self_attn
        if self.is_eager:
            return eager_attention_forward(attention, query, keys, values, mask, scaling=attention.scaling)[0].flatten(
                2
            )
        attended = F.scaled_dot_product_attention(
            query, keys, values, mask, scale=attention.scaling, enable_gqa=attention.num_key_value_groups > 1
        )
        return attended.transpose(1, 2).flatten(2)

    def prefers_few(self, query: torch.Tensor, keys: torch.Tensor) -> bool:
        """Tells whether `attend_few` is quicker for queries and keys, both `(clips, heads, .., head size)`."""
        is_precise = query.dtype == keys.dtype and keys.dtype in (torch.float32, torch.float64)
        rows = query.shape[1] // keys.shape[1] * query.shape[2]
        return keys.device.type == "cpu" and is_precise and rows <= _FEW_ROWS and not self.is_eager

    def attend_few(
        self, index: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `attend`, with scores in memory that is used again; `mask` is `(new, new)`, of the newest keys alone."""
        clips, heads, new, size = query.shape
        seen, rows = keys.shape[2], clips * heads * new
        if len(self._scores) < rows * seen:
            self._scores = query.new_empty(rows * seen * 3 // 2)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        query = (query * self.layers[index][0].self_attn.scaling).reshape(len(keys), -1, size)
        scores = self._scores[: rows * seen].view(len(keys), -1, seen)
        torch.bmm(query, keys.transpose(1, 2), out=scores)
        if mask is not None:
            scores.view(-1, new, seen)[..., seen - new :] += mask
        torch.softmax(scores, dim=-1, out=scores)
        return torch.bmm(scores, values).view(clips, heads, new, size).transpose(1, 2).flatten(2)


def _product_of_normed(norm: nn.Module, *projections: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes one product of projections of the same input, normalised first."""
    weight = _fused_weight(*projections)
    if weight is None:
        return lambda hidden: _each(norm(hidden), projections)
    if weight.dtype not in (torch.float32, torch.float64):
        return lambda hidden: norm(hidden) @ weight
    # With n numbers in a row x, x / sqrt(|x|^2 / n + eps) is x / hypot(|x|, sqrt(n * eps)) times sqrt(n). That and the
    # norm's own weights go into the product's, which leaves three quick operations of the norm.
    size = len(weight)
    floor = weight.new_tensor(math.sqrt(size * norm.variance_epsilon))
    weight = norm.weight[:, None] * weight * math.sqrt(size)
    return lambda hidden: (
        (hidden / torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), floor)) @ weight
    )


def _sum_with_product(projection: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Makes one operation of a projection and of adding it to something."""
    weight = _fused_weight(projection)
    if weight is None:
        return lambda hidden, inputs: hidden + projection(inputs)
    return lambda hidden, inputs: torch.addmm(hidden.flatten(0, 1), inputs.flatten(0, 1), weight).view_as(hidden)


def _each(inputs: torch.Tensor, projections: Sequence[nn.Module]) -> torch.Tensor:
    return torch.cat([projection(inputs) for projection in projections], dim=-1)


def _fused_weight(*projections: nn.Module) -> torch.Tensor | None:
    """Joins the weights of projections of the same input; `None` where adapted or quantised ones must be asked."""
    if any(type(projection) is not nn.Linear or projection.bias is not None for projection in projections):
        return None
    # On a CPU, a product of few rows is up to twice as fast with the weight laid out this way round.
    return torch.cat([projection.weight for projection in projections]).T.contiguous()
