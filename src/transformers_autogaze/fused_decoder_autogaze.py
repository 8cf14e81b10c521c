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


# Attends from query, with key and value of the new tokens, all `(heads, clips, new, head size)`, in a layer of some number;
# gives `(clips * new, heads * head size)`, in the last layer for one token of each clip.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class FusedDecoder:
    """
    Runs the layers and heads of a gaze decoder on its own weights.

    It does what `LlamaModel` does: projections that share their input are one product, with weights laid out for few rows,
    and the last layer is computed for the one token whose hidden state is asked for. Weights are joined once, so an
    instance serves until they change.

    Args:
        decoder (`nn.Module`): the model's gaze decoder.
        implementation (`str`, *optional*): how it attends: `"eager"`, or sdpa for everything else.
        like (`torch.Tensor`, *optional*):
            A tensor on the device and of the dtype that hidden states have; the embeddings of the patch ids if not given.
    """

    def __init__(self, decoder: nn.Module, implementation: str | None, like: torch.Tensor | None = None):
        self.decoder, self.model = decoder, decoder.model
        self.like = (self.model.embed_tokens.weight if like is None else like).new_empty(0)
        self.is_eager = implementation == "eager"
        self.layers = [
            (
                layer,
                _parts_of_product(
                    layer.self_attn.head_dim,
                    layer.input_layernorm,
                    layer.self_attn.q_proj,
                    layer.self_attn.k_proj,
                    layer.self_attn.v_proj,
                ),
                _sum_with_product(layer.self_attn.o_proj),
                _parts_of_product(
                    layer.mlp.intermediate_size,
                    layer.post_attention_layernorm,
                    layer.mlp.gate_proj,
                    layer.mlp.up_proj,
                ),
                _sum_with_product(layer.mlp.down_proj),
            )
            for layer in self.model.layers
        ]
        self.last = len(self.layers) - 1
        config = self.model.config
        self.num_heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.scaling = self.layers[0][0].self_attn.scaling
        self._project_rows = self._joined_heads()

    @property
    def is_fused(self) -> bool:
        """Whether all weights could be joined, so that nothing but them is computed with."""
        linear = [module for module in self.decoder.modules() if hasattr(module, "weight") and module.weight.ndim == 2]
        return all(type(module) in (nn.Linear, nn.Embedding) and not module.weight.is_meta for module in linear)

    def heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives logits `(clips, k, vocabulary)` and predicted losses `(clips, k)` of what `read` gives."""
        if self._project_rows is None:
            return self.decoder.heads(self.model.norm(hidden))
        both = self._project_rows(hidden)
        both = both.unflatten(-1, (-1, self.model.config.vocab_size + 1)).transpose(0, 1).flatten(1, 2)
        return both[..., :-1], both[..., -1]

    def _joined_heads(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Makes one product of both heads, row by row, in as many parts as cores can share."""
        heads, num_rows = (self.decoder.lm_head, self.decoder.task_loss_prediction_head), self.decoder.num_rows
        if not _are_plain(heads):
            return None
        weight = torch.cat([head.weight.unflatten(0, (num_rows, -1)) for head in heads], dim=1).flatten(0, 1)
        num_parts = math.gcd(num_rows, torch.get_num_threads())
        return _normed_product(self.model.norm, weight.T, len(weight) // num_parts)

    def rotations(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives cosines and sines `(clips, new, head size)` of positions `(clips, new)`."""
        cos, sin = self.model.rotary_emb(self.like, position_ids=positions)
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
        Gives the hidden state `(clips, hidden)`, which `heads` normalises, of one of each clip's tokens `(clips, new, hidden)`.

        `rotations` are `(clips, new, head size)`, of one clip where all are equal; `take_last` picks that token out of
        hidden states `(clips, new, hidden)`.
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
        Attends in a layer from queries `(heads, clips, new, head size)` to keys and values `(heads, clips, seen, head size)`.

        `mask` is 0 or -inf, `(clips or 1, 1, new, seen)`. Gives `(clips * new, heads * head size)`.
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


def _parts_of_product(width: int, norm: nn.Module, *projections: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes one product of projections of rows, normalised first, that gives parts `(parts, rows, width)` of it."""
    weight = _fused_weight(*projections)
    if weight is None:
        return lambda hidden: _in_parts(_each(norm(hidden), projections), width)
    return _normed_product(norm, weight, width)


def _normed_product(norm: nn.Module, weight: torch.Tensor, width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes the product of rows, normalised first, and a weight, in parts `(parts, rows, width)`."""
    if weight.dtype not in (torch.float32, torch.float64):
        return lambda hidden: _in_parts(norm(hidden) @ weight, width)
    # With n numbers in a row x, x / sqrt(|x|^2 / n + eps) is x / hypot(|x|, sqrt(n * eps)) times sqrt(n). That and the
    # norm's own weights go into the product's, which leaves three quick operations of the norm.
    size = len(weight)
    floor = weight.new_tensor(math.sqrt(size * norm.variance_epsilon))
    weight = norm.weight[:, None] * weight * math.sqrt(size)

    def normalise(hidden: torch.Tensor) -> torch.Tensor:
        return hidden / torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), floor)

    if weight.device.type != "cpu":
        return lambda hidden: _in_parts(normalise(hidden) @ weight, width)
    # As one small product for each part, the cores share the work better and the parts lie as they are needed.
    weight = weight.unflatten(1, (-1, width)).transpose(0, 1).contiguous()
    return lambda hidden: torch.bmm(normalise(hidden).expand(len(weight), -1, -1), weight)


def _in_parts(product: torch.Tensor, width: int) -> torch.Tensor:
    return product.unflatten(-1, (-1, width)).movedim(-2, 0)


def _sum_with_product(projection: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Makes one operation of a projection and of adding it to something."""
    weight = _fused_weight(projection)
    if weight is None:
        return lambda hidden, inputs: hidden + projection(inputs)
    return lambda hidden, inputs: torch.addmm(hidden, inputs, weight)


def _each(inputs: torch.Tensor, projections: Sequence[nn.Module]) -> torch.Tensor:
    return torch.cat([projection(inputs) for projection in projections], dim=-1)


def _fused_weight(*projections: nn.Module) -> torch.Tensor | None:
    """Joins the weights of projections of the same input; `None` where adapted, quantised or offloaded ones must be asked."""
    if not _are_plain(projections):
        return None
    # On a CPU, a product of few rows is up to twice as fast with the weight laid out this way round.
    return torch.cat([projection.weight for projection in projections]).T.contiguous()


def _are_plain(projections: Sequence[nn.Module]) -> bool:
    return all(
        type(projection) is nn.Linear and projection.bias is None and not projection.weight.is_meta
        for projection in projections
    )
