"""
What a new model learns before all else: to know, from the patches chosen so far, what every place shows already.

This module owns that lesson, which the first half of the decoder can be taught alone: it asks for no choice of the model,
so its clips and their gazes are made once, and a step costs a tenth of a step of training. What the lesson is measured by
is in `objectives`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from ..composite_autogaze import CompositeReconstruction
from ..gazing_autogaze import GazeOutput
from ..modeling_autogaze import AutoGazeModel
from ..selection_autogaze import resize_frames
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .data import GazeCollator
from .labels import FrameValues, standing_frames
from .objectives import AttentionHistory, CellLossHeads


_HISTORY_LOSS_WEIGHT = 0.02  # of looking where it must; what is told counts the rest
_CLIPS_PER_STEP = 2
_WARMUP_STEPS = 50
_MOST_SCATTERED = 0.6  # share of a gaze that is replaced at random


def teach_history(
    model: AutoGazeModel,
    clips: Iterable[Mapping[str, Any]],
    num_steps: int,
    processor: AutoGazeVideoProcessor | None = None,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
) -> CellLossHeads:
    """
    Trains the first half of a model's decoder, in place, to tell the task losses of cells from what was chosen before.

    Args:
        model ([`AutoGazeModel`]): the model; only its embeddings of patches and the first half of its layers change.
        clips (`Iterable[Mapping]`):
            Items of a [`GazeClipDataset`] with a schedule. Each is used with its own gaze, and twice with a part of it
            replaced at random, since a model's own gazes will be no better.
        num_steps (`int`): steps, of two clips each; some hundred teach where to look, some thousand what is found there.
        processor ([`AutoGazeVideoProcessor`], *optional*): what made the pixel values; the published one by default.
        learning_rate (`float`, *optional*, defaults to 1.5e-3): falls to 0 over the second half of the steps.
        seed (`int`, *optional*, defaults to 0): where random numbers start from.

    Returns:
        [`CellLossHeads`] that read the losses off the model; training goes on with them.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_autogaze import AutoGazeConfig, AutoGazeModel
    >>> from transformers_autogaze.training import BudgetSchedule, GazeClipDataset
    >>> from transformers_autogaze.training.history import teach_history

    >>> model = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64))
    >>> videos = [np.zeros((9, 64, 64, 3), dtype=np.uint8)]
    >>> clips = GazeClipDataset(videos, model.config, num_frames=2, schedule=BudgetSchedule())
    >>> heads = teach_history(model, [clips[0]], num_steps=2)

    ```
    """
    processor, generator = processor or AutoGazeVideoProcessor(), torch.Generator().manual_seed(seed)
    decoder, implementation = model.gaze_decoder.model, model.config._attn_implementation
    history, heads = AttentionHistory(model.config).to(model.device), CellLossHeads(model.config).to(model.device)
    layers = decoder.layers[: max(heads.layers)]
    weights = [*layers.parameters(), *heads.parameters(), decoder.embed_tokens.weight]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / _WARMUP_STEPS) * min(1.0, 2 * (1 - step / num_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    # Sdpa alone is causal without a mask.
    model.set_attn_implementation("sdpa")
    lessons = [lesson for clip in clips for lesson in _lessons(model, clip, processor, generator)]
    for _ in tqdm(range(num_steps), desc="teaching history", unit="step"):
        for number in torch.randint(len(lessons), (_CLIPS_PER_STEP,), generator=generator).tolist():
            loss = _loss(model, history, heads, **lessons[number])
            grads = torch.autograd.grad(loss / _CLIPS_PER_STEP, weights)
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad if weight.grad is None else weight.grad + grad
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.set_attn_implementation(implementation)
    return heads


@torch.no_grad()
def _lessons(
    model: AutoGazeModel, clip: Mapping[str, Any], processor: AutoGazeVideoProcessor, generator: torch.Generator
) -> list[dict[str, torch.Tensor]]:
    """Gives, for the gaze of a clip and others like it, what [`_loss`] asks for."""
    config, device = model.config, model.device
    composite, rate = CompositeReconstruction(config.grid), config.frame_sampling_rate
    batch = {name: value.to(device) for name, value in GazeCollator(config)([clip]).items()}
    video, counts = batch["pixel_values_videos"], batch["num_gazing_each_frame"]
    vision, _ = model.embed_video(resize_frames(video, config.image_size))
    frames = resize_frames(video[:, ::rate].float(), config.grid.sizes[-1])
    pixels = processor.to_pixels(frames).clamp(0, 1)
    first = torch.arange(len(counts)).repeat_interleave(counts.cpu()) * config.grid.num_patches
    ids = batch["gazing_pos"].cpu() - first
    lessons = []
    for share in (0.0, *(_MOST_SCATTERED * torch.rand(2, generator=generator)).tolist()):
        scattered = [
            _scatter(part, share, config.grid.num_patches, generator) for part in ids[0].split(counts.tolist())
        ]
        chosen = torch.cat(scattered)[None]
        is_padding = torch.zeros_like(chosen, dtype=torch.bool)
        gaze = GazeOutput.from_ids((chosen + first).to(device), is_padding.to(device), counts, config.grid, rate)
        standing = standing_frames(composite, pixels, gaze.gazing_mask)
        cell_losses = FrameValues.measure(composite, pixels, standing).cell_losses
        lessons.append({"vision": vision, "ids": chosen.to(device), "counts": counts, "cell_losses": cell_losses})
    return lessons


def _scatter(ids: torch.Tensor, share: float, num_patches: int, generator: torch.Generator) -> torch.Tensor:
    """Replaces about a share of the patches of a frame by others."""
    kept = ids[torch.rand(len(ids), generator=generator) >= share]
    others = torch.randperm(num_patches, generator=generator)
    others = others[~torch.isin(others, kept)]
    if share:
        kept = torch.cat([kept, others[: len(ids) - len(kept)]])
        kept = kept[torch.randperm(len(ids), generator=generator)]
    return kept


def _loss(
    model: AutoGazeModel,
    history: AttentionHistory,
    heads: CellLossHeads,
    vision: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    cell_losses: torch.Tensor,
) -> torch.Tensor:
    """Gives the loss of one clip: vision tokens `(1, frames, tokens, hidden)` and patches `(1, N)`, from their frame on."""
    decoder = model.gaze_decoder.model
    vision_places, slot_places = model.token_places(counts)
    tokens = torch.cat([vision.flatten(1, 2), decoder.embed_tokens(ids)], dim=1)
    states = [tokens.index_select(1, torch.cat([vision_places.flatten(), slot_places]).argsort())]
    positions = torch.arange(states[0].shape[1], device=ids.device)[None]
    rotary = decoder.rotary_emb(states[0], positions)
    for layer in decoder.layers[: max(heads.layers)]:
        states.append(layer(states[-1], position_ids=positions, position_embeddings=rotary))
    is_padding = torch.zeros_like(ids, dtype=torch.bool)
    looking = history(decoder, tuple(states), vision_places, slot_places, counts, is_padding, ids)
    told = heads(tuple(state[:, vision_places] for state in states), cell_losses)
    return told + _HISTORY_LOSS_WEIGHT * looking
