"""
One row for one video: what was kept of it in plain columns, or why that failed.

This module knows nothing of where videos come from and where rows go.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import load_selector
from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..processing_autogaze import AutoGazeProcessor
from ..pruning import VideoPruning, prune_video
from ..selection_autogaze import GazeSelector
from ..video import write_video


_LONGEST = 1000  # characters of an error
_EMPTY = dict.fromkeys(
    """
    error width height fps duration frame_indices frame_times scales patch_size frame_sampling_rate extent ids
    patches_each_frame patches_each_scale num_frames num_patches kept_ratio reduction_factor psnr
    """.split()
)


@dataclass(frozen=True)
class PruneSettings:
    """
    What decides what is kept of the videos of a dataset; equal settings give equal rows.

    Args:
        selector (`str`): a folder, a repository of the Hub, or a name such as `"features"`, which takes the default one.
        num_frames, fps, tiles, max_tiles, gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_second (*optional*):
            See [`prune_video`].
        measures_quality (`bool`, *optional*, defaults to `False`):
            Whether to rebuild every frame from the kept patches, for `psnr`.
        keeps_patches (`bool`, *optional*, defaults to `False`): whether to write the pixels of kept patches as well.
    """

    selector: str = "features"
    num_frames: int | None = None
    fps: float | None = None
    tiles: str = "whole"
    max_tiles: int | None = None
    gazing_ratio: float | None = None
    task_loss_requirement: float | None = None
    clip_ratio: float | None = None
    tokens_per_second: float | None = None
    measures_quality: bool = False
    keeps_patches: bool = False

    def load(self, device: str | torch.device = "cpu") -> tuple[GazeSelector, AutoGazeProcessor]:
        """Loads the selector and its processor; raises as [`~checkpoints.load_selector`]."""
        return load_selector(self.selector, device=device)

    def check(self) -> None:
        """
        Checks the settings on a drawn video, before any work on others.

        Raises:
            ValueError: if there is no such selector, or a setting is out of range or not for it.
        """
        selector, processor = self.load()
        with tempfile.TemporaryDirectory() as folder:
            # How many frames a video must have is its own matter.
            clip = write_video(Path(folder) / "clip.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=self.fps or 30)
            self.replace(num_frames=None).open(clip, selector, processor)

    def replace(self, **changes: Any) -> "PruneSettings":
        """Gives these settings with some changed."""
        return PruneSettings(**{**asdict(self), **changes})

    def open(self, source: Any, selector: GazeSelector, processor: AutoGazeProcessor | None = None) -> VideoPruning:
        """Opens a video; see [`prune_video`]."""
        options = asdict(self)
        del options["selector"], options["keeps_patches"]
        return prune_video(source, selector, processor, **options)


def prune_to_row(
    identity: str,
    source: Any,
    selector: GazeSelector,
    processor: AutoGazeProcessor | None = None,
    settings: PruneSettings | None = None,
) -> dict[str, Any]:
    """
    Prunes a video; whatever is wrong with it, there is a row.

    Args:
        identity (`str`): what to call the video, unlike any other one of its dataset.
        source: the video, as [`prune_video`] takes it.
        selector ([`GazeSelector`]), processor ([`AutoGazeProcessor`], *optional*): what chooses, and makes its pixel values.
        settings ([`PruneSettings`], *optional*): what else decides what is kept; the default ones by default.

    Returns:
        `dict`: `identity` and the columns of docs/scale.md; those but `error` are `None` if the video cannot be read, as
        `error` is if it can.

    Example:

    ```python
    >>> from transformers_autogaze import GreedyGazeSelector
    >>> from transformers_autogaze.dataset_pruning import gaze_of_row, prune_to_row

    >>> row = prune_to_row("still", np.zeros((20, 90, 160, 3), dtype=np.uint8), GreedyGazeSelector())
    >>> row["num_frames"], row["num_patches"], gaze_of_row(row).num_frames
    (20, 23, 20)
    >>> prune_to_row("text", b"no video", GreedyGazeSelector())["error"][:44]
    'ValueError: `source` of 8 bytes is no video '

    ```
    """
    try:
        return row_of(identity, (settings or PruneSettings()).open(source, selector, processor))
    except Exception as error:  # A broken file can raise anything.
        return row_of_error(identity, error)


def row_of(identity: str, pruning: VideoPruning) -> dict[str, Any]:
    """Makes the row of a video; raises what reading it raises."""
    gaze, statistics, known = pruning.gaze, pruning.statistics, pruning.video.metadata
    ids = [own.numpy() for own in gaze.ids_each_frame()]
    scales = [list(scale) if isinstance(scale, tuple) else [scale, scale] for scale in gaze.scales]
    return {
        "identity": identity,
        **_EMPTY,
        "width": known.width,
        "height": known.height,
        "fps": known.fps,
        "duration": known.duration,
        "frame_indices": pruning.frame_indices,
        "frame_times": pruning.frame_times,
        "scales": scales,
        "patch_size": gaze.patch_size,
        "frame_sampling_rate": gaze.frame_sampling_rate,
        # Tiles of the frame's own pixels reach beyond it.
        "extent": scales[-1] if pruning.tiles == "native" else [known.height, known.width],
        "ids": np.concatenate(ids).astype(np.int32),
        **statistics,
        "patches_each_scale": list(statistics["patches_each_scale"].values()),
    }


def row_of_error(identity: str, error: Exception | str) -> dict[str, Any]:
    """Makes the row of a video that could not be pruned, with the reason on one line."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return {"identity": identity, **_EMPTY, "error": " ".join(text.split())[:_LONGEST]}


def gaze_of_row(row: Mapping[str, Any]) -> GazeOutput:
    """
    Makes a gaze of a row.

    Args:
        row (`Mapping`): a row of a video that could be read.

    Returns:
        [`GazeOutput`]: what was kept, a batch of one, in the order of choice.

    Raises:
        ValueError: if the row is one of a video that could not be read.
    """
    if row["error"] is not None:
        raise ValueError(f"`row` must be one of a video that could be read, but {row['identity']!r} has an error")
    scales = [height if height == width else (height, width) for height, width in row["scales"]]
    grid = GazeGrid(scales, row["patch_size"])
    counts = torch.tensor(row["patches_each_frame"], dtype=torch.long)
    first = torch.arange(len(counts)).repeat_interleave(counts) * grid.num_patches
    pos = (torch.as_tensor(np.asarray(row["ids"], np.int64)) + first)[None]
    return GazeOutput.from_ids(
        pos,
        torch.zeros_like(pos, dtype=torch.bool),
        counts,
        grid,
        row["frame_sampling_rate"],
        clip_num_gazing_each_frame=counts[None],
    )
