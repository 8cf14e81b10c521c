"""
Training data: random clips of videos with labels, and batches of them as inputs of [`AutoGazeModel`].

`videos` reads the clips, `augmentation` augments them and `labels` makes the labels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..configuration_autogaze import AutoGazeConfig
from ..selection_autogaze import draw_settings
from ..token_budgets_autogaze import budget_each_frame
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .augmentation import ClipAugmentation
from .label_files import ClipLabels
from .labels import labels_from_gaze, selector_pixels
from .task import GazeTask
from .videos import VideoCollection


_SORTED_BATCHES = 16  # number of batches whose clips are sorted by their number of labels


@dataclass
class BudgetSchedule:
    """
    Draws the budget of each frame of a clip, and for some clips a threshold (docs/specification.md, section 13.1).

    The share of patches of the clip is drawn first, then spread over its frames. With a threshold, the labels of a frame end
    as soon as its task loss is low enough.

    Args:
        ratio_strategy (`str`, *optional*, defaults to `"exponential"`):
            Distribution of the share: `"fixed"` (it is `ratio_min`), `"uniform"` or `"exponential"` (small shares are likelier).
        ratio_min, ratio_max (`float`, *optional*, default to 0.02 and 0.6):
            Bounds of the share, 0..1.
        ratio_decay (`float`, *optional*, defaults to 6.0):
            Decay rate of the exponential distribution.
        dirichlet_share (`float`, *optional*, defaults to 0.5):
            Share of clips whose budget is spread over the frames by a Dirichlet distribution, with concentration 10 for the
            first frame and 3 for every later one. In the other clips, all frames have equal budgets.
        threshold_share (`float`, *optional*, defaults to 0.3):
            Share of clips with a threshold.
        threshold_min, threshold_max (`float`, *optional*, default to 0.3 and 1.0):
            Bounds of the threshold, which is drawn uniformly.

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
        default="exponential",
        metadata={"help": "Distribution of the share of patches: fixed, uniform or exponential."},
    )
    ratio_min: float = field(default=0.02, metadata={"help": "Lowest share of patches; the share if it is fixed."})
    ratio_max: float = field(default=0.6, metadata={"help": "Highest share of patches."})
    ratio_decay: float = field(default=6.0, metadata={"help": "Decay rate of the exponential distribution."})
    dirichlet_share: float = field(default=0.5, metadata={"help": "Share of clips whose frames have unequal budgets."})
    threshold_share: float = field(default=0.3, metadata={"help": "Share of clips with a threshold of the task loss."})
    threshold_min: float = field(default=0.3, metadata={"help": "Lowest threshold."})
    threshold_max: float = field(default=1.0, metadata={"help": "Highest threshold."})

    def __post_init__(self):
        strategies = ("fixed", "uniform", "exponential")
        if self.ratio_strategy not in strategies:
            raise ValueError(f"`ratio_strategy` must be one of {strategies}, got {self.ratio_strategy!r}")
        if not 0 <= self.ratio_min <= (1 if self.ratio_strategy == "fixed" else self.ratio_max) <= 1:
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
        Draws the budgets and the threshold of one clip.

        Args:
            num_frames (`int`): frames of the clip.
            generator (`torch.Generator`): source of random numbers.

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


class GazeClipDataset(Dataset):
    """
    Clips of videos with labels.

    Item `i` is a random clip of video `i % len(videos)`, augmented at random and labelled by greedy search. Items depend only on
    `seed` and the index, so they are the same on every machine, in every worker and after a restart. Indices beyond the length
    give further clips of the same videos, which [`ClipSampler`] uses for new clips in every epoch. A video that cannot be read
    is replaced by the next one that can.

    With `labels` from a file, the item of a video is the clip that was labelled: whole frames sampled evenly over the video,
    without augmentation. Videos without labels are left out.

    Args:
        videos ([`VideoCollection`], or its first argument): the videos.
        config ([`AutoGazeConfig`]): configuration of the model to train.
        num_frames (`int`, *optional*, defaults to 16):
            Frames of a clip, a multiple of the model's sampling rate. With `labels`, it follows from them.
        max_stride (`int`, *optional*, defaults to 4):
            A clip takes every n-th frame of its video, with n drawn from 1 to `max_stride` or to what the length of the video
            allows. The last frame of a video that is too short is repeated.
        clips_per_video (`int`, *optional*, defaults to 1): clips of each video in one epoch.
        augmentation ([`ClipAugmentation`], *optional*): augmentation of the clips, none by default.
        schedule ([`BudgetSchedule`], *optional*):
            Budgets of the labels. By default clips have no labels, which training on the model's own gazes does not need.
        task ([`GazeTask`], *optional*): task that the labels are made for, that of pixels by default.
        labels (`Mapping[str, ClipLabels]`, *optional*):
            Labels by the names of the videos, see [`read_labels`]; they replace random clips.
        processor ([`AutoGazeVideoProcessor`], *optional*): preprocessing of the frames, the published one by default.
        seed (`int`, *optional*, defaults to 0): seed of the random numbers.

    Raises:
        ValueError: if an argument is out of range, arguments exclude each other, or there is no video.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_autogaze import AutoGazeConfig
    >>> from transformers_autogaze.training.data import BudgetSchedule, GazeClipDataset

    >>> videos = [np.zeros((9, 48, 64, 3), dtype=np.uint8)]
    >>> config = AutoGazeConfig(scales=[32, 64], image_size=64, decoder_config={"num_multi_token_pred": 4})
    >>> schedule = BudgetSchedule("fixed", ratio_min=0.2, dirichlet_share=0, threshold_share=0)
    >>> clip = GazeClipDataset(videos, config, num_frames=2, schedule=schedule)[0]
    >>> clip["pixel_values_videos"].shape, clip["gazing_pos"]
    (torch.Size([2, 3, 64, 64]), [[0, 1, 2, 3], [0, 1, 2, 3]])

    ```
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
        task: GazeTask | None = None,
        labels: Mapping[str, ClipLabels] | None = None,
        processor: AutoGazeVideoProcessor | None = None,
        seed: int = 0,
    ):
        for name, value in (("max_stride", max_stride), ("clips_per_video", clips_per_video)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        rate = config.frame_sampling_rate
        if not isinstance(num_frames, int) or num_frames < 1 or num_frames % rate:
            raise ValueError(f"`num_frames` must be a positive multiple of {rate}, got {num_frames!r}")
        if labels is not None and (augmentation is not None or schedule is not None):
            raise ValueError("`labels` belong to whole frames: `augmentation` and `schedule` must be None with them")
        self.videos = videos if isinstance(videos, VideoCollection) else VideoCollection(videos)
        self.config = config
        self.num_frames = num_frames
        self.max_stride = max_stride
        self.clips_per_video = clips_per_video
        self.augmentation = augmentation
        self.schedule = schedule
        self.labels = labels
        self.processor = processor or AutoGazeVideoProcessor()
        self.seed = seed
        self.task = GazeTask(config.grid) if task is None else task
        if schedule is not None and schedule.threshold_share:
            self.task.check_thresholds(schedule.threshold_min, schedule.threshold_max)
        self._video_indices = [i for i, name in enumerate(self.videos.names) if labels is None or name in labels]
        if not self._video_indices:
            raise ValueError(
                f"`labels` must name videos of the collection, such as {self.videos.names[0]!r}, got labels of "
                f"{next(iter(labels), 'none')!r}"
            )

    def __len__(self) -> int:
        return len(self._video_indices) * self.clips_per_video

    @property
    def num_skipped(self) -> int:
        """Number of videos found unreadable so far."""
        return self.videos.num_skipped

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Returns one clip.

        Returns:
            `dict` with `pixel_values_videos`, a `torch.FloatTensor` of shape `(frames, 3, height, width)`, and, with
            labels, the fields of a [`ClipLabels`].

        Raises:
            ValueError: if no video can be read.
        """
        generator = _make_generator(self.seed, index)
        drawn = self._draw_budgets(generator)
        number, levels = self._read(index % len(self._video_indices), generator)
        size = self.config.grid.sizes[-1]
        if self.augmentation is None:
            pixels = selector_pixels(levels, self.processor, size)
        else:
            pixels = self.augmentation(levels, size, generator)
        item = {"pixel_values_videos": self.processor.to_pixel_values(pixels * 255)}
        gazed = pixels[:: self.config.frame_sampling_rate]
        if self.labels is not None:
            labels = self.labels[self.videos.names[number]]
            return {**item, **labels._asdict()}
        if drawn is None:
            return item
        budgets, threshold = drawn
        gaze = self.task.search(gazed[None], budgets.double() / self.config.grid.num_patches, threshold)
        return {**item, **labels_from_gaze(gaze)[0]._asdict()}

    def max_num_labels(self, index: int) -> int:
        """Returns the largest possible number of labels of an item, without making them."""
        if self.labels is not None:
            name = self.videos.names[self._video_indices[index % len(self._video_indices)]]
            return sum(len(ids) for ids in self.labels[name].gazing_pos)
        return 0 if self.schedule is None else int(self._draw_budgets(_make_generator(self.seed, index))[0].sum())

    def _draw_budgets(self, generator: torch.Generator) -> tuple[torch.Tensor, float | None] | None:
        """Draws the budget of every frame of gaze and the threshold, if there is a schedule."""
        if self.schedule is None:
            return None
        num_frames = self.num_frames // self.config.frame_sampling_rate
        ratios, threshold = self.schedule.draw(num_frames, generator)
        # Budgets are rounded up to whole decoding steps of the model.
        step, num_patches = self.config.decoder_config.num_multi_token_pred, self.config.grid.num_patches
        budgets = (budget_each_frame(ratios, num_frames, num_patches) + step - 1) // step * step
        return budgets.clamp(max=num_patches), threshold

    def _read(self, index: int, generator: torch.Generator) -> tuple[int, torch.Tensor]:
        """Reads a clip `(frames, 3, height, width)` in levels 0..255 of a video, or of the next one that can be read."""
        stride_draw, start_draw = torch.rand(2, generator=generator).tolist()

        def choose(total: int) -> range:
            longest = max(1, (total - 1) // max(1, self.num_frames - 1))
            stride = 1 + int(stride_draw * min(self.max_stride, longest))
            span = min(total, (self.num_frames - 1) * stride + 1)
            start = int(start_draw * (total - span + 1))
            return range(start, start + span, stride)

        for number in self._video_indices[index:] + self._video_indices[:index]:
            if self.labels is None:
                levels = self.videos.read_clip(number, choose)
            else:
                num_frames = len(self.labels[self.videos.names[number]].gazing_pos)
                levels = self.videos.read_evenly(number, num_frames * self.config.frame_sampling_rate)
            if levels is not None:
                missing = self.num_frames - len(levels) if self.labels is None else 0
                return number, torch.cat([levels, levels[-1:].expand(missing, -1, -1, -1)])
        raise ValueError(f"`videos` must hold a video that can be read, but all {self.num_skipped} failed")


class ClipSampler(Sampler[int]):
    """
    Samples the clips of a [`GazeClipDataset`] in random order, with new clips of all videos in every epoch.

    Clips with similar numbers of labels share a batch, since labels are padded to the longest of the batch.

    Args:
        dataset ([`GazeClipDataset`]): the clips.
        batch_size (`int`): clips of a batch, over all processes.
        seed (`int`): seed of the random numbers.
        epoch (`Callable`): returns the current epoch; called at the start of every iteration.
    """

    def __init__(self, dataset: GazeClipDataset, batch_size: int, seed: int, epoch: Callable[[], int]):
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        epoch, length = self.epoch(), len(self.dataset)
        generator = _make_generator(self.seed, epoch)
        order = (torch.randperm(length, generator=generator) + epoch * length).tolist()
        for start in range(0, length, self.batch_size * _SORTED_BATCHES):
            window = sorted(order[start : start + self.batch_size * _SORTED_BATCHES], key=self.dataset.max_num_labels)
            num_full = len(window) // self.batch_size
            for number in [*torch.randperm(num_full, generator=generator).tolist(), num_full]:
                yield from window[number * self.batch_size : (number + 1) * self.batch_size]


def _make_generator(*seeds: int) -> torch.Generator:
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class GazeCollator:
    """
    Collates clips into a batch, with the labels of each frame padded to the longest of the batch.

    Args:
        config ([`AutoGazeConfig`]): configuration of the model to train.

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
        Collates clips of equal length.

        Args:
            items (`Sequence[Mapping]`): items of a [`GazeClipDataset`].

        Returns:
            `dict` with arguments of [`AutoGazeModel.forward`]: `pixel_values_videos` and, if the items have labels,
            `gazing_pos`, `if_padded_gazing`, `num_gazing_each_frame`, `labels` and `task_loss_labels`.
        """
        batch = {"pixel_values_videos": torch.stack([item["pixel_values_videos"] for item in items])}
        if "gazing_pos" in items[0]:
            batch |= self._pad([ClipLabels(item["gazing_pos"], item["task_losses"]) for item in items])
        return batch

    def _pad(self, labels: Sequence[ClipLabels]) -> dict[str, torch.Tensor]:
        counts = torch.tensor([[len(ids) for ids in clip.gazing_pos] for clip in labels])
        longest = counts.amax(0)
        frame = torch.arange(len(longest)).repeat_interleave(longest)
        slot = torch.arange(len(frame)) - (longest.cumsum(0) - longest)[frame]
        is_real = slot < counts[:, frame]
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
