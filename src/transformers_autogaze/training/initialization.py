"""
Where training starts: weights that look at pixels and point at patches before anything is learned.

From random weights a model first learns which patches are good on average, and long nothing else: where detail is lost
can be read off the pixels only through products of small weights, and what the last layer finds where it looks is no
patch's name yet, so neither gives the other a gradient. This module owns a start at which both work: filters whose
strength is detail, a readout of it by least squares, positions as waves, heads that look at their own place, and heads
that carry positions to the names of patches. What is worth looking at is left to training.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..composite_autogaze import CompositeReconstruction
from ..modeling_autogaze import AutoGazeModel
from ..selection_autogaze import resize_frames
from ..video_processing_autogaze import AutoGazeVideoProcessor


# Filters of a quarter of a token: how many of each band, and by how much they are amplified, since finer detail of
# natural pictures is weaker.
_BANDS = ((0, 0, 2, 0.08), (1, 1, 3, 0.25), (2, 3, 4, 0.6), (4, 99, 3, 1.2))
_NUM_FILTERS = 4 * sum(count for _, _, count, _ in _BANDS)
_POSITION_SHARE = 9 / 16  # of the channels that tokens have
_NEGLIGIBLE_MSE = 3e-4  # 35 dB


@torch.no_grad()
def initialize_gaze_model(
    model: AutoGazeModel,
    pixel_values_videos: torch.Tensor,
    processor: AutoGazeVideoProcessor | None = None,
    seed: int = 0,
) -> None:
    """
    Gives a new model the weights that training starts from best, in place.

    Args:
        model ([`AutoGazeModel`]):
            The model, on the CPU; of three colour channels and at least 192 channels in stem and decoder.
        pixel_values_videos (`torch.FloatTensor` of shape `(clips, frames, 3, height, width)`):
            Some hundred frames like those to train on, at least two to a clip, by which the readout is fitted.
        processor ([`AutoGazeVideoProcessor`], *optional*): what made the pixel values; the published one by default.
        seed (`int`, *optional*, defaults to 0): where random numbers start from.

    Raises:
        ValueError: if the model is too small.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import AutoGazeConfig, AutoGazeModel
    >>> from transformers_autogaze.training import initialize_gaze_model

    >>> model = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64))
    >>> initialize_gaze_model(model, torch.randn(8, 2, 3, 64, 64))

    ```
    """
    vision, hidden = model.config.vision_config, model.config.decoder_config.hidden_size
    if vision.num_channels != 3 or vision.hidden_size < 4 * _NUM_FILTERS or vision.patch_size % 2 or hidden < 192:
        raise ValueError(
            f"`model` must have 3 colour channels, tokens of an even number of pixels, and at least {4 * _NUM_FILTERS} "
            f"channels in stem and decoder, got {vision.num_channels}, {vision.patch_size}, {vision.hidden_size} and "
            f"{hidden}: train smaller models from their random weights"
        )
    generator = torch.Generator().manual_seed(seed)
    _draw_filters(model, generator)
    side = model.config.image_size // vision.patch_size
    waves = position_waves(side, min(side * side, int(_POSITION_SHARE * hidden)))
    _fit_readout(model, pixel_values_videos, processor or AutoGazeVideoProcessor(), waves.shape[1], generator)
    _name_patches(model, waves, generator)


def position_waves(side: int, count: int) -> torch.Tensor:
    """
    Gives tokens of a square codes for where they lie: the longest two-dimensional cosine waves.

    A sum of such codes, weighted by attention, is that attention as a picture, blurred a little; random codes would
    give noise all over the frame instead.

    Args:
        side (`int`): tokens of a row, and rows.
        count (`int`): waves.

    Returns:
        `torch.FloatTensor` of shape `(side * side, count)`: codes with a mean square of 1 in every wave.
    """
    cosines = _cosines(side) * math.sqrt(side)
    number = torch.arange(side)
    longest = (number[:, None] ** 2 + number**2).flatten().argsort(stable=True)[:count]
    return torch.stack([torch.outer(cosines[i // side], cosines[i % side]).flatten() for i in longest.tolist()], dim=1)


def _cosines(size: int) -> torch.Tensor:
    """Gives the orthonormal cosine waves of a row of `size` places, `(waves, places)`, long to short."""
    number = torch.arange(size)
    waves = torch.cos(math.pi * (number + 0.5) * number[:, None] / size)
    return waves / waves.norm(dim=1, keepdim=True)


def _normal(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def _draw_filters(model: AutoGazeModel, generator: torch.Generator) -> None:
    """Makes the stem tell the strength of every band of every quarter of a token, and how it changes over time."""
    stem, size = model.vision_model, model.config.vision_config.patch_size // 2
    weight, bias = stem.temporal_conv.weight, stem.temporal_conv.bias
    _normal(weight, 0.01, generator)
    bias.zero_()
    # Two large constants keep the norm from taking the strength of a token's filters away.
    bias[-2:] = torch.tensor([8.0, -8.0])
    cosines, number = _cosines(size), torch.arange(size)
    band = torch.maximum(number[:, None], number)
    channel = 0
    for row in (0, size):
        for col in (0, size):
            for lowest, highest, count, gain in _BANDS:
                of_band = (band >= lowest) & (band <= highest)
                places = of_band.nonzero()
                for index in range(count):
                    if len(places) <= count:
                        mix = torch.zeros(size, size)
                        mix[tuple(places[index % len(places)])] = 1
                    else:
                        mix = torch.randn(size, size, generator=generator) * of_band / (1 + band)
                        mix /= mix.norm()
                    is_hue = len(places) == 1 and index == 1
                    colours = torch.tensor([0.6, 0.0, -0.6] if is_hue else [1 / 3] * 3)
                    picture = gain * colours[:, None, None] * (cosines.T @ mix @ cosines)
                    weight[channel] = 0
                    weight[channel, :, -1, row : row + size, col : col + size] = picture
                    channel += 1
    for index, block in enumerate(stem.blocks):
        _normal(block.conv3d.weight, 0.0 if index == 0 else 0.02, generator)
        _normal(block.conv3d.bias, 0.05, generator)
    # What is positive and what is negative apart: now, and against the frame before.
    middle = model.config.vision_config.spatial_kernel_size // 2
    first, tap = torch.arange(_NUM_FILTERS), stem.blocks[0].conv3d.weight[..., middle, middle]
    for part, (now, before) in enumerate(((1.0, 0.0), (-1.0, 0.0), (1.5, -1.5), (-1.5, 1.5))):
        tap[part * _NUM_FILTERS + first, first, -1] = now
        if tap.shape[-1] > 1:
            tap[part * _NUM_FILTERS + first, first, -2] = before


def _fit_readout(
    model: AutoGazeModel,
    video: torch.Tensor,
    processor: AutoGazeVideoProcessor,
    num_waves: int,
    generator: torch.Generator,
) -> None:
    """Lets the first channels of a token tell the error of its quarters at every scale, and against the frame before."""
    config, stem = model.config, model.vision_model
    composite, rate = CompositeReconstruction(config.grid), config.frame_sampling_rate
    gazed = resize_frames(video[:, ::rate], config.grid.sizes[-1])
    frames = processor.to_pixels(gazed).clamp(0, 1)
    before = torch.cat([torch.full_like(frames[:, :1], 0.5), frames[:, :-1]], dim=1).flatten(0, 1)
    frames = frames.flatten(0, 1)
    errors = composite.cell_errors(frames, torch.full_like(frames, 0.5))[:, :-1]
    errors = torch.cat([errors, composite.cell_errors(frames, before)[:, :1]], dim=1)
    mse = errors * errors[0, 0].numel() / frames[0].numel()
    side = config.image_size // config.vision_config.patch_size
    told = F.adaptive_avg_pool2d((mse + _NEGLIGIBLE_MSE).log10(), 2 * side).float()
    told = F.pixel_unshuffle(told, 2).movedim(1, -1).flatten(0, -2)
    told = (told - told.mean(0)) / told.std(0).clamp(min=1e-3)

    seen, out_proj = [], stem.out_proj
    stem.out_proj = nn.Identity()
    for clip in resize_frames(video, config.image_size).split(8):
        seen.append(stem(clip)[0].flatten(0, 2))
    stem.out_proj = out_proj
    seen = torch.cat(seen)
    known = F.pad(seen, (0, 1), value=1.0)
    products = known.T @ known / len(known)
    ridge = 1e-5 * products.diagonal().mean() * torch.eye(len(products))
    fit = torch.linalg.solve(products + ridge, known.T @ told / len(known))

    # The channels after them see the filters at random; positions have the last ones.
    weight, bias = out_proj.weight[..., 0, 0, 0], out_proj.bias
    weight.zero_()
    bias.zero_()
    count, free = told.shape[1], len(bias) - told.shape[1] - num_waves - 2
    if free < 0:
        raise ValueError(
            f"`model` must have tokens of at least {count + num_waves + 2} channels for {len(config.scales)} scales and "
            f"{side}x{side} tokens, got {len(bias)}"
        )
    weight[:count], bias[:count] = fit[:-1].T, fit[-1]
    mixed = torch.randn(free, seen.shape[1], generator=generator) / seen.std(0).clamp(min=1e-3)
    mixed *= 0.5 / math.sqrt(seen.shape[1])
    weight[count : count + free] = mixed
    bias[count : count + free] = -mixed @ seen.mean(0)


def _name_patches(model: AutoGazeModel, waves: torch.Tensor, generator: torch.Generator) -> None:
    """Gives vision tokens and patches their positions, and lets the last layer name the patches of where it looks."""
    config, decoder = model.config, model.gaze_decoder
    num_waves, grids = waves.shape[1], config.grid.grids
    side = math.isqrt(len(waves))
    picture = waves.T.unflatten(1, (side, side))
    codes = [F.adaptive_avg_pool2d(picture, grid).flatten(1).T for grid in grids]
    first = config.decoder_config.hidden_size - num_waves  # channel of the first wave; two constants stand before

    model.connector.pos_embed.zero_()
    model.connector.pos_embed[:, first:] = waves
    model.connector.pos_embed[:, first - 1] = 2.0
    embedding = decoder.model.embed_tokens.weight
    _normal(embedding, 0.05, generator)
    embedding[:-1, first:] = F.normalize(torch.cat(codes), dim=-1) * math.sqrt(num_waves)
    count = (len(grids) + 1) * 4  # channels that tell errors
    of_scale = torch.randn(len(grids), first - 2 - count, generator=generator)
    embedding[:-1, count : first - 2] = of_scale.repeat_interleave(torch.tensor([len(code) for code in codes]), dim=0)
    embedding[:, first - 2 : first] = 2.0

    for layer in decoder.model.layers:
        for name, weight in layer.named_parameters():
            if weight.ndim == 2:
                _normal(weight, 0.03 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.06, generator)
    for layer in decoder.model.layers[:2]:
        _match_places(layer.self_attn, first, num_waves, generator)
    attention = decoder.model.layers[-1].self_attn
    values, outputs, size = attention.v_proj.weight, attention.o_proj.weight, attention.head_dim
    _normal(values, 0.02, generator)
    _normal(outputs, 0.02, generator)
    names = decoder.lm_head.weight.view(decoder.num_rows, -1, config.decoder_config.hidden_size)
    _normal(names, 0.01, generator)
    _normal(decoder.task_loss_prediction_head.weight, 0.02, generator)

    def carry(heads: range, num_codes: int, into: int, scales: range) -> None:
        rows = torch.arange(heads.start * size, heads.stop * size)
        turn = torch.linalg.qr(torch.randn(len(rows), num_codes, generator=generator))[0]
        values[rows, first : first + num_codes] += 2 * turn
        outputs[into : into + num_codes, rows] += 2 * turn.T
        for scale in scales:
            start = sum(map(len, codes[:scale]))
            code = F.normalize(codes[scale][:, :num_codes], dim=-1)
            names[:, start : start + len(code), into : into + num_codes] += code

    # As `AttentionGains` has it: a head for each coarser scale, the coarsest two together; all others for the finest.
    num_scales, num_heads = len(grids), config.decoder_config.num_attention_heads
    num_coarse = max(num_scales - 2, 0)
    finest = range(num_scales - 1 if num_coarse else 0, num_scales)
    carry(range(num_heads - num_coarse), min(num_waves, (num_heads - num_coarse) * size), first, finest)
    into = count
    for scale in range(num_scales - 2, 0, -1):
        scales = range(0 if scale == 1 else scale, scale + 1)
        num_codes = min(size, num_waves, sum(len(codes[scale]) for scale in scales), first - 2 - into)
        head = num_heads - scale
        carry(range(head, head + 1), num_codes, into, scales)
        into += num_codes


def _match_places(attention: nn.Module, first: int, num_waves: int, generator: torch.Generator) -> None:
    """Lets half of the heads look at tokens of their own place, the start of what [`AttentionHistory`] asks of them."""
    size = attention.head_dim
    # Where rotary positions turn slowest, so that a place is still one frames later.
    slow = torch.arange(5 * size // 16, size // 2)
    slow = torch.cat([slow, slow + size // 2])
    longest = min(num_waves, 2 * len(slow))
    for head in range(max(1, attention.config.num_attention_heads // 2)):
        codes = torch.linalg.qr(torch.randn(longest, len(slow), generator=generator))[0].T
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight[head * size : (head + 1) * size] *= 0.3
            weight[head * size + slow] = 0.0
            weight[head * size + slow, first : first + longest] = 2.2 * codes
