"""
Training data: random clips of videos, what to learn from them, and batches.

This module owns the way from video files to the inputs of [`AutoGazeModel`] with labels. How pixels are varied is
`augmentation`'s matter, what good labels are that of `labels`.
"""

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch.utils.data import Dataset, Sampler

from ..composite_autogaze import CompositeReconstruction, mse_to_task_loss, task_loss_to_mse
from ..configuration_autogaze import AutoGazeConfig
from ..selection_autogaze import budget_each_frame, draw_settings
from ..video_decoding_autogaze import read_video, stream_video
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .augmentation import ClipAugmentation, resize_pixels
from .labels import ClipLabels, label_clip


VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_HELD_EDGE = 320  # pixels of the shorter side of frames that are held in memory, at most
_LEAST_CELL_MSE = 1e-6  # of a cell that is worth telling from a perfect one


@dataclass
class BudgetSchedule:
    """
    Draws, clip by clip, how many patches the labels of each frame hold (SPEC, "Training").

    The share of all patches that a clip may use is drawn first, then spread over its frames; in some clips a frame ends
    earlier, as soon as its task loss is low enough.

    Args:
        ratio_strategy (`str`, *optional*, defaults to `"exponential"`):
            How the share is drawn: `"fixed"` (it is `ratio_min`), `"uniform"` or `"exponential"`, small ones likelier.
        ratio_min, ratio_max (`float`, *optional*, default to 0.02 and 0.6):
            Bounds of the share, 0..1.
        ratio_decay (`float`, *optional*, defaults to 6.0):
            How fast an exponential share grows rare.
        dirichlet_share (`float`, *optional*, defaults to 0.5):
            Share of clips whose patches are spread over the frames by a Dirichlet law, in which the first frame has the
            weight 10 and every later one 3. The others' frames get equally many.
        threshold_share (`float`, *optional*, defaults to 0.3):
            Share of clips whose frames end at a threshold.
        threshold_min, threshold_max (`float`, *optional*, default to 0.3 and 1.0):
            Its bounds, uniformly drawn.

    Raises:
        ValueError: if one of them is out of range.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.training.data import BudgetSchedule

    >>> schedule = BudgetSchedule("fixed", ratio_min=0.1, dirichlet_share=0, threshold_share=0)
    >>> ratios, threshold = schedule.draw(num_frames=3, generator=torch.Generator().manual_seed(0))
    >>> [round(ratio, 3) for ratio in ratios.tolist()], threshold
    ([0.1, 0.1, 0.1], None)

    ```
    """

    ratio_strategy: str = field(
        default="exponential", metadata={"help": "How the share of patches is drawn: fixed, uniform or exponential."}
    )
    ratio_min: float = field(default=0.02, metadata={"help": "Lowest share of patches; the share if it is fixed."})
    ratio_max: float = field(default=0.6, metadata={"help": "Highest share of patches."})
    ratio_decay: float = field(default=6.0, metadata={"help": "How fast an exponential share grows rare."})
    dirichlet_share: float = field(
        default=0.5, metadata={"help": "Share of clips whose frames get unequally many patches."}
    )
    threshold_share: float = field(
        default=0.3, metadata={"help": "Share of clips whose frames end at a task loss that is low enough."}
    )
    threshold_min: float = field(default=0.3, metadata={"help": "Lowest of these task losses."})
    threshold_max: float = field(default=1.0, metadata={"help": "Highest of these task losses."})

    def __post_init__(self):
        strategies = ("fixed", "uniform", "exponential")
        if self.ratio_strategy not in strategies:
            raise ValueError(f"`ratio_strategy` must be one of {strategies}, got {self.ratio_strategy!r}")
        if not 0 <= self.ratio_min <= self.ratio_max <= 1:
            raise ValueError(
                f"`ratio_min` and `ratio_max` must lie in 0..1 in this order, got {self.ratio_min} and {self.ratio_max}"
            )
        if not self.ratio_decay > 0:
            raise ValueError(f"`ratio_decay` must be above 0, got {self.ratio_decay}")
        for name in ("dirichlet_share", "threshold_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, a share of the clips, got {getattr(self, name)}")
        if not self.threshold_min <= self.threshold_max:
            raise ValueError(
                "`threshold_min` and `threshold_max` must be two numbers in this order, got "
                f"{self.threshold_min} and {self.threshold_max}"
            )

    def draw(self, num_frames: int, generator: torch.Generator) -> tuple[torch.Tensor, float | None]:
        """
        Draws for one clip.

        Args:
            num_frames (`int`): frames of the clip.
            generator (`torch.Generator`): where random numbers come from.

        Returns:
            `tuple`: ratios, a `torch.FloatTensor` of shape `(frames,)`, and a threshold or `None`.
        """
        is_spread, has_threshold = (
            float(torch.rand((), generator=generator)) < share
            for share in (self.dirichlet_share, self.threshold_share)
        )
        bounds = {"gazing_ratio_min": self.ratio_min, "gazing_ratio_max": self.ratio_max}
        strategies = SimpleNamespace(
            gazing_ratio_config={
                "sample_strategy_during_training": self.ratio_strategy,
                "fixed": {"gazing_ratio": self.ratio_min},
                "uniform": bounds,
                "exponential": {**bounds, "lambda": self.ratio_decay},
            },
            gazing_ratio_each_frame_config={
                "sample_strategy_during_training": "dirichlet" if is_spread else "uniform",
                "dirichlet": {"alpha": [10.0] + [3.0] * (num_frames - 1)},
                "uniform": {},
            },
            task_loss_requirement_config={
                "sample_strategy_during_training": "uniform",
                "uniform": {
                    "task_loss_requirement_min": self.threshold_min,
                    "task_loss_requirement_max": self.threshold_max,
                },
            },
            has_task_loss_requirement_during_training=has_threshold,
        )
        return draw_settings(strategies, num_frames, is_training=True, generator=generator)


def find_videos(folder: str | os.PathLike) -> list[str]:
    """
    Lists the video files of a folder and of the folders in it, in order of their names.

    Args:
        folder (`str` or `os.PathLike`): where to look; files ending in one of `VIDEO_SUFFIXES` count.

    Raises:
        ValueError: if it is no folder or holds no video.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder of videos, but there is no folder {str(folder)!r}")
    found = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ValueError(f"`folder` {str(folder)!r} must hold videos ({', '.join(VIDEO_SUFFIXES)}), found none")
    return found


class GazeClipDataset(Dataset):
    """
    Random clips of videos, with what to learn from each.

    Item `i` is a clip of video `i % len(videos)`, drawn and varied at random; the random numbers follow from `seed` and
    `i` alone, so item `i` is the same on every machine, in every worker and after a restart. Indices beyond the length
    give further clips of the same videos, which is how [`ClipSampler`] makes every epoch new.

    Videos that cannot be read are left out: one warning names the first, `num_skipped` counts them, and their items are
    clips of other videos.

    Args:
        videos (`str`, `os.PathLike` or sequence):
            A folder; or a sequence of paths, URLs, contents (`bytes`) or frames (arrays of shape `(frames, height,
            width, 3)`, levels 0..255); or a `datasets` dataset with one of these, or PIL images, in a column.
        config ([`AutoGazeConfig`]): of the model to train: its patches and sizes.
        num_frames (`int`, *optional*, defaults to 16): frames of a clip, a multiple of the model's sampling rate.
        max_stride (`int`, *optional*, defaults to 4):
            A clip takes every n-th frame of its video, n drawn from 1 to this, or what the video is long enough for.
            Where even 1 is too much, the last frame repeats.
        clips_per_video (`int`, *optional*, defaults to 1): clips of each video in one epoch.
        augmentation ([`ClipAugmentation`], *optional*):
            How clips are varied; `None` for clips of whole frames.
        schedule ([`BudgetSchedule`], *optional*):
            How long labels are. `None` leaves labels away, as training on the model's own gazes needs none.
        column (`str`, *optional*, defaults to `"video"`): the column of a `datasets` dataset that holds the videos.
        in_memory (`bool`, *optional*, defaults to `False`):
            Whether to decode all videos once and hold them, at most 320 pixels on the shorter side. Fast for a small
            collection: a second of video takes 4 MB or so. Else clips are decoded whenever they are asked for.
        processor ([`AutoGazeVideoProcessor`], *optional*): how pixels are normalised; the published way by default.
        seed (`int`, *optional*, defaults to 0): where random numbers start from.

    Raises:
        ValueError: if an argument is out of range or there is no video.
    """

    def __init__(
        self,
        videos: Any,
        config: AutoGazeConfig,
        num_frames: int = 16,
        max_stride: int = 4,
        clips_per_video: int = 1,
        augmentation: ClipAugmentation | None = None,
        schedule: BudgetSchedule | None = None,
        column: str = "video",
        in_memory: bool = False,
        processor: AutoGazeVideoProcessor | None = None,
        seed: int = 0,
    ):
        for name, value in (("max_stride", max_stride), ("clips_per_video", clips_per_video)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        rate = config.frame_sampling_rate
        if not isinstance(num_frames, int) or num_frames < 1 or num_frames % rate:
            raise ValueError(f"`num_frames` must be a positive multiple of {rate}, got {num_frames!r}")
        self.videos = find_videos(videos) if isinstance(videos, (str, os.PathLike)) else videos
        if not len(self.videos):
            raise ValueError("`videos` must hold at least one video, got none")
        self.config = config
        self.num_frames = num_frames
        self.max_stride = max_stride
        self.clips_per_video = clips_per_video
        self.augmentation = augmentation
        self.schedule = schedule
        self.column = column
        self.processor = processor or AutoGazeVideoProcessor()
        self.seed = seed
        self.composite = CompositeReconstruction(config.grid)
        # Shared, so that what one worker finds unreadable all know of.
        self._is_broken = torch.zeros(len(self.videos), dtype=torch.bool).share_memory_()
        self._num_frames_of: dict[int, int] = {}
        self._held: list[torch.Tensor | None] | None = None
        if in_memory:
            numbers = tqdm(range(len(self.videos)), unit="video", desc="decoding")
            self._held = [self._try(self._load_whole, number) for number in numbers]
            self._check_any_left()

    def __len__(self) -> int:
        return len(self.videos) * self.clips_per_video

    @property
    def num_skipped(self) -> int:
        """Videos found unreadable so far."""
        return int(self._is_broken.sum())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Gives one clip.

        Returns:
            `dict` with `pixel_values_videos`, a `torch.FloatTensor` of shape `(frames, 3, height, width)`, and, with
            labels, those of a [`ClipLabels`] and `cell_losses`, a `torch.FloatTensor` of shape `(frames of gaze, scales,
            *cells)`: the task loss of every cell as it stands before the frame's patches are laid, and with each scale
            but the finest laid there.
        """
        entropy = np.random.SeedSequence([self.seed, index])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        size = self.config.grid.sizes[-1]
        levels = self._draw_clip(index % len(self.videos), generator)
        if self.augmentation is None:
            pixels = resize_pixels(levels, size)
        else:
            pixels = self.augmentation(levels, size, generator)
        item = {"pixel_values_videos": self.processor.to_pixel_values(pixels * 255)}
        if self.schedule is not None:
            item |= self._label(pixels[:: self.config.frame_sampling_rate], generator)
        return item

    def _label(self, pixels: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
        ratios, threshold = self.schedule.draw(len(pixels), generator)
        budgets = budget_each_frame(ratios, len(pixels), self.config.grid.num_patches)
        limit = None if threshold is None else task_loss_to_mse(torch.full((len(pixels),), threshold))
        labels, standing = label_clip(self.composite, pixels, budgets, limit)
        errors = self.composite.cell_errors(pixels, standing)[:, :-1]
        values_in_cell = pixels[0].numel() / errors[0, 0].numel()
        losses = mse_to_task_loss((errors / values_in_cell).clamp(min=_LEAST_CELL_MSE))
        return {**labels._asdict(), "cell_losses": losses.float()}

    def _draw_clip(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """Draws a clip of a video, or of the next one that can be read: `(frames, 3, height, width)`, levels 0..255."""
        places = torch.rand(2, generator=generator).tolist()
        for candidate in itertools.chain(range(number, len(self.videos)), range(number)):
            if not self._is_broken[candidate]:
                levels = self._try(self._take_clip, candidate, *places)
                if levels is not None:
                    return levels
        self._check_any_left()

    def _take_clip(self, number: int, stride_place: float, start_place: float) -> torch.Tensor:
        total = self._count_frames(number)
        longest = max(1, (total - 1) // max(1, self.num_frames - 1))
        stride = 1 + int(stride_place * min(self.max_stride, longest))
        span = min(total, (self.num_frames - 1) * stride + 1)
        start = int(start_place * (total - span + 1))
        if self._held is not None:
            levels = self._held[number][start : start + span : stride]
        else:
            levels = self._decode(self._source(number), start, span, stride)
        if len(levels) < self.num_frames:
            levels = torch.cat([levels, levels[-1:].expand(self.num_frames - len(levels), -1, -1, -1)])
        return levels

    def _count_frames(self, number: int) -> int:
        if self._held is not None:
            return len(self._held[number])
        if number not in self._num_frames_of:
            source = self._source(number)
            is_file = isinstance(source, (str, bytes))
            self._num_frames_of[number] = stream_video(source)[0].total_num_frames if is_file else len(source)
        return self._num_frames_of[number]

    @staticmethod
    def _decode(source: Any, start: int, span: int, stride: int) -> torch.Tensor:
        if not isinstance(source, (str, bytes)):
            return _to_levels(source[start : start + span : stride])
        frames = itertools.islice(stream_video(source, start_frame=start)[1], 0, span, stride)
        return _to_levels(np.stack(list(frames)))

    def _load_whole(self, number: int) -> torch.Tensor:
        source = self._source(number)
        levels = _to_levels(read_video(source)[0] if isinstance(source, (str, bytes)) else source)
        height, width = levels.shape[-2:]
        shrink = min(1.0, _HELD_EDGE / min(height, width))
        return self.processor.resize_levels(levels, (round(height * shrink), round(width * shrink)))

    def _source(self, number: int) -> str | bytes | np.ndarray:
        """Finds what to decode of a video: a path, its contents, or its frames."""
        video = self.videos[number]
        if isinstance(video, Mapping) and self.column in video:
            video = video[self.column]
        if isinstance(video, Mapping):
            video = video["path"] if video.get("bytes") is None else video["bytes"]
        if isinstance(video, (str, os.PathLike)):
            return os.fspath(video)
        if isinstance(video, bytes):
            return video
        frames = np.asarray(video.convert("RGB"))[None] if hasattr(video, "convert") else np.asarray(video)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                f"video {number} must be a path, contents, an image, or levels 0..255 of shape (frames, height, width, "
                f"3), got {type(video).__name__} of shape {frames.shape} and type {frames.dtype}"
            )
        return frames

    def _try(self, load: Callable[..., torch.Tensor], number: int, *arguments: Any) -> torch.Tensor | None:
        """Loads something of a video; `None`, and never again, if it cannot be read."""
        try:
            return load(number, *arguments)
        except (ValueError, OSError) as error:
            if not self.num_skipped:
                warnings.warn(
                    f"a video cannot be read and is skipped, and so will be others like it: {error}", stacklevel=2
                )
            self._is_broken[number] = True

    def _check_any_left(self) -> None:
        if self.num_skipped == len(self.videos):
            raise ValueError(f"`videos` must hold a video that can be read, but all {self.num_skipped} failed")


def _to_levels(frames: np.ndarray) -> torch.Tensor:
    # Channels stay last in memory, where resizing is fastest.
    return torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)


class ClipSampler(Sampler[int]):
    """
    Orders the clips of a [`GazeClipDataset`] at random, and takes new clips of all videos in every epoch.

    Args:
        length (`int`): items of an epoch.
        seed (`int`): where random numbers start from.
        epoch (`Callable`): tells, whenever an iteration begins, which epoch it is of.

    Example:

    ```python
    >>> from transformers_autogaze.training.data import ClipSampler

    >>> sorted(ClipSampler(length=3, seed=0, epoch=lambda: 2))
    [6, 7, 8]

    ```
    """

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]):
        self.length = length
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        place = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(place))
        yield from (order + epoch * self.length).tolist()


class GazeCollator:
    """
    Makes batches of clips, padding their labels frame by frame to the longest of the batch.

    Args:
        config ([`AutoGazeConfig`]): of the model to train.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import AutoGazeConfig
    >>> from transformers_autogaze.training.data import GazeCollator

    >>> clips = [
    ...     {"pixel_values_videos": torch.zeros(2, 3, 32, 32), "gazing_pos": ids, "task_losses": losses}
    ...     for ids, losses in (([[0, 3], [1]], [[0.9, 0.8], [0.7]]), ([[2], [4]], [[0.5], [0.25]]))
    ... ]
    >>> batch = GazeCollator(AutoGazeConfig(scales=[16, 32], image_size=32))(clips)
    >>> batch["num_gazing_each_frame"].tolist(), batch["labels"].tolist()
    ([2, 1], [[0, 3, 6], [2, -100, 9]])

    ```
    """

    def __init__(self, config: AutoGazeConfig):
        self.num_patches = config.grid.num_patches

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collates clips of one length.

        Args:
            items (`Sequence[Mapping]`): what a [`GazeClipDataset`] gives.

        Returns:
            `dict` with what [`AutoGazeModel`] is called with: `pixel_values_videos` and, where the items have labels,
            `gazing_pos`, `if_padded_gazing`, `num_gazing_each_frame`, `labels` and `task_loss_labels`; also
            `cell_losses` where they have them.
        """
        batch = {
            key: torch.stack([item[key] for item in items])
            for key in ("pixel_values_videos", "cell_losses")
            if key in items[0]
        }
        if "gazing_pos" in items[0]:
            batch |= self._pad([ClipLabels(item["gazing_pos"], item["task_losses"]) for item in items])
        return batch

    def _pad(self, labels: Sequence[ClipLabels]) -> dict[str, torch.Tensor]:
        counts = torch.tensor([[len(ids) for ids in clip.gazing_pos] for clip in labels])
        longest = counts.amax(0)
        frame = torch.arange(len(longest)).repeat_interleave(longest)
        place = torch.arange(len(frame)) - (longest.cumsum(0) - longest)[frame]
        is_real = place < counts[:, frame]
        ids = torch.full(is_real.shape, self.num_patches)
        losses = torch.full(is_real.shape, torch.nan)
        ids[is_real] = torch.tensor([id for clip in labels for frame_ids in clip.gazing_pos for id in frame_ids])
        losses[is_real] = torch.tensor(
            [x for clip in labels for frame_losses in clip.task_losses for x in frame_losses]
        )
        ids += frame * self.num_patches
        return {
            "gazing_pos": ids,
            "if_padded_gazing": ~is_real,
            "num_gazing_each_frame": longest,
            "labels": ids.masked_fill(~is_real, -100),
            "task_loss_labels": losses,
        }
