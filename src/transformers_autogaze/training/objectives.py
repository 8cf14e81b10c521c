"""
What stage 1 minimises: losses of the next patches, and of what vision tokens should know about their frame.

This module owns the losses as functions of what the model returned. It knows nothing of trainers, files or searches.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from ..cells_autogaze import layer_of_patch
from ..composite_autogaze import CompositeReconstruction
from ..configuration_autogaze import AutoGazeConfig
from ..grid_autogaze import GazeGrid


_LEAST_GAIN = 1e-9  # a squared error, summed over the pixels of a frame
_NEVER = -1e9  # a logit; finite, so that a share of nothing times its logarithm is nothing


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor, gains: torch.Tensor | None = None) -> torch.Tensor:
    """
    Cross-entropy of every slot with its label.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, N, vocabulary)`): of each slot; the last is that of the end id.
        labels (`torch.LongTensor` of shape `(batch, N)`): ids counted from their frame, -100 where there is none.
        gains (`torch.FloatTensor` of shape `(batch, N, patches)`, *optional*):
            What each patch would gain there, `-inf` where it is kept already. Slots then choose out of the others, as
            in decoding; else out of the whole vocabulary, as published.

    Returns:
        `torch.FloatTensor` of shape `(batch, N)`; zeros where a slot has no label.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.training.objectives import next_token_losses

    >>> gains = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, -torch.inf]]])
    >>> next_token_losses(torch.zeros(1, 2, 5), torch.tensor([[3, 2]]), gains).exp()
    tensor([[4., 3.]])

    ```
    """
    is_label = labels != -100
    if gains is not None:
        logits = logits[..., :-1].masked_fill(gains == -torch.inf, -torch.inf)
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return -log_probs.masked_fill(~is_label, 0)


def gain_losses(logits: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """
    How far choices are from a share of the gains: the more a patch gains, the likelier it should be.

    A label names one patch of hundreds; this says of every one what it is worth.

    Args:
        logits (`torch.FloatTensor` of shape `(.., patches)`): of choosing each patch.
        gains (`torch.FloatTensor` of shape `(.., patches)`):
            By how much each lowers the error, `-inf` for those that cannot be chosen.

    Returns:
        `torch.FloatTensor` of shape `(..)`: Kullback-Leibler divergence from the gains as shares of their sum; zero
        where nothing gains.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.training.objectives import gain_losses

    >>> gains = torch.tensor([3.0, 1.0, 0.0, -torch.inf])
    >>> gain_losses(torch.tensor([3.0, 1.0, 1e-9, 5.0]).log(), gains).abs().round(decimals=5)
    tensor(0.)

    ```
    """
    shares = gains.clamp(min=0)
    # Relative to the largest first, since gains of a few pixels would vanish in single precision.
    shares = shares / shares.amax(-1, keepdim=True).clamp(min=_LEAST_GAIN)
    total = shares.sum(-1, keepdim=True)
    shares = shares / total.clamp(min=_LEAST_GAIN)
    log_probs = logits.masked_fill(gains == -torch.inf, _NEVER).log_softmax(-1)
    return (torch.special.xlogy(shares, shares) - shares * log_probs).sum(-1) * (total.squeeze(-1) > 0)


def regrets(logits: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """
    How much choosing by some logits gains less than the best patch, on average.

    Unlike [`gain_losses`] it counts what a wrong choice spoils: a coarse patch that is laid over detail has a negative gain.

    Args:
        logits (`torch.FloatTensor` of shape `(.., patches)`): of choosing each patch.
        gains (`torch.FloatTensor` of shape `(.., patches)`):
            By how much each lowers the error, `-inf` for those that cannot be chosen.

    Returns:
        `torch.FloatTensor` of shape `(..)`: in 0..2, in shares of the largest gain, what loses more than that counting
        as much; zero where nothing gains.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.training.objectives import regrets

    >>> regrets(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([2.0, 1.0, -torch.inf]))
    tensor(0.2500)

    ```
    """
    best = gains.amax(-1, keepdim=True)
    lost = (1 - gains / best.clamp(min=_LEAST_GAIN)).clamp(max=2).masked_fill(gains == -torch.inf, 0)
    probs = logits.masked_fill(gains == -torch.inf, _NEVER).softmax(-1)
    return (probs * lost).sum(-1) * (best.squeeze(-1) > 0)


def task_loss_errors(predicted: torch.Tensor, measured: torch.Tensor, caution: float = 0.5) -> torch.Tensor:
    """
    Squared errors of predicted task losses, those that promise too much and those that promise too little weighed apart.

    A predicted loss ends a frame. Where it is too low, the frame ends before it is good enough; where it is too high, some
    patches more are kept. Trained evenly it is the mean of what may come, so every other frame ends too early.

    Args:
        predicted (`torch.FloatTensor` of any shape): predicted losses.
        measured (`torch.FloatTensor` of the same shape): measured losses.
        caution (`float`, *optional*, defaults to 0.5):
            Share of the weight that predictions below the measured loss get, above 0 and below 1; 0.5 is the published loss.

    Returns:
        `torch.FloatTensor` of the same shape.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.training.objectives import task_loss_errors

    >>> task_loss_errors(torch.tensor([0.5, 1.5]), torch.tensor([1.0, 1.0]), caution=0.75)
    tensor([0.3750, 0.1250])

    ```
    """
    error = predicted - measured
    return 2 * torch.where(error < 0, caution, 1 - caution) * error.square()


def prefix_loss(
    hidden: torch.Tensor, weight: torch.Tensor, gains: torch.Tensor, is_seen: torch.Tensor
) -> torch.Tensor:
    """
    [`gain_losses`] of what vision tokens would choose of the part of the frame that they have seen.

    Only the last vision token of a frame is asked for patches while gazing. Asking all of them, each about the patches
    that end before it, gives the same weights many times the examples.

    Args:
        hidden (`torch.FloatTensor` of shape `(batch, frames, tokens, hidden)`): the decoder's last, of vision tokens.
        weight (`torch.FloatTensor` of shape `(rows * vocabulary, hidden)`): that of the `lm_head`; its first row counts.
        gains (`torch.FloatTensor` of shape `(batch, frames, patches)`): what each patch gains.
        is_seen (`torch.BoolTensor` of shape `(tokens, patches)`): see [`seen_patches`].

    Returns:
        `torch.FloatTensor` of shape `()`: averaged over the tokens that have seen as many patches as a step has rows.
    """
    num_patches = gains.shape[-1]
    num_rows = len(weight) // (num_patches + 1)
    asked = is_seen.sum(-1) >= num_rows
    logits = hidden[:, :, asked] @ weight[:num_patches].T
    return gain_losses(logits, gains[:, :, None].masked_fill(~is_seen[asked], -torch.inf)).mean()


def seen_patches(grid: GazeGrid, tokens: tuple[int, int]) -> torch.Tensor:
    """
    Tells which patches lie wholly in what a vision token and those before it show.

    Args:
        grid ([`GazeGrid`]): the patches.
        tokens (`tuple[int, int]`): rows and columns of vision tokens.

    Returns:
        `torch.BoolTensor` of shape `(tokens, patches)`.
    """
    rows, cols = tokens
    last = []
    for high, wide in grid.grids:
        bottom = (torch.arange(1, high + 1) * rows + high - 1) // high - 1
        right = (torch.arange(1, wide + 1) * cols + wide - 1) // wide - 1
        last.append((bottom[:, None] * cols + right).flatten())
    return torch.cat(last) <= torch.arange(rows * cols)[:, None]


class AttentionGains(nn.Module):
    """
    Tells how far the last layer's attention is from looking where patches gain most.

    A patch can only be named by a token that looks there, but nothing teaches a head to look before what it finds there
    is read, and nothing teaches that to be read before a head looks. So the looking is taught by itself: each head is
    given one scale, most of them the finest, and its attention from the tokens that choose is drawn to the squared gains
    of that scale, squared since few patches are chosen at once.

    Args:
        config ([`AutoGazeConfig`]): of the model.
    """

    def __init__(self, config: AutoGazeConfig):
        super().__init__()
        side = config.image_size // config.vision_config.patch_size
        self.num_rows = config.decoder_config.num_multi_token_pred
        self.scale_of_head = _scale_of_head(config)
        patches = _patch_of_token(config)
        patch_of_token = torch.stack([patches[scale] for scale in self.scale_of_head])
        self.register_buffer("patch_of_token", patch_of_token, persistent=False)  # (heads, tokens)
        num_tokens = side * side
        is_before = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        self.register_buffer("is_before", is_before[self.num_rows - 1 :], persistent=False)

    def forward(
        self,
        decoder: nn.Module,
        hidden: torch.Tensor,
        vision_places: torch.Tensor,
        slot_places: torch.Tensor,
        counts: torch.Tensor,
        is_padding: torch.Tensor,
        patch_gains: torch.Tensor,
        gains: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Gives the divergence, averaged over heads.

        Args:
            decoder (`nn.Module`): the model's Llama.
            hidden (`torch.FloatTensor` of shape `(batch, sequence, hidden)`): what its last layer reads.
            vision_places (`torch.LongTensor` of shape `(frames, tokens)`): where vision tokens stand in the sequence.
            slot_places (`torch.LongTensor` of shape `(N,)`): where slots stand.
            counts (`torch.LongTensor` of shape `(frames,)`): slots of each frame.
            is_padding (`torch.BoolTensor` of shape `(batch, N)`): slots that nobody sees.
            patch_gains (`torch.FloatTensor` of shape `(batch, frames, patches)`): what patches gain, laid first.
            gains (`torch.FloatTensor` of shape `(batch, N, patches)`): what they gain in each slot, see [`gain_losses`].

        Returns:
            `tuple`: for every slot that of its step, `(batch, N)`, and the average of vision tokens, which are asked
            like the last one of a frame, each about those before it, `()`.
        """
        is_real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        is_real[:, slot_places] = ~is_padding
        queries, keys = _queries_and_keys(decoder, -1, hidden, is_real)
        of_slots, of_tokens, start = [], [], 0
        for t, count in enumerate(counts.tolist()):
            vision, slots = vision_places[t], slice(start, start + count, self.num_rows)
            sources, end = slot_places[slots] - 1, int(slot_places[start]) + count
            scores = queries[:, :, sources] @ keys[:, :, :end].mT
            seen = is_real[:, None, None, :end] & (torch.arange(end, device=sources.device) <= sources[:, None])
            wanted = torch.zeros_like(scores)
            wanted[..., vision] = self._wanted(gains[:, slots]).to(scores)
            of_steps = gain_losses(scores, wanted.masked_fill(~seen, -torch.inf)).mean(1)
            of_slots.append(of_steps.repeat_interleave(self.num_rows, dim=1)[:, :count])
            scores = queries[:, :, vision[self.num_rows - 1 :]] @ keys[:, :, vision].mT
            wanted = self._wanted(patch_gains[:, t, None]).to(scores).expand_as(scores)
            of_tokens.append(gain_losses(scores, wanted.masked_fill(~self.is_before, -torch.inf)).mean())
            start += count
        return torch.cat(of_slots, dim=1), torch.stack(of_tokens).mean()

    def _wanted(self, gains: torch.Tensor) -> torch.Tensor:
        """Squares gains `(batch, n, patches)`, relative to their largest, for heads and tokens `(batch, heads, n, tokens)`."""
        wanted = gains[..., self.patch_of_token].clamp(min=0).transpose(1, 2)
        return (wanted / wanted.amax(-1, keepdim=True).clamp(min=_LEAST_GAIN)).square()


class PatchNames(nn.Module):
    """
    Tells how far what the last layer reads off a vision token is from naming the patches that hold it.

    Attention adds up what it reads, so the name of a patch is heard only as far as tokens say where they are, and nothing
    else. Each token says so by itself here, to the heads of each scale: its value, carried to the logits, is to be the
    more of a patch's the more the token is part of it. There are more patches than channels, so this is met in part only.

    Args:
        config ([`AutoGazeConfig`]): of the model.
    """

    def __init__(self, config: AutoGazeConfig):
        super().__init__()
        self.head_size = config.decoder_config.head_dim
        scale_of_head, patches = torch.tensor(_scale_of_head(config)), _patch_of_token(config)
        firsts = [0, *torch.tensor([rows * cols for rows, cols in config.grid.grids]).cumsum(0).tolist()]
        self.heads_and_patches = []
        for scale in scale_of_head.unique().tolist():
            # The coarsest patches have no head of their own; that of the next ones tells them too.
            first = 0 if scale == scale_of_head.min() else firsts[scale]
            self.heads_and_patches.append(((scale_of_head == scale).nonzero().flatten(), first, firsts[scale + 1]))
        belongs = torch.zeros(len(patches[0]), config.grid.num_patches)
        for patch in patches:
            belongs[torch.arange(len(patch)), patch] = 1
        self.register_buffer("belongs", belongs, persistent=False)  # (tokens, patches)

    def forward(self, decoder: nn.Module, lm_head: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """
        Gives one less the cosine of what the tokens of a clip name and where they belong, averaged over clips and scales.

        Args:
            decoder (`nn.Module`): the model's Llama.
            lm_head (`torch.FloatTensor` of shape `(rows * vocabulary, hidden)`): weight of the `lm_head`.
            hidden (`torch.FloatTensor` of shape `(batch, frames, tokens, hidden)`): what the last layer reads of vision tokens.

        Returns:
            `torch.FloatTensor` of shape `()`, in 0..2.
        """
        layer, size = decoder.layers[-1], self.head_size
        attention, num_patches = layer.self_attn, self.belongs.shape[1]
        names = lm_head.unflatten(0, (-1, num_patches + 1)).mean(0) * decoder.norm.weight
        values = attention.v_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, size))
        values = values.repeat_interleave(attention.num_key_value_groups, dim=-2)
        outputs = attention.o_proj.weight.unflatten(1, (-1, size))
        total = 0
        for heads, first, end in self.heads_and_patches:
            carried = values[..., heads, :].flatten(-2) @ outputs[:, heads].flatten(1).T
            # What all patches of a scale share does not tell them apart.
            told, wanted = carried @ names[first:end].T, self.belongs[:, first:end].to(carried)
            told, wanted = (part - part.mean(-1, keepdim=True) for part in (told, wanted))
            cosine = F.cosine_similarity(told.flatten(1), wanted.expand_as(told).flatten(1), dim=1)
            total = total + 1 - cosine.mean()
        return total / len(self.heads_and_patches)


class AttentionHistory(nn.Module):
    """
    Tells how far the attention of the first two layers is from following what has been shown.

    What a patch gains depends on what its place shows already, and that on patches chosen frames ago: two steps that
    nothing teaches apart. So each is taught by itself, to half of the heads. In the first layer the token of a chosen
    patch looks at the vision tokens that it shows, in the second a vision token looks at the patch that its place shows
    since, at itself where nothing was shown.

    Args:
        config ([`AutoGazeConfig`]): of the model.
    """

    def __init__(self, config: AutoGazeConfig):
        super().__init__()
        side = config.image_size // config.vision_config.patch_size
        composite = CompositeReconstruction(config.grid)
        # A token is looked at in points, each in one cell: its cells, or the nearest ones where they are no whole number.
        per_side = tuple(-(-count // side) for count in composite.cells)
        rows, cols = (
            (2 * torch.arange(side * count) + 1) * cells // (2 * side * count)
            for count, cells in zip(per_side, composite.cells, strict=True)
        )
        layers = layer_of_patch(config.grid, composite.cells).unflatten(-1, composite.cells)[:, rows][:, :, cols]
        layers = layers.unflatten(-1, (side, -1)).unflatten(1, (side, -1)).movedim(3, 2)
        layers = layers.flatten(3).flatten(1, 2)
        self.register_buffer("layers", layers, persistent=False)  # (patches + 1, tokens, points)
        self.num_heads = max(1, config.decoder_config.num_attention_heads // 2)
        self.depths = 0, min(1, config.decoder_config.num_hidden_layers - 1)

    def forward(
        self,
        decoder: nn.Module,
        hidden_states: tuple[torch.Tensor, ...],
        vision_places: torch.Tensor,
        slot_places: torch.Tensor,
        counts: torch.Tensor,
        is_padding: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """
        Gives the divergence, averaged over heads, tokens and frames, summed over the two layers.

        Args:
            decoder (`nn.Module`): the model's Llama.
            hidden_states (`tuple[torch.FloatTensor]` of shape `(batch, sequence, hidden)`): what its layers read.
            vision_places, slot_places, counts, is_padding (`torch.Tensor`): see [`AttentionGains`].
            ids (`torch.LongTensor` of shape `(batch, N)`): patches in the slots, counted from their frame.

        Returns:
            `torch.FloatTensor` of shape `()`
        """
        is_real = torch.ones(hidden_states[0].shape[:2], dtype=torch.bool, device=ids.device)
        is_real[:, slot_places] = ~is_padding
        (of_slots, seen), (of_tokens, asked) = (
            [part[:, : self.num_heads] for part in _queries_and_keys(decoder, depth, hidden_states[depth], is_real)]
            for depth in self.depths
        )
        laid = self.layers[ids.masked_fill(is_padding, len(self.layers) - 1)]  # (batch, N, tokens, points)
        covered = (laid > 0).to(of_slots).mean(-1)
        shown = vision_places.new_full((len(ids), *self.layers.shape[1:]), -1)  # the place of the slot, -1 for none
        total, start = 0, 0
        for t, count in enumerate(counts.tolist()):
            vision, slots = vision_places[t], slice(start, start + count)
            # A quarter of the tokens will do: which ones changes from frame to frame.
            some = torch.arange(t % 4, len(vision), 4, device=ids.device)
            keys = asked[:, :, : int(vision[-1]) + 1]
            scores = of_tokens[:, :, vision[some]] @ keys.mT
            looked = torch.where(shown < 0, vision[:, None], shown)[:, some]
            wanted = scores.new_zeros(len(ids), len(some), keys.shape[2])
            wanted.scatter_add_(2, looked, wanted.new_ones(looked.shape))
            unseen = torch.arange(keys.shape[2], device=ids.device) > vision[some, None]
            wanted = wanted.masked_fill(unseen | ~is_real[:, None, : keys.shape[2]], -torch.inf)
            total = total + gain_losses(scores, wanted[:, None]).mean()

            places = slot_places[slots]
            keys = seen[:, :, : int(places[-1]) + 1]
            scores = of_slots[:, :, places] @ keys.mT
            wanted = scores.new_zeros(len(ids), count, keys.shape[2])
            wanted[..., vision] = covered[:, slots]
            unseen = torch.arange(keys.shape[2], device=ids.device) > places[:, None]
            wanted = wanted.masked_fill(unseen | ~is_real[:, None, : keys.shape[2]], -torch.inf)
            losses, is_slot = gain_losses(scores, wanted[:, None]).mean(1), is_real[:, places]
            # A mean for each clip, so that it counts the same whatever shares its batch.
            total = total + ((losses * is_slot).sum(1) / is_slot.sum(1).clamp(min=1)).mean()

            layer, which = laid[:, slots].max(1)
            shown = torch.where(layer > 0, places[which], shown)
            start += count
        return total / len(counts)


def _scale_of_head(config: AutoGazeConfig) -> list[int]:
    """Gives each head of the last layer one scale: one to every coarser scale, but the coarsest, the others the finest."""
    num_scales, num_heads = len(config.scales), config.decoder_config.num_attention_heads
    spare = num_heads - max(num_scales - 1, 1)  # the coarsest has next to nothing to choose from
    return [max(0, num_scales - 1 - max(0, head - spare)) for head in range(num_heads)]


def _patch_of_token(config: AutoGazeConfig) -> list[torch.Tensor]:
    """Tells which patch of each scale every vision token is part of, `(tokens,)`."""
    side = config.image_size // config.vision_config.patch_size
    first, patches, at = 0, [], torch.arange(side)
    for rows, cols in config.grid.grids:
        patches.append((first + (at * rows // side)[:, None] * cols + at * cols // side).flatten())
        first += rows * cols
    return patches


def _queries_and_keys(
    decoder: nn.Module, depth: int, hidden: torch.Tensor, is_real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives what a layer of a Llama attends by, both `(batch, heads, sequence, head size)`."""
    layer = decoder.layers[depth]
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    queries, keys = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    positions = (is_real.cumsum(-1) - 1).clamp(min=0)
    queries, keys = apply_rotary_pos_emb(queries, keys, *decoder.rotary_emb(hidden, positions))
    return queries * attention.scaling, repeat_kv(keys, attention.num_key_value_groups)


class CellLossHeads(nn.Module):
    """
    Tells the task losses of the cells of a frame from its vision tokens, as the decoder reads them and half-way through.

    It is needed in training alone: it teaches the tokens early where patches are missing.

    Args:
        config ([`AutoGazeConfig`]): of the model whose tokens are read.
    """

    def __init__(self, config: AutoGazeConfig):
        super().__init__()
        side = config.image_size // config.vision_config.patch_size
        self.tokens = side, side
        cells = CompositeReconstruction(config.grid).cells
        # Where tokens do not hold a whole number of cells, each tells more than there are, and the nearest count.
        self.cells_in_token = tuple(-(-count // side) for count in cells)
        self.layers = (0, config.decoder_config.num_hidden_layers // 2)
        hidden, values = config.decoder_config.hidden_size, len(config.scales) * self.cells_in_token[0]
        self.heads = nn.ModuleList(nn.Linear(hidden, values * self.cells_in_token[1]) for _ in self.layers)

    def forward(self, hidden_states: tuple[torch.Tensor, ...], cell_losses: torch.Tensor) -> torch.Tensor:
        """
        Gives the mean squared error, summed over the two places that are read.

        Args:
            hidden_states (`tuple[torch.FloatTensor]` of shape `(batch, frames, tokens, hidden)`):
                Of the vision tokens: what the decoder reads, and what each layer makes of it.
            cell_losses (`torch.FloatTensor` of shape `(batch, frames, scales, *cells)`): as measured.
        """
        total = 0
        for layer, head in zip(self.layers, self.heads, strict=True):
            hidden = hidden_states[layer]
            told = head(F.rms_norm(hidden, hidden.shape[-1:])).flatten(0, 1)
            told = told.unflatten(-1, (cell_losses.shape[2], *self.cells_in_token)).unflatten(1, self.tokens)
            told = told.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
            if told.shape[-2:] != cell_losses.shape[-2:]:
                told = F.interpolate(told, cell_losses.shape[-2:])
            total = total + (told.float() - cell_losses.flatten(0, 1)).square().mean()
        return total
