"""Pictures of kept patches, coloured by scale, and summaries of a gaze as numbers, text and HTML."""

import html
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .grid_autogaze import GazeGrid


if TYPE_CHECKING:
    from .gazing_autogaze import GazeOutput


# Coarse to fine, of clearly different hues; the first four can be distinguished with any kind of colour vision (Okabe and Ito,
# 2008).
SCALE_COLOURS = ((0, 114, 178), (0, 158, 115), (240, 228, 66), (213, 94, 0), (200, 60, 150), (130, 90, 220))
_DIM = 0.3  # factor on the brightness of pixels that are not kept
_BLACK_SHARE = 0.25  # of a scale's colour that a black pixel has
_WHITE_SHARE = 0.4  # of white that is mixed into a scale's colour in a white pixel
_MIN_OUTLINED = 6  # pixels of the side of a block that has an outline, at least
_MAX_THICKNESS = 4  # pixels of an outline, at most
_MARGIN = 4  # pixels left of text
_MAX_ROWS, _MAX_BARS = 8, 128  # clips, and bars of each, in a table
_TEXT_SIZES = 18, 28  # pixels, smallest and largest


def paint_gaze(frames: np.ndarray, gaze: "GazeOutput", clip: int = 0) -> np.ndarray:
    """
    Paints the kept patches of one clip in shades of the colour of their scale, and everything else in dark grey.

    Only the brightness of a pixel is kept, so its hue always shows the finest scale that is kept there. Patches are outlined.
    Outlines of coarse patches are thicker and drawn over finer patches, so that a patch stays visible where finer ones cover it.

    Args:
        frames (`np.ndarray` of shape `(frames, height, width, 3)`, uint8): the frames, of any size.
        gaze ([`GazeOutput`]): a gaze for these frames.
        clip (`int`, *optional*, defaults to 0): index of the clip in the gaze's batch.

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
    >>> painted[0, 0, 0].tolist(), painted[0, 8, 8].tolist(), painted[0, 24, 24].tolist()
    ([0, 114, 178], [80, 140, 173], [60, 60, 60])

    ```
    """
    frames = np.asarray(frames)
    if len(frames) != gaze.num_frames * gaze.frame_sampling_rate:
        raise ValueError(
            f"`frames` must be {gaze.num_frames * gaze.frame_sampling_rate} as the gaze's, got {len(frames)}"
        )
    red, green, blue = (frames[..., channel].astype(np.uint16) for channel in range(3))
    brightness = (77 * red + 150 * green + 29 * blue) >> 8
    masks = [mask[clip].cpu().numpy().repeat(gaze.frame_sampling_rate, 0) for mask in gaze.gazing_mask]
    layout = _layout(gaze.grid, *frames.shape[1:3])
    # Indices into the palette: 0 for pixels that are not kept, then the fills and the outlines of all scales.
    index = np.zeros(frames.shape[:3], np.uint8)
    kept = [mask[:, patch] for mask, (patch, _) in zip(masks, layout, strict=True)]
    for scale, is_kept in enumerate(kept):
        index[is_kept] = 1 + scale
    for scale in reversed(range(len(kept))):
        index[kept[scale] & layout[scale][1]] = 1 + len(kept) + scale
    return _palette(len(kept))[index, brightness]


@lru_cache(maxsize=8)
def _palette(count: int) -> np.ndarray:
    """Returns the colours for every index of `paint_gaze` and every brightness, `(1 + 2 * count, 256, 3)`."""
    share = np.linspace(0, 1, 256)[:, None]
    ramps = [255 * _DIM * share.repeat(3, 1)]
    colours = [np.array(SCALE_COLOURS[scale % len(SCALE_COLOURS)], float) for scale in range(count)]
    for colour in colours:
        darkest, brightest = _BLACK_SHARE * colour, (1 - _WHITE_SHARE) * colour + 255 * _WHITE_SHARE
        ramps.append(darkest + (brightest - darkest) * share)
    ramps += [np.broadcast_to(colour, (256, 3)) for colour in colours]
    return np.stack(ramps).round().astype(np.uint8)


@lru_cache(maxsize=4)
def _layout(grid: GazeGrid, height: int, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns, for each scale, the patch at every pixel of a frame, and a mask of the pixels of outlines."""
    layout, first = [], 0
    for patch, (rows, cols) in zip(grid.patches_at(height, width).numpy().astype(np.int32), grid.grids, strict=True):
        side = min(height // rows, width // cols)
        thickness = min(_MAX_THICKNESS, max(1, side // 32)) if side >= _MIN_OUTLINED else 0
        is_edge = np.zeros(patch.shape, bool)
        padded = np.pad(patch, thickness, constant_values=-1)
        for shift in range(1, thickness + 1):
            for down, right in ((shift, 0), (-shift, 0), (0, shift), (0, -shift)):
                top, left = thickness + down, thickness + right
                is_edge |= padded[top : top + height, left : left + width] != patch
        layout.append((patch - first, is_edge))
        first += rows * cols
    return layout


def name_scales(grid: GazeGrid, height: float, width: float) -> list[str]:
    """
    Names the scales of a grid for a legend.

    Args:
        grid ([`GazeGrid`]): the grid.
        height, width (`float`): size of the frame in pixels.

    Returns:
        `list[str]`: names, coarse to fine, with the size of the block of the frame that a patch covers.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.gaze_pictures_autogaze import name_scales

    >>> name_scales(GazeGrid([32, 224], 16), height=448, width=896)
    ['32, coarsest: blocks of 448x224 pixels', '224, finest: blocks of 64x32 pixels']

    ```
    """
    names = []
    for index, (scale, (rows, cols)) in enumerate(zip(grid.scales, grid.grids, strict=True)):
        name = str(scale) if isinstance(scale, int) else f"{scale[1]}x{scale[0]}"
        ends = {0: ", coarsest", len(grid.scales) - 1: ", finest"} if len(grid.scales) > 1 else {}
        names.append(f"{name}{ends.get(index, '')}: blocks of {width / cols:.3g}x{height / rows:.3g} pixels")
    return names


def text_size(width: int) -> int:
    """Returns a readable text size, in pixels, for a picture of that width."""
    smallest, largest = _TEXT_SIZES
    return min(max(width // 100, smallest), largest)


def draw_legend(names: Sequence[str], width: int, heading: str = "") -> Image.Image:
    """
    Draws a heading and the colours and names of scales, on as many lines as needed.

    Args:
        names (`Sequence[str]`): names of the scales, coarse to fine; see [`name_scales`].
        width (`int`): width of the picture in pixels.
        heading (`str`, *optional*): text before the names.

    Returns:
        `PIL.Image.Image`: black on white, in RGB.
    """
    size, gap = text_size(width), 8
    font, line = ImageFont.load_default(size=size), size + gap
    items: list[tuple[tuple[int, int, int] | None, str]] = [(None, heading)] * bool(heading)
    items += [(SCALE_COLOURS[index % len(SCALE_COLOURS)], name) for index, name in enumerate(names)]
    places, x, y = [], _MARGIN, 0
    for colour, text in items:
        length = round(font.getlength(text)) + (line if colour else 0) + 2 * gap
        if x > _MARGIN and x + length > width:
            x, y = _MARGIN, y + line
        places.append((x, y))
        x += length
    picture = Image.new("RGB", (width, y + line), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for (x, y), (colour, text) in zip(places, items, strict=True):
        if colour is not None:
            draw.rectangle([x, y + 4, x + size, y + 4 + size], fill=colour)
            x += line
        draw.text((x, y + 2), text, fill=(0, 0, 0), font=font)
    return picture


def draw_text(text: str, width: int, size: int | None = None) -> Image.Image:
    """
    Draws lines of text; a line that is too long gets a smaller font.

    Args:
        text (`str`): the lines.
        width (`int`): width of the picture in pixels.
        size (`int`, *optional*): text size in pixels; [`text_size`] by default.

    Returns:
        `PIL.Image.Image`: black on white, in RGB.
    """
    size = size or text_size(width)
    lines, line = text.split("\n"), size + 8
    picture = Image.new("RGB", (width, line * len(lines)), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for number, part in enumerate(lines):
        length = ImageFont.load_default(size=size).getlength(part)
        font = ImageFont.load_default(size=max(6, min(size, int(size * (width - 2 * _MARGIN) / max(1, length)))))
        draw.text((_MARGIN, line * number + line // 2), part, fill=(0, 0, 0), font=font, anchor="lm")
    return picture


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]],
    scales: Sequence[object],
    max_width: int = 2400,
    captions: Sequence[str] = (),
) -> Image.Image:
    """
    Draws strips of frames below each other, each with its name, and a legend of the scales' colours.

    Args:
        rows (`Sequence` of `(str, np.ndarray)`): name of each row and its frames `(frames, height, width, 3)`, uint8.
        scales (`Sequence`): names of the scales in the legend, coarse to fine; see [`name_scales`].
        max_width (`int`, *optional*, defaults to 2400): frames are shrunk until the sheet is at most this wide, in pixels.
        captions (`Sequence[str]`, *optional*): text below each column.

    Returns:
        `PIL.Image.Image`: the sheet, in RGB.
    """
    gap, count = 4, max(len(frames) for _, frames in rows)
    height, width = rows[0][1].shape[1:3]
    shrink = min(1.0, (max_width - gap * (count + 1)) / (count * width))
    cell = max(1, int(width * shrink)), max(1, round(height * shrink))
    full = gap + count * (cell[0] + gap)
    parts = [draw_legend([str(scale) for scale in scales], full, "scales")]
    for name, frames in rows:
        strip = Image.new("RGB", (full, cell[1] + gap), (255, 255, 255))
        for index, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize(cell, Image.Resampling.LANCZOS)
            strip.paste(picture, (gap + index * (cell[0] + gap), 0))
        parts += [draw_text(name, full), strip]
    if captions:
        texts = [draw_text(caption, cell[0], size=16) for caption in captions]
        strip = Image.new("RGB", (full, max(text.height for text in texts)), (255, 255, 255))
        for index, text in enumerate(texts):
            strip.paste(text, (gap + index * (cell[0] + gap), 0))
        parts.append(strip)
    return stack_pictures(parts)


def stack_pictures(pictures: Sequence[Image.Image]) -> Image.Image:
    """
    Stacks pictures vertically.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): pictures in RGB, of one width.

    Returns:
        `PIL.Image.Image`
    """
    stacked = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), (255, 255, 255))
    y = 0
    for picture in pictures:
        stacked.paste(picture, (0, y))
        y += picture.height
    return stacked


def plot_gaze(gaze: "GazeOutput", frames: np.ndarray, clip: int = 0, max_frames: int = 8) -> Image.Image:
    """Draws frames and their kept patches; see [`GazeOutput.plot`]."""
    if max_frames < 1:
        raise ValueError(f"`max_frames` must be at least 1, got {max_frames}")
    painted = paint_gaze(frames, gaze, clip)
    chosen = np.linspace(0, len(painted) - 1, min(max_frames, len(painted))).round().astype(int)
    counts = gaze.num_real_each_frame[clip].tolist()
    kept = [counts[frame // gaze.frame_sampling_rate] for frame in chosen]
    captions = [
        f"frame {frame}\n{count} of {gaze.grid.num_patches} patches" for frame, count in zip(chosen, kept, strict=True)
    ]
    rows = [("frames", np.asarray(frames)[chosen]), ("kept patches", painted[chosen])]
    return contact_sheet(rows, name_scales(gaze.grid, *painted.shape[1:3]), captions=captions)


def count_statistics(counts: np.ndarray, grid: GazeGrid) -> dict[str, Any]:
    """
    Computes the statistics of one clip from the numbers of its kept patches; see [`GazeOutput.statistics`].

    Args:
        counts (`np.ndarray` of shape `(frames, scales)`): number of kept patches of every frame and scale.
        grid ([`GazeGrid`]): the patches of a frame.

    Returns:
        `dict`: as [`GazeOutput.statistics`].
    """
    frames, patches = len(counts), int(counts.sum())
    names = [str(scale) if isinstance(scale, int) else f"{scale[0]}x{scale[1]}" for scale in grid.scales]
    return {
        "num_frames": frames,
        "num_patches": patches,
        "kept_ratio": patches / (frames * grid.num_patches),
        "reduction_factor": frames * grid.num_patches_each_scale[-1] / patches if patches else None,
        "patches_each_frame": counts.sum(1).tolist(),
        "patches_each_scale": dict(zip(names, counts.sum(0).tolist(), strict=True)),
    }


def describe_gaze(gaze: "GazeOutput") -> str:
    """Describes the size of a gaze and its share of kept patches in one line."""
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
    """Returns a table of the clips of a gaze for a notebook, with a bar of kept patches for every frame."""
    head = html.escape(describe_gaze(gaze))
    if gaze.gazing_pos is None or gaze.num_gazing_each_frame is None or gaze.scales is None:
        return f"<code>{head}</code>"
    counts = gaze.num_real_each_frame.cpu()
    rows = []
    for clip, row in enumerate(counts[:_MAX_ROWS].tolist()):
        # Neighbouring frames of a long clip share a bar.
        step = -(-len(row) // _MAX_BARS)
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
    more = "" if len(counts) <= _MAX_ROWS else f"<p>and {len(counts) - _MAX_ROWS} more clips</p>"
    titles = "".join(f"<th>{name}</th>" for name in names)
    return f"<code>{head}</code><table><tr>{titles}</tr>{''.join(rows)}</table>{more}"
