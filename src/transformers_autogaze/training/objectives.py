"""
What stage 1 minimises: losses of the next patches, and of what vision tokens should know about their frame.

This module owns the losses as functions of what the model returned. It knows nothing of trainers, files or searches.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..composite_autogaze import CompositeReconstruction
from ..configuration_autogaze import AutoGazeConfig
from ..grid_autogaze import GazeGrid


def slot_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    gazing_pos: torch.Tensor,
    counts: torch.Tensor,
    num_rows: int,
    whole_steps: bool = True,
) -> torch.Tensor:
    """
    Cross-entropy of every slot with what it is to predict.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, N, vocabulary)`): of each slot; the last is that of the end id.
        labels (`torch.LongTensor` of shape `(batch, N)`): ids counted from their frame, -100 where there is none.
        gazing_pos (`torch.LongTensor` of shape `(batch, N)`):
            What the model saw chosen: ids counted from their frame, the end id where a slot is padding.
        counts (`torch.LongTensor` of shape `(frames,)`): slots of each frame; their sum is `N`.
        num_rows (`int`): slots of a step; steps begin anew with every frame.
        whole_steps (`bool`, *optional*, defaults to `True`):
            Whether all slots of a step are to predict all its labels alike, out of the patches that no earlier step of
            the frame has chosen; a step then is a set, as which it is decoded. Else each predicts its own label, out of
            the whole vocabulary, as published.

    Returns:
        `torch.FloatTensor` of shape `(batch, N)`; zeros where a slot has no label.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.training.objectives import slot_losses

    >>> labels = torch.tensor([[0, 3, 2]])
    >>> slot_losses(torch.zeros(1, 3, 5), labels, labels, torch.tensor([3]), num_rows=2).exp()
    tensor([[4., 4., 2.]])

    ```
    """
    is_label, device = labels != -100, labels.device
    if not whole_steps:
        log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return -log_probs.masked_fill(~is_label, 0)
    counts = counts.to(device)
    frame = torch.arange(len(counts), device=device).repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts)[frame]
    slot = torch.arange(len(frame), device=device)
    step = (slot - starts) // num_rows

    # In which step each id was chosen; the end id, which is never proposed, counts as chosen before all.
    batch, _, vocabulary = logits.shape
    chosen_in = torch.full((batch, len(counts) * vocabulary), len(slot), device=device)
    chosen_in.scatter_reduce_(1, gazing_pos + frame * vocabulary, step.expand(batch, -1), "amin")
    chosen_in = chosen_in.view(batch, len(counts), vocabulary)
    chosen_in[..., -1] = -1
    log_probs = logits.masked_fill(chosen_in[:, frame] < step[:, None], -torch.inf).log_softmax(-1)

    places = (starts + step * num_rows)[:, None] + torch.arange(num_rows, device=device)
    in_frame = places < (starts + counts[frame])[:, None]
    in_step = labels[:, places.clamp(max=len(slot) - 1)].masked_fill(~in_frame, -100)
    log_probs = log_probs.gather(-1, in_step.clamp(min=0))
    # Where nothing gains any more, a search may name what was chosen before.
    counted = (in_step != -100) & log_probs.isfinite()
    total = -log_probs.masked_fill(~counted, 0).sum(-1)
    return (total / counted.sum(-1).clamp(min=1)).masked_fill(~is_label, 0)


def prefix_loss(
    hidden: torch.Tensor, weight: torch.Tensor, gains: torch.Tensor, is_seen: torch.Tensor
) -> torch.Tensor:
    """
    Cross-entropy of what vision tokens take for the best patches of the part of the frame that they have seen.

    Only the last vision token of a frame is asked for patches while gazing. Asking all of them, each about the patches
    that end before it, gives the same weights many times the examples.

    Args:
        hidden (`torch.FloatTensor` of shape `(batch, frames, tokens, hidden)`): the decoder's last, of vision tokens.
        weight (`torch.FloatTensor` of shape `(rows * vocabulary, hidden)`): that of the `lm_head`; its first row counts.
        gains (`torch.FloatTensor` of shape `(batch, frames, patches)`): what each patch gains.
        is_seen (`torch.BoolTensor` of shape `(tokens, patches)`): see [`seen_patches`].

    Returns:
        `torch.FloatTensor` of shape `()`: with the patches that gain most, as many as a step has rows, alike; averaged
        over the tokens that have seen that many.
    """
    num_patches = gains.shape[-1]
    num_rows = len(weight) // (num_patches + 1)
    asked = is_seen.sum(-1) >= num_rows
    is_seen = is_seen[asked]
    best = gains[:, :, None].masked_fill(~is_seen, -torch.inf).topk(num_rows, dim=-1)
    logits = (hidden[:, :, asked] @ weight[:num_patches].T).masked_fill(~is_seen, -torch.inf)
    counted = best.values > 0
    log_probs = logits.log_softmax(-1).gather(-1, best.indices).masked_fill(~counted, 0)
    return (-log_probs.sum(-1) / counted.sum(-1).clamp(min=1)).mean()


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
