"""Makes the row of a video: its kept patches in plain columns, or the reason why it could not be pruned."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..hub.checkpoints import load_selector
from ..processing_autogaze import AutoGazeProcessor
from ..pruning.video_pruning import VideoPruning, prune_video
from ..selection_autogaze import GazeSelector
from ..token_budgets_autogaze import check_budgets
from ..video.writing import write_video


_MAX_ERROR_CHARS = 1000
_NO_VALUES = dict.fromkeys(
    """
    error width height fps duration frame_indices frame_times scales patch_size frame_sampling_rate extent ids
    patches_each_frame patches_each_scale num_frames num_patches kept_ratio reduction_factor psnr
    """.split()
)


@dataclass(frozen=True)
class PruneSettings:
    """
    Settings that all videos of a dataset are pruned with; equal settings give equal rows.

    Args:
        selector (`str`, *optional*, defaults to `"features"`):
            A folder, a repository of the Hub, or a name of [`~checkpoints.SHIPPED_SELECTORS`].
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
        Checks the settings before any video is opened, by pruning a tiny black clip.

        Raises:
            ValueError: if there is no such selector, or a setting is out of range or not supported by the selector.
        """
        check_budgets(
            gazing_ratio=self.gazing_ratio,
            task_loss_requirement=self.task_loss_requirement,
            clip_ratio=self.clip_ratio,
            tokens_per_second=self.tokens_per_second,
        )
        selector, processor = self.load()
        with tempfile.TemporaryDirectory() as folder:
            # The clip has two frames, whatever `num_frames` is; a video with too few frames gets a row with its error.
            clip = write_video(Path(folder) / "clip.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=self.fps or 30)
            replace(self, num_frames=None).open(clip, selector, processor)

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
    Prunes a video and makes its row, also of a video that cannot be read.

    Args:
        identity (`str`): name of the video, unique in its dataset.
        source: the video, as [`prune_video`] takes it.
        selector ([`GazeSelector`]): chooses the patches.
        processor ([`AutoGazeProcessor`], *optional*): the selector's preprocessing; see [`prune_video`].
        settings ([`PruneSettings`], *optional*): budgets and frames; those of `PruneSettings()` by default.

    Returns:
        `dict`: the columns of docs/scale.md. If the video can be pruned, `error` is `None`; if not, all but `identity` and
        `error` are.

    Example:

    ```python
    >>> from transformers_autogaze import GreedyGazeSelector
    >>> from transformers_autogaze.dataset_pruning import gaze_of_row, prune_to_row

    >>> row = prune_to_row("still", np.zeros((20, 90, 160, 3), dtype=np.uint8), GreedyGazeSelector())
    >>> row["num_frames"], row["num_patches"], gaze_of_row(row).num_frames
    (20, 23, 20)
    >>> prune_to_row("text", b"no video", GreedyGazeSelector())["error"][:46]
    'ValueError: `source` of 8 bytes is not a video'

    ```
    """
    try:
        return row_of(identity, (settings or PruneSettings()).open(source, selector, processor))
    except Exception as error:  # A broken file can raise anything.
        return row_of_error(identity, error)


def row_of(identity: str, pruning: VideoPruning) -> dict[str, Any]:
    """Makes the row of a video; raises the errors of decoding it."""
    gaze, statistics, metadata = pruning.gaze, pruning.statistics, pruning.video.metadata
    ids = [own.numpy() for own in gaze.ids_each_frame()]
    scales = [list(scale) if isinstance(scale, tuple) else [scale, scale] for scale in gaze.scales]
    return {
        "identity": identity,
        **_NO_VALUES,
        "width": metadata.width,
        "height": metadata.height,
        "fps": metadata.fps,
        "duration": metadata.duration,
        "frame_indices": pruning.frame_indices,
        "frame_times": pruning.frame_times,
        "scales": scales,
        "patch_size": gaze.patch_size,
        "frame_sampling_rate": gaze.frame_sampling_rate,
        # Tiles of frames at their own size may reach beyond the frame.
        "extent": scales[-1] if pruning.tiles == "native" else [metadata.height, metadata.width],
        "ids": np.concatenate(ids).astype(np.int32),
        **statistics,
        "patches_each_scale": list(statistics["patches_each_scale"].values()),
    }


def row_of_error(identity: str, error: Exception | str) -> dict[str, Any]:
    """Makes the row of a video that could not be pruned, with the reason on one line."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return {"identity": identity, **_NO_VALUES, "error": " ".join(text.split())[:_MAX_ERROR_CHARS]}


def gaze_of_row(row: Mapping[str, Any]) -> GazeOutput:
    """
    Converts a row to a gaze.

    Args:
        row (`Mapping`): the row of a video that could be pruned.

    Returns:
        [`GazeOutput`]: the kept patches as a batch of one, those of each frame in the order of choice.

    Raises:
        ValueError: if the row has an error.
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
