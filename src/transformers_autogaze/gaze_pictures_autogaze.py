"""
How a gaze looks: in words, as a table, and as pictures of kept patches coloured by scale.

This module owns colours and layout; it takes frames and a gaze and knows nothing of files or selectors.
"""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont


if TYPE_CHECKING:
    from .gazing_autogaze import GazeOutput


# Coarse to fine; told apart with any kind of colour vision (Okabe and Ito, 2008).
SCALE_COLOURS = ((0, 114, 178), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (86, 180, 233))
_TINT = 90  # of 256
_DIM = 4
_ROWS, _BARS = 8, 128  # clips and bars of a table


def paint_gaze(frames: np.ndarray, gaze: "GazeOutput", clip: int = 0) -> np.ndarray:
    """
    Paints the kept patches of one clip: tinted and outlined in the colour of their scale, everything else dimmed.

    Args:
        frames (`np.ndarray` of shape `(frames, height, width, 3)`, uint8): the frames, of any size.
        gaze ([`GazeOutput`]): a gaze for these frames.
        clip (`int`, *optional*, defaults to 0): which clip of the gaze's batch.

    Returns:
        `np.ndarray` of shape `(frames, height, width, 3)`, uint8.

    Raises:
        ValueError: if frames and gaze differ in length.

    Example:

    ```python
    >>> import numpy as np
    >>> import torch
    >>> from transformers_autogaze import GazeGrid, GazeOutput, paint_gaze

    >>> gaze = GazeOutput.from_masks([torch.tensor([[[True, False, False, False]]])], GazeGrid([32], 16))
    >>> painted = paint_gaze(np.full((1, 32, 32, 3), 200, np.uint8), gaze)
    >>> painted[0, 8, 8].tolist(), painted[0, 24, 24].tolist()
    ([130, 170, 192], [50, 50, 50])

    ```
    """
    frames = np.asarray(frames)
    if len(frames) != gaze.num_frames * gaze.frame_sampling_rate:
        raise ValueError(
            f"`frames` must be {gaze.num_frames * gaze.frame_sampling_rate} as the gaze's, got {len(frames)}"
        )
    gaze = gaze.select(clip)
    patch = gaze.finest_patches(*frames.shape[1:3])[0].repeat_interleave(gaze.frame_sampling_rate, 0).cpu().numpy()
    is_edge = np.zeros(patch.shape, bool)
    is_edge[:, 1:] |= patch[:, 1:] != patch[:, :-1]
    is_edge[:, :, 1:] |= patch[:, :, 1:] != patch[:, :, :-1]
    is_edge[:, 0] = is_edge[:, :, 0] = True

    # One row per patch, and a last one, which -1 picks, for pixels that no patch covers.
    counts = gaze.grid.num_patches_each_scale
    scale = np.repeat(np.arange(len(counts)) % len(SCALE_COLOURS), counts)
    colours = np.zeros((len(scale) + 1, 3), np.uint16)
    colours[:-1] = np.array(SCALE_COLOURS)[scale]
    is_kept = patch >= 0
    painted = (frames.astype(np.uint16) * (256 - _TINT) + (colours * _TINT)[patch] + 128) >> 8
    painted = painted.astype(np.uint8)
    painted[~is_kept] = frames[~is_kept] // _DIM
    outlined = is_edge & is_kept
    painted[outlined] = colours[patch[outlined]]
    return painted


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], scales: Sequence[object], max_width: int = 2400
) -> Image.Image:
    """
    Lays out strips of frames below each other, one strip with its name per row, and a legend of the scales' colours.

    Args:
        rows (`Sequence` of `(str, np.ndarray)`): name of each row and its frames `(frames, height, width, 3)`, uint8.
        scales (`Sequence`): the gaze's scales, for the legend.
        max_width (`int`, *optional*, defaults to 2400): frames are shrunk until the sheet is at most this wide, in pixels.

    Returns:
        `PIL.Image.Image`: the sheet, in RGB.
    """
    gap, count = 4, max(len(frames) for _, frames in rows)
    height, width = rows[0][1].shape[1:3]
    shrink = min(1.0, (max_width - gap * (count + 1)) / (count * width))
    cell = max(1, round(width * shrink)), max(1, round(height * shrink))
    font = ImageFont.load_default(size=18)
    title = 26
    sheet = Image.new(
        "RGB", (gap + count * (cell[0] + gap), title + len(rows) * (title + cell[1] + gap)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    x = gap
    for index, scale in enumerate(scales):
        label = f"scale {scale}"
        draw.rectangle([x, 5, x + 16, 21], fill=SCALE_COLOURS[index % len(SCALE_COLOURS)])
        draw.text((x + 22, 2), label, fill=(0, 0, 0), font=font)
        x += 36 + round(draw.textlength(label, font=font))
    y = title
    for name, frames in rows:
        draw.text((gap, y + 2), name, fill=(0, 0, 0), font=font)
        for index, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(picture, (gap + index * (cell[0] + gap), y + title))
        y += title + cell[1] + gap
    return sheet


def plot_gaze(gaze: "GazeOutput", frames: np.ndarray, clip: int = 0, max_frames: int = 8) -> Image.Image:
    """Draws frames and what was kept of them; see [`GazeOutput.plot`]."""
    if max_frames < 1:
        raise ValueError(f"`max_frames` must be at least 1, got {max_frames}")
    painted = paint_gaze(frames, gaze, clip)
    shown = np.linspace(0, len(painted) - 1, min(max_frames, len(painted))).round().astype(int)
    return contact_sheet([("frames", np.asarray(frames)[shown]), ("kept patches", painted[shown])], gaze.scales)


def describe_gaze(gaze: "GazeOutput") -> str:
    """Says in one line what a gaze is of and how much it keeps."""
    if gaze.gazing_pos is None or gaze.num_gazing_each_frame is None or gaze.scales is None:
        return f"{type(gaze).__name__}(fields: {', '.join(gaze.keys()) or 'none'})"
    kept, dense = int(gaze.num_real.sum()), gaze.batch_size * gaze.num_frames * gaze.num_vision_tokens_each_frame
    clips = f"{gaze.batch_size} clip{'s' * (gaze.batch_size != 1)}"
    start = "" if gaze.first_frame is None else f" from frame {gaze.first_frame} of a stream"
    return (
        f"{type(gaze).__name__}({clips} of {gaze.num_frames} frames{start}, {kept} of {dense} patches kept "
        f"({kept / max(dense, 1):.1%}), scales={gaze.scales}, patch_size={gaze.patch_size})"
    )


def gaze_to_html(gaze: "GazeOutput") -> str:
    """Makes a table of the clips of a gaze for a notebook, with a bar of kept patches for every frame."""
    head = html.escape(describe_gaze(gaze))
    if gaze.gazing_pos is None or gaze.num_gazing_each_frame is None or gaze.scales is None:
        return f"<code>{head}</code>"
    counts = gaze.num_real_each_frame.cpu()
    rows = []
    for clip, row in enumerate(counts[:_ROWS].tolist()):
        # Neighbouring frames of a long clip share a bar.
        step = -(-len(row) // _BARS)
        heights = [max(row[first : first + step]) / max(1, *row) for first in range(0, len(row), step)]
        bars = "".join(
            f'<rect x="{4 * place}" y="{24 - 24 * height:.1f}" width="3" height="{24 * height:.1f}"/>'
            for place, height in enumerate(heights)
        )
        figures = gaze.statistics(clip)
        factor = figures["reduction_factor"]
        cells = (
            clip,
            figures["num_patches"],
            f"{figures['kept_ratio']:.1%}",
            "&ndash;" if factor is None else f"{factor:.1f}x",
            f'<svg width="{4 * len(heights)}" height="24" fill="currentColor">{bars}</svg>',
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    names = ("clip", "patches kept", "share", "fewer than a dense encoder's", "patches of every frame")
    more = "" if len(counts) <= _ROWS else f"<p>and {len(counts) - _ROWS} more clips</p>"
    titles = "".join(f"<th>{name}</th>" for name in names)
    return f"<code>{head}</code><table><tr>{titles}</tr>{''.join(rows)}</table>{more}"
