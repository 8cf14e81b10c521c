"""Gazing at the frames of Qwen2.5-VL and Qwen3-VL, which are put together from their patches, on their merge units."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import GazeSelector
from ..video.streaming import gaze_video
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .encoder_gazing import PER_FRAME_SETTINGS
from .normalization import undo_normalization
from .qwen_vl_units import unfold_units


_CLIP_BUDGETS = ("clip_ratio", "tokens_per_clip")
GAZE_SETTINGS = (*PER_FRAME_SETTINGS, *_CLIP_BUDGETS)
"""Names of the budgets and thresholds of [`~GazeQwenVL.gaze`]."""
_MAX_PIXELS = 2**22  # of frames that are gazed at together, with budgets and thresholds for each frame


class UnitSizes(NamedTuple):
    """
    The size of a merge unit.

    Args:
        merge_size (`int`): rows and columns of patches.
        patch_size (`int`): height and width of a patch in pixels.
        frames (`int`): number of frames.
    """

    merge_size: int
    patch_size: int
    frames: int

    def grid(self, rows: int, cols: int) -> GazeGrid:
        """Returns the grid whose patches are the merge units of a video of `rows` and `cols` patches."""
        side = self.merge_size * self.patch_size
        return GazeGrid([(rows * self.patch_size, cols * self.patch_size)], side)


class UnitGazer:
    """
    Gazes at videos in the format of the MLLM's processor.

    A selector that takes any grid chooses among the merge units themselves, once for all frames of a unit. Others gaze at
    their own scales, see [`gaze_video`].

    Args:
        selector ([`GazeSelector`]): chooses the patches.
        processor: the processor that normalised the frames for the MLLM; see [`normalizing_part`].
        gaze_processor ([`AutoGazeVideoProcessor`], *optional*): preprocesses the selector's frames.
        sizes ([`UnitSizes`]): size of a merge unit.

    Example:

    ```python
    >>> from transformers_autogaze import AutoGazeVideoProcessor, GreedyGazeSelector
    >>> from transformers_autogaze.integrations.qwen_vl_gazing import UnitGazer, UnitSizes

    >>> processor = AutoGazeVideoProcessor(rescale_factor=1 / 255, offset=False)
    >>> gazer = UnitGazer(GreedyGazeSelector(), processor, None, UnitSizes(merge_size=2, patch_size=4, frames=2))
    >>> patches = torch.randn(2 * 4 * 8, 3 * 2 * 4 * 4)  # 4 frames of 16x32 pixels: 2x2x4 units
    >>> gaze = gazer.gaze(patches, torch.tensor([[2, 4, 8]]), gazing_ratio=0.5)[0]
    >>> gaze.grid, gaze.num_real_each_frame.tolist()
    (GazeGrid(scales=[(16, 32)], patch_size=8), [[4, 4]])

    ```
    """

    def __init__(
        self,
        selector: GazeSelector,
        processor: Any,
        gaze_processor: AutoGazeVideoProcessor | None,
        sizes: UnitSizes,
    ):
        self.selector, self.processor, self.sizes = selector, processor, sizes
        self.gaze_processor = AutoGazeVideoProcessor() if gaze_processor is None else gaze_processor

    def gaze(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **options: Any
    ) -> list[GazeOutput]:
        """
        Gazes at videos.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(patches, channels * frames * patch_size**2)`):
                Patches of all videos, unit by unit.
            video_grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
                Patches of each video in time, height and width.
            options: arguments of [`~GazeSelector.generate`]; for a selector of fixed scales, of [`gaze_video`].

        Returns:
            `list[GazeOutput]`, one per video, a batch of one over whole frames.

        Raises:
            ValueError: if a selector of fixed scales is given a budget for the clip, or another one options of
                [`gaze_video`], or as in [`~GazeSelector.generate`].
        """
        options = {name: value for name, value in options.items() if value is not None}
        takes_units, kind = self.selector.takes_any_grid, type(self.selector).__name__
        for name, value in options.items():
            if takes_units and name not in GAZE_SETTINGS:
                raise ValueError(f"`{name}` must not be given to {kind}, which gazes at merge units, got {value!r}")
            if not takes_units and name in _CLIP_BUDGETS:
                raise ValueError(
                    f"`{name}` must not be given to {kind}, which has fixed scales, got {value!r}; give a ratio or a "
                    "threshold, or take GreedyGazeSelector"
                )
        videos = self.frames(pixel_values_videos, video_grid_thw)
        if not takes_units:
            return [gaze_video(self.selector, frames, self.gaze_processor, **options) for frames in videos]
        grids = [self.sizes.grid(rows, cols) for _, rows, cols in video_grid_thw.tolist()]
        gazes = []
        for index, (frames, grid) in enumerate(zip(videos, grids, strict=True)):
            try:
                gazes.append(self._gaze_units(frames, grid, options))
            except ValueError as error:
                raise ValueError(
                    f"video {index}, of {len(frames) // self.sizes.frames} groups of {self.sizes.frames} frames: {error}"
                ) from error
        return gazes

    def frames(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor) -> Iterator[np.ndarray]:
        """Yields the frames `(frames, height, width, 3)` of each video, levels 0..255, put together from patches."""
        counts = video_grid_thw.prod(1).tolist()
        for grid, patches in zip(video_grid_thw.tolist(), pixel_values_videos.split(counts), strict=True):
            levels = unfold_units(patches.float(), grid, self.sizes.merge_size, self.sizes.patch_size)
            levels = undo_normalization(levels.movedim(-1, -3), self.processor).movedim(-3, -1)
            yield levels.round().clamp(0, 255).byte().cpu().numpy()

    @torch.no_grad()
    def _gaze_units(self, frames: np.ndarray, grid: GazeGrid, options: dict[str, Any]) -> GazeOutput:
        """Gazes at the merge units of a video: at once, or as a stream if budgets and thresholds are for each frame."""
        selector, pair_size = self.selector.for_grid(grid), self.sizes.frames
        num_pairs = len(frames) // pair_size
        # A budget for the clip, which may be that of the configuration, needs the whole clip at once.
        is_per_frame = bool(options) and options.keys() <= set(PER_FRAME_SETTINGS)
        is_stream = is_per_frame and selector.config.max_num_frames is None
        step = max(1, _MAX_PIXELS // (pair_size * frames[0, :, :, 0].size)) if is_stream else num_pairs
        gazes, state = [], None
        for first in range(0, num_pairs, step):
            levels = torch.from_numpy(frames[first * pair_size : (first + step) * pair_size]).permute(0, 3, 1, 2)
            levels = levels.to(getattr(selector, "device", "cpu"))
            settings = {
                name: value[first : first + step] if np.shape(value) == (num_pairs,) else value
                for name, value in options.items()
            }
            video = self.gaze_processor.to_pixel_values(levels)[None]
            gaze = selector.generate(
                video, tubelet_size=pair_size, **settings, past_key_values=state, use_cache=is_stream
            )
            state = gaze.cache
            gazes.append(gaze)
        return GazeOutput.concatenate(gazes).replace(cache=None)


def warn_of_fixed_scales(selector: GazeSelector, gazes: list[GazeOutput], units: list[tuple[int, int]]) -> None:
    """Warns that a selector of fixed scales keeps more merge units than its ratio; `units` are kept and total units."""
    kept, total = map(sum, zip(*units, strict=True))
    share = sum(float(gaze.kept_ratio) for gaze in gazes) / len(gazes)
    warnings.warn(
        f"{type(selector).__name__} has fixed scales: it kept {share:.1%} of its patches, which lie on {kept} of {total} "
        f"merge units ({kept / total:.1%}), and the language model reads all of these; a selector that takes any grid, such "
        "as GreedyGazeSelector, keeps the requested share of units",
        stacklevel=3,
    )
