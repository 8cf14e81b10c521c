"""Pictures of a video and what was kept of it: panels with what is to be known of a frame, and patches over time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from .gaze_pictures_autogaze import (
    SCALE_COLOURS,
    contact_sheet,
    draw_legend,
    draw_text,
    paint_gaze,
    stack_pictures,
    text_size,
)
from .gazing_autogaze import GazeOutput
from .video_gazing import GazeChunk
from .video_processing_autogaze import AutoGazeVideoProcessor


__all__ = [
    "PANELS",
    "FrameView",
    "OverlayDrawer",
    "contact_sheet",
    "draw_panels",
    "draw_timeline",
    "paint_gaze",
    "side_by_side",
    "to_frames",
]

PANELS = ("original", "kept patches", "reconstruction from the kept patches")
"""What [`draw_panels`] draws."""
_SIDES = 224, 448  # pixels on the shorter side of a panel
_LONGEST = 1344  # pixels on its longer side
_GAP = 4
_BARS = 80  # pixels of the highest bar of a timeline
_CUT, _NOW = (220, 0, 0), (0, 0, 0)


class FrameView(NamedTuple):
    """
    What is shown of one frame.

    Args:
        frame (`int`): the frame, counted over those taken from the video.
        index (`int`): the same frame as the video counts it.
        time (`float`, *optional*): when it is shown, in seconds.
        kept, total (`int`): patches that are kept of it, and those of all scales.
        tokens, dense (`int`): patches kept up to here, and those that a dense encoder sees.
        scales (`list[str]`): what the scales are called, coarse to fine.
        panels (`list[np.ndarray]`): see [`draw_panels`].
    """

    frame: int
    index: int
    time: float | None
    kept: int
    total: int
    tokens: int
    dense: int
    scales: list[str]
    panels: list[np.ndarray]

    @property
    def status(self) -> str:
        """Says all of it in one line."""
        factor = f", {self.dense / self.tokens:.1f}x fewer than a dense encoder's" if self.tokens else ""
        return f"{self._place}   {self.kept} of {self.total} patches   {self.tokens} tokens so far{factor}"

    @property
    def caption(self) -> str:
        """Says most of it in two short lines."""
        return f"{self._place}\n{self.kept} of {self.total} patches, {self.tokens} so far"

    @property
    def _place(self) -> str:
        return f"frame {self.index}" + ("" if self.time is None else f"   {self.time:.2f} s")


class OverlayDrawer:
    """
    Draws the frames of an overlay: what is known of each, a legend, the panels, and on request a timeline.

    Args:
        length (`int`): frames of the video.
        timeline (`Image.Image`, *optional*): see [`draw_timeline`].
    """

    def __init__(self, length: int, timeline: Image.Image | None = None):
        self.length, self.timeline = length, timeline
        self._head: Image.Image | None = None

    def draw(self, view: FrameView) -> np.ndarray:
        """
        Draws a frame.

        Args:
            view ([`FrameView`]): what to show.

        Returns:
            `np.ndarray` of shape `(height, width, 3)` and type uint8.
        """
        panels = Image.fromarray(side_by_side(view.panels, _GAP))
        if self._head is None:
            self._head = stack_pictures([draw_legend(view.scales, panels.width, "scales"), _titles(view.panels)])
        parts = [draw_text(view.status, panels.width), self._head, panels]
        if self.timeline is not None:
            parts.append(
                _mark_now(self.timeline, view.frame, self.length).resize((panels.width, self.timeline.height))
            )
        return np.asarray(stack_pictures(parts))


def draw_timeline(counts: np.ndarray, cuts: Sequence[int], width: int, duration: float | None = None) -> Image.Image:
    """
    Draws how many patches are kept of every frame, in the colours of their scales, and where scenes are cut.

    Args:
        counts (`np.ndarray` of shape `(frames, scales)`): patches kept of each frame and scale.
        cuts (`Sequence[int]`): the first frame of each new scene.
        width (`int`): width of the picture in pixels; where frames are more than pixels, the one that keeps most is shown.
        duration (`float`, *optional*): seconds of the video.

    Returns:
        `PIL.Image.Image`: in RGB.
    """
    most, length = int(counts.sum(1).max()), len(counts)
    bars = np.full((_BARS, width, 3), 240, np.uint8)
    starts = np.arange(width) * length // width
    stops = np.maximum(starts + 1, np.arange(1, width + 1) * length // width)
    for x, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        own = counts[start + int(counts[start:stop].sum(1).argmax())]
        # From the ground up: coarse below fine.
        tops = _BARS - np.ceil(own.cumsum() * _BARS / max(1, most)).astype(int)
        for scale, (top, bottom) in enumerate(zip(tops, [_BARS, *tops], strict=False)):
            bars[top:bottom, x] = SCALE_COLOURS[scale % len(SCALE_COLOURS)]
    picture = Image.fromarray(bars)
    draw = ImageDraw.Draw(picture)
    for cut in cuts:
        x = cut * width // length
        draw.line([x, 0, x, _BARS], fill=_CUT, width=max(3, width // 400))
    span = "" if duration is None else f", over {duration:.1f} s"
    found = f"   red: {len(cuts)} {'cut' if len(cuts) == 1 else 'cuts'}" if len(cuts) else ""
    return stack_pictures([draw_text(f"patches of every frame, {most} at most{span}{found}", width), picture])


def draw_panels(
    chunk: GazeChunk, frame: int, rebuilt: torch.Tensor, processor: AutoGazeVideoProcessor
) -> list[np.ndarray]:
    """
    Draws one frame of a chunk.

    Args:
        chunk ([`GazeChunk`]): the chunk.
        frame (`int`): which of its frames, counted from its first.
        rebuilt (`torch.FloatTensor` of shape `(3, height, width)`): the same frame rebuilt from kept patches, pixels in 0..1.
        processor ([`AutoGazeVideoProcessor`]): how to resize.

    Returns:
        `list[np.ndarray]`, three times shape `(height, width, 3)` and type uint8: see [`PANELS`]; of a size to look at.
    """
    height, width = chunk.frames.shape[1:3]
    size = panel_size(height, width)
    levels = torch.from_numpy(chunk.frames[frame : frame + 1]).permute(0, 3, 1, 2)
    shown = processor.resize_levels(levels, size).permute(0, 2, 3, 1).contiguous().numpy()
    # The grid may reach beyond the frame.
    bottom, right = (
        max(0, round(small * whole / part) - small)
        for small, whole, part in zip(size, chunk.extent, (height, width), strict=True)
    )
    place = frame // chunk.gaze.frame_sampling_rate
    gaze = GazeOutput.from_masks([mask[:, place : place + 1] for mask in chunk.gaze.gazing_mask], chunk.gaze.grid)
    painted = paint_gaze(np.pad(shown, ((0, 0), (0, bottom), (0, right), (0, 0))), gaze)
    return [shown[0], painted[0, : size[0], : size[1]], to_frames(rebuilt[None], size)[0]]


def panel_size(height: int, width: int) -> tuple[int, int]:
    """
    Chooses the size of a panel.

    Args:
        height, width (`int`): size of the video's frames in pixels.

    Returns:
        `tuple[int, int]`: height and width, as large as the frame where that is good to look at.
    """
    least, most = (side / min(height, width) for side in _SIDES)
    factor = min(max(min(1.0, most), least), _LONGEST / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def side_by_side(panels: Sequence[np.ndarray], gap: int = _GAP) -> np.ndarray:
    """
    Puts frames or videos of equal height next to each other, with white gaps.

    Args:
        panels (`Sequence[np.ndarray]` of shape `(.., height, width, 3)`, uint8): the frames or videos, left to right.
        gap (`int`, *optional*, defaults to 4): width of the gaps in pixels.

    Returns:
        `np.ndarray` of shape `(.., height, total width, 3)`, uint8.
    """
    white = np.full((*panels[0].shape[:-2], gap, 3), 255, np.uint8)
    parts = [panels[0]]
    for panel in panels[1:]:
        parts += [white, panel]
    return np.concatenate(parts, axis=-2)


def to_frames(pixels: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """
    Turns pixels into frames to look at.

    Args:
        pixels (`torch.FloatTensor` of shape `(frames, 3, height, width)`): values in 0..1.
        size (`tuple[int, int]`): height and width in pixels of the frames to make.

    Returns:
        `np.ndarray` of shape `(frames, *size, 3)`, uint8.
    """
    pixels = pixels.float()
    if tuple(pixels.shape[-2:]) != tuple(size):
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _titles(panels: Sequence[np.ndarray]) -> Image.Image:
    size = text_size(sum(panel.shape[1] for panel in panels))
    titles = [np.asarray(draw_text(name, panel.shape[1], size)) for name, panel in zip(PANELS, panels, strict=True)]
    return Image.fromarray(side_by_side(titles))


def _mark_now(timeline: Image.Image, frame: int, length: int) -> Image.Image:
    marked = timeline.copy()
    x = (2 * frame + 1) * timeline.width // (2 * length)
    ImageDraw.Draw(marked).line(
        [x, timeline.height - _BARS, x, timeline.height], fill=_NOW, width=max(3, timeline.width // 400)
    )
    return marked
