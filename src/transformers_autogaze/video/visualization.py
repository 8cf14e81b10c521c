"""Pictures of a video and its kept patches: panels of one frame with their labels, and a timeline of the patches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..gaze_pictures_autogaze import (
    SCALE_COLOURS,
    contact_sheet,
    draw_legend,
    draw_text,
    paint_gaze,
    stack_pictures,
    text_size,
)
from ..gazing_autogaze import GazeOutput
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .streaming import GazeChunk


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
"""Titles of the panels that [`draw_panels`] draws, left to right."""
_MIN_SIDE, _MAX_SIDE = 224, 448  # pixels of the shorter side of a panel
_MAX_LONG_SIDE = 1344  # pixels of its longer side
_GAP = 4  # pixels between panels
_BAR_HEIGHT = 80  # pixels of the highest bar of a timeline
_CUT_COLOUR, _FRAME_COLOUR = (220, 0, 0), (0, 0, 0)  # of the lines at scene cuts and at the current frame


class FrameView(NamedTuple):
    """
    The pictures and numbers that are drawn for one frame.

    Args:
        frame (`int`): index of the frame among those taken from the video.
        index (`int`): index of the frame among all frames of the video.
        time (`float`, *optional*): time of the frame, in seconds.
        kept, total (`int`): number of kept patches of the frame, and of all its patches at all scales.
        tokens, dense (`int`): number of kept patches up to this frame, and of the patches that a dense encoder reads up to it.
        scales (`list[str]`): names of the scales, coarse to fine.
        panels (`list[np.ndarray]`): see [`draw_panels`].
    """

    frame: int
    index: int  # type: ignore[assignment]  # hides the unneeded method of tuples
    time: float | None
    kept: int
    total: int
    tokens: int
    dense: int
    scales: list[str]
    panels: list[np.ndarray]

    @property
    def status(self) -> str:
        """The numbers in one line, for the overlay."""
        factor = f", {self.dense / self.tokens:.1f}x fewer than a dense encoder's" if self.tokens else ""
        return f"{self._place}   {self.kept} of {self.total} patches   {self.tokens} tokens so far{factor}"

    @property
    def caption(self) -> str:
        """The numbers in two short lines, for the contact sheet."""
        return f"{self._place}\n{self.kept} of {self.total} patches, {self.tokens} so far"

    @property
    def _place(self) -> str:
        return f"frame {self.index}" + ("" if self.time is None else f"   {self.time:.2f} s")


class OverlayDrawer:
    """
    Draws the frames of an overlay: a line of numbers, a legend, the panels, and optionally a timeline.

    Args:
        length (`int`): number of frames of the overlay.
        timeline (`Image.Image`, *optional*): see [`draw_timeline`].
    """

    def __init__(self, length: int, timeline: Image.Image | None = None):
        self.length, self.timeline = length, timeline
        self._head: Image.Image | None = None

    def draw(self, view: FrameView) -> np.ndarray:
        """
        Draws a frame.

        Args:
            view ([`FrameView`]): the frame.

        Returns:
            `np.ndarray` of shape `(height, width, 3)` and type uint8.
        """
        panels = Image.fromarray(side_by_side(view.panels, _GAP))
        if self._head is None:
            self._head = stack_pictures([draw_legend(view.scales, panels.width, "scales"), _titles(view.panels)])
        parts = [draw_text(view.status, panels.width), self._head, panels]
        if self.timeline is not None:
            parts.append(
                _mark_frame(self.timeline, view.frame, self.length).resize((panels.width, self.timeline.height))
            )
        return np.asarray(stack_pictures(parts))


def draw_timeline(counts: np.ndarray, cuts: Sequence[int], width: int, duration: float | None = None) -> Image.Image:
    """
    Draws a timeline: the number of kept patches of every frame, in the colours of their scales, and the scene cuts.

    Args:
        counts (`np.ndarray` of shape `(frames, scales)`): patches kept of each frame and scale.
        cuts (`Sequence[int]`): the first frame of each new scene.
        width (`int`):
            Width of the picture in pixels. Where several frames share a column of pixels, the one with most patches is drawn.
        duration (`float`, *optional*): seconds of the video.

    Returns:
        `PIL.Image.Image`: in RGB.
    """
    most, length = int(counts.sum(1).max()), len(counts)
    bars = np.full((_BAR_HEIGHT, width, 3), 240, np.uint8)
    starts = np.arange(width) * length // width
    stops = np.maximum(starts + 1, np.arange(1, width + 1) * length // width)
    for x, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        own = counts[start + int(counts[start:stop].sum(1).argmax())]
        # Coarse scales at the bottom, finer ones above.
        tops = _BAR_HEIGHT - np.ceil(own.cumsum() * _BAR_HEIGHT / max(1, most)).astype(int)
        for scale, (top, bottom) in enumerate(zip(tops, [_BAR_HEIGHT, *tops], strict=False)):
            bars[top:bottom, x] = SCALE_COLOURS[scale % len(SCALE_COLOURS)]
    picture = Image.fromarray(bars)
    draw = ImageDraw.Draw(picture)
    for cut in cuts:
        x = cut * width // length
        draw.line([x, 0, x, _BAR_HEIGHT], fill=_CUT_COLOUR, width=max(3, width // 400))
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
        processor ([`AutoGazeVideoProcessor`]): resizes the frame.

    Returns:
        `list[np.ndarray]`: one panel for each of `PANELS`, of shape `(height, width, 3)` and type uint8, as large as
        [`panel_size`] says.
    """
    height, width = chunk.frames.shape[1:3]
    size = panel_size(height, width)
    levels = torch.from_numpy(chunk.frames[frame : frame + 1]).permute(0, 3, 1, 2)
    resized = processor.resize_levels(levels, size).permute(0, 2, 3, 1).contiguous().numpy()
    # The grid may reach beyond the frame.
    bottom, right = (
        max(0, round(small * whole / part) - small)
        for small, whole, part in zip(size, chunk.extent, (height, width), strict=True)
    )
    place = frame // chunk.gaze.frame_sampling_rate
    gaze = GazeOutput.from_masks([mask[:, place : place + 1] for mask in chunk.gaze.gazing_mask], chunk.gaze.grid)
    painted = paint_gaze(np.pad(resized, ((0, 0), (0, bottom), (0, right), (0, 0))), gaze)
    return [resized[0], painted[0, : size[0], : size[1]], to_frames(rebuilt[None], size)[0]]


def panel_size(height: int, width: int) -> tuple[int, int]:
    """
    Chooses the size of a panel.

    Args:
        height, width (`int`): size of the video's frames in pixels.

    Returns:
        `tuple[int, int]`: height and width: those of the frame, scaled up or down where it is too small or too large.
    """
    least, most = (side / min(height, width) for side in (_MIN_SIDE, _MAX_SIDE))
    factor = min(max(min(1.0, most), least), _MAX_LONG_SIDE / max(height, width))
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
    Turns pixels into uint8 frames of a given size.

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


def _mark_frame(timeline: Image.Image, frame: int, length: int) -> Image.Image:
    """Draws a line at a frame of the timeline."""
    marked = timeline.copy()
    x = (2 * frame + 1) * timeline.width // (2 * length)
    ImageDraw.Draw(marked).line(
        [x, timeline.height - _BAR_HEIGHT, x, timeline.height], fill=_FRAME_COLOUR, width=max(3, timeline.width // 400)
    )
    return marked
