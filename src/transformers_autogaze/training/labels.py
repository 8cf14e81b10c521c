"""
Labelling of clips and collections of videos by greedy search.

Labels are the patches of each frame to keep, in the order of choice, and the task loss after each. `label_files` reads and writes
them.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..composite_autogaze import CompositeReconstruction
from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import resize_frames
from ..token_budgets_autogaze import budget_each_frame, threshold_each_frame
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .label_files import (
    ClipLabels,
    UnfinishedLabels,
    read_file_sizes,
    read_label_settings,
    read_labels,
    write_labels,
)
from .task import GazeTask, fingerprint
from .videos import VideoCollection


class GreedyLabeller:
    """
    Labels clips by greedy search: each next patch lowers the task loss of its frame most.

    With a [`GazeTask`], of pixels or of features, the search is exact. Any other reconstruction has to rebuild the frame for
    every candidate. There, the `beam` patches with the largest gains of the closed-form reconstruction are the candidates, and a
    frame ends early if none of them lowers its loss. The losses of a frame never rise.

    Args:
        grid ([`GazeGrid`]): the patches to choose from.
        reconstruction (`Callable`, *optional*):
            Source of the task loss: a [`GazeTask`], that of pixels by default, or a function that is called as
            `reconstruction(pixels, gaze, frames)` and returns a [`ReconstructionOutput`].
        gazing_ratio (`float` or `Sequence[float]`, *optional*, defaults to 0.1):
            Largest share of the patches of a frame to choose, one number or one for every frame.
        task_loss_requirement (`float`, *optional*): task loss at which a frame ends; none by default.
        beam (`int`, *optional*, defaults to 16): candidates at each step, for other reconstructions.

    Raises:
        ValueError: if `beam` is not a positive whole number, `reconstruction` cannot be called or is of another grid, or a
            ratio or threshold is out of range.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.training.labels import GreedyLabeller

    >>> pixels = torch.full((1, 2, 3, 32, 32), 0.5)
    >>> pixels[..., 16:, 16:] = 1.0  # a white patch in the last corner of both frames
    >>> GreedyLabeller(GazeGrid([16, 32]), gazing_ratio=0.4, task_loss_requirement=0.0)(pixels)[0].gazing_pos
    [[4], [1]]

    ```
    """

    def __init__(
        self,
        grid: GazeGrid,
        reconstruction: Callable[..., Any] | None = None,
        gazing_ratio: float | Sequence[float] = 0.1,
        task_loss_requirement: float | None = None,
        beam: int = 16,
    ):
        if reconstruction is not None and not callable(reconstruction):
            raise ValueError(f"`reconstruction` must be callable, got {type(reconstruction).__name__}")
        if not isinstance(beam, int) or beam < 1:
            raise ValueError(f"`beam` must be a whole number of at least 1, got {beam!r}")
        budget_each_frame(gazing_ratio, len(gazing_ratio) if isinstance(gazing_ratio, Sequence) else 1, 1)
        self.reconstruction = GazeTask(grid) if reconstruction is None else reconstruction
        self.grid = grid
        if isinstance(self.reconstruction, GazeTask) and self.reconstruction.grid != grid:
            raise ValueError(f"`grid` must be that of the task, {self.reconstruction.grid}, got {grid}")
        if task_loss_requirement is not None:
            threshold = threshold_each_frame(task_loss_requirement, 1, 1)
            if isinstance(self.reconstruction, GazeTask):
                self.reconstruction.selector.check_task_loss_requirement(threshold)
        self.gazing_ratio = gazing_ratio
        self.task_loss_requirement = task_loss_requirement
        self.beam = beam
        self.composite = CompositeReconstruction(grid)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that identify the labels, for JSON."""
        task_settings = {
            **GazeTask(self.grid).settings,
            "task": getattr(self.reconstruction, "__name__", type(self.reconstruction).__name__),
            "weights": fingerprint(self.reconstruction) if isinstance(self.reconstruction, nn.Module) else None,
            "beam": self.beam,
        }
        return {
            "gazing_ratio": [*self.gazing_ratio] if isinstance(self.gazing_ratio, Sequence) else self.gazing_ratio,
            "task_loss_requirement": self.task_loss_requirement,
            **(self.reconstruction.settings if isinstance(self.reconstruction, GazeTask) else task_settings),
        }

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> list[ClipLabels]:
        """
        Labels clips.

        Args:
            pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
                Pixels in 0..1, one frame per frame of gaze, in the size of the grid's finest scale.

        Returns:
            `list[ClipLabels]`, one for each clip.

        Raises:
            ValueError: if the ratios are not one for every frame, or the pixels not as above.
        """
        if isinstance(self.reconstruction, GazeTask):
            self.reconstruction.to(pixels.device)
            return labels_from_gaze(self.reconstruction.search(pixels, self.gazing_ratio, self.task_loss_requirement))
        budgets = budget_each_frame(self.gazing_ratio, pixels.shape[1], self.grid.num_patches).tolist()
        return [self._search(clip[None], budgets) for clip in pixels]

    def _search(self, pixels: torch.Tensor, budgets: list[int]) -> ClipLabels:
        """Labels a clip `(1, frames, 3, height, width)` with a reconstruction other than the closed form."""
        labels, previous_reconstruction = ClipLabels([], []), torch.full_like(pixels[:, 0], 0.5)
        for t, budget in enumerate(budgets):
            frame = pixels[:, t]
            errors = self.composite.cell_errors(frame, previous_reconstruction)
            kept = torch.zeros(1, self.grid.num_patches, dtype=torch.bool, device=pixels.device)
            ids: list[int] = []
            losses: list[float] = []
            while len(ids) < budget:
                gains = self.composite.gains(errors, kept)[0].masked_fill(kept[0], -torch.inf)
                candidates = gains.topk(min(self.beam, self.grid.num_patches - len(ids))).indices
                loss = self._measure_candidates(pixels[:, : t + 1], [*labels.gazing_pos, ids], candidates)
                best = int(loss.argmin())
                if losses and loss[best] > losses[-1]:
                    break
                ids.append(int(candidates[best]))
                losses.append(float(loss[best]))
                kept[0, ids[-1]] = True
                if self.task_loss_requirement is not None and losses[-1] <= self.task_loss_requirement:
                    break
            labels.gazing_pos.append(ids)
            labels.task_losses.append(losses)
            masks = [mask[:, None] for mask in self.grid.split_by_scale(kept)]
            previous_reconstruction = self.composite.reconstruct(frame[:, None], masks, previous_reconstruction)[:, 0]
        return labels

    def _measure_candidates(
        self, pixels: torch.Tensor, ids: list[list[int]], candidates: torch.Tensor
    ) -> torch.Tensor:
        """Returns the loss of the last frame with each candidate added to its patches, `(candidates,)`."""
        count = len(candidates)
        chosen = torch.tensor(
            [id + t * self.grid.num_patches for t, frame_ids in enumerate(ids) for id in frame_ids],
            dtype=torch.long,
            device=pixels.device,
        )
        last = candidates[:, None] + (len(ids) - 1) * self.grid.num_patches
        gazing_pos = torch.cat([chosen.expand(count, -1), last], dim=1)
        counts = torch.tensor([len(frame_ids) for frame_ids in ids], device=pixels.device)
        counts[-1] += 1
        gaze = GazeOutput.from_ids(gazing_pos, torch.zeros_like(gazing_pos, dtype=torch.bool), counts, self.grid)
        return self.reconstruction(pixels.expand(count, -1, -1, -1, -1), gaze, [len(ids) - 1]).loss[:, 0]


def labels_from_gaze(gaze: GazeOutput) -> list[ClipLabels]:
    """
    Converts a gaze to labels.

    Args:
        gaze ([`GazeOutput`]): patches in the order of choice, with the `task_loss_prediction` after each.

    Returns:
        `list[ClipLabels]`, one for each clip.
    """
    ids = gaze.gazing_pos - gaze.frame_of_slot * gaze.grid.num_patches
    counts, is_real = gaze.num_gazing_each_frame.tolist(), ~gaze.if_padded_gazing
    return [
        ClipLabels(
            *(
                [part[is_kept].tolist() for part, is_kept in zip(*(x.split(counts) for x in (row, real)), strict=True)]
                for row in (clip_ids, losses)
            )
        )
        for clip_ids, losses, real in zip(ids, gaze.task_loss_prediction, is_real, strict=True)
    ]


def selector_pixels(levels: torch.Tensor, processor: AutoGazeVideoProcessor, size: tuple[int, int]) -> torch.Tensor:
    """
    Preprocesses whole frames to the pixels that a selector sees.

    Args:
        levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255.
        processor ([`AutoGazeVideoProcessor`]): preprocessing of the frames.
        size (`tuple[int, int]`): height and width of the finest scale.

    Returns:
        `torch.FloatTensor` of shape `(frames, 3, *size)`: pixels in 0..1.
    """
    frames = processor.resize_levels(levels).float() / 255
    return resize_frames(frames[None], size)[0].clamp(0, 1)


class _EvenClips(Dataset):
    """Pixels of evenly sampled clips of some videos; `None` for a video that cannot be read."""

    def __init__(self, videos: VideoCollection, indices: list[int], num_frames: int, size: tuple[int, int]):
        self.videos = videos
        self.indices = indices
        self.num_frames = num_frames
        self.size = size
        self.processor = AutoGazeVideoProcessor()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | None]:
        video_index = self.indices[index]
        levels = self.videos.read_evenly(video_index, self.num_frames)
        return self.videos.names[video_index], None if levels is None else selector_pixels(
            levels, self.processor, self.size
        )


def label_videos(
    videos: VideoCollection,
    labeller: GreedyLabeller,
    output: str | os.PathLike,
    num_frames: int = 16,
    batch_size: int = 8,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    shard: tuple[int, int] = (1, 1),
) -> Path:
    """
    Labels a collection of videos, one clip of each, and writes the published JSON.

    Until all videos are labelled, finished labels are in a file beside the output, from which an interrupted run is resumed.
    A finished output is extended by labels of videos that it does not have yet. Several runs, on any number of machines, can
    each label one shard of the same collection.

    Args:
        videos ([`VideoCollection`]): the videos; those that cannot be read, or are too short, are skipped.
        labeller ([`GreedyLabeller`]): makes the labels.
        output (`str` or `os.PathLike`): `.json` file to write; with several shards the shard is added to its name.
        num_frames (`int`, *optional*, defaults to 16): frames of a clip, sampled evenly over the video.
        batch_size (`int`, *optional*, defaults to 8): clips in a batch.
        num_workers (`int`, *optional*, defaults to 0): processes that decode.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): device of the search.
        shard (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): number of the shard, from 1, and number of shards.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if a number is out of range, the output is no `.json`, an existing output has other settings or labels of
            other videos of the same names, another process writes to it, or no video can be read.
    """
    number, num_shards = shard
    if not 1 <= number <= num_shards:
        raise ValueError(f"`shard` must be a number in 1..{num_shards} and the number of shards, got {shard}")
    for name, value, minimum in (
        ("num_frames", num_frames, 1),
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if type(value) is not int or value < minimum:
            raise ValueError(f"`{name}` must be a whole number of at least {minimum}, got {value!r}")
    output = Path(output)
    if output.suffix != ".json":
        raise ValueError(f"`output` must end in .json, got {str(output)!r}")
    if num_shards > 1:
        output = output.with_stem(f"{output.stem}-{number:05}-of-{num_shards:05}")
    settings = {"num_frames": num_frames, **labeller.settings}
    indices, file_sizes = list(range(number - 1, len(videos), num_shards)), videos.file_sizes
    finished = _read_finished(output, settings, file_sizes)
    if output.exists() and finished.keys() >= {videos.names[i] for i in indices}:
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with UnfinishedLabels(output, settings, file_sizes) as unfinished:
        # Another process may have finished since the check above.
        finished = _read_finished(output, settings, file_sizes)
        missing = [i for i in indices if videos.names[i] not in {**finished, **unfinished.done}]
        clips = _EvenClips(videos, missing, num_frames, labeller.grid.sizes[-1])
        loader = DataLoader(clips, batch_size, num_workers=num_workers, collate_fn=list)
        with tqdm(total=len(indices), initial=len(indices) - len(missing), unit="video", desc="labelling") as progress:
            for batch in loader:
                unfinished.add(_label_batch(labeller, batch, device))
                progress.update(len(batch))
        done = {**finished, **unfinished.done}
        # Labels of videos that no longer exist are kept.
        names = [videos.names[i] for i in indices if videos.names[i] in done]
        if names or not indices:
            _write_finished(output, {name: done[name] for name in (*names, *finished)}, finished, settings, file_sizes)
        unfinished.remove()
    if indices and not names:
        raise ValueError(f"`videos` must hold videos of {num_frames} frames that can be read, got none")
    return output


def _label_batch(
    labeller: GreedyLabeller, batch: list[tuple[str, torch.Tensor | None]], device: str | torch.device
) -> dict[str, ClipLabels]:
    """Labels the clips of a batch that could be read."""
    readable = {name: pixels for name, pixels in batch if pixels is not None}
    if not readable:
        return {}
    labels = labeller(torch.stack(list(readable.values())).to(device))
    return dict(zip(readable, labels, strict=True))


def _read_finished(output: Path, settings: dict[str, Any], file_sizes: dict[str, int]) -> dict[str, ClipLabels]:
    """Reads the labels of an earlier run; raises a `ValueError` if their settings or videos differ."""
    if not output.exists():
        return {}
    if not read_label_settings(output):
        raise ValueError(
            f"`output` {str(output)!r} holds labels without the settings that they were made with: give another file"
        )
    return read_labels(output, settings=settings, file_sizes=file_sizes)


def _write_finished(
    output: Path,
    labels: dict[str, ClipLabels],
    finished: dict[str, ClipLabels],
    settings: dict[str, Any],
    file_sizes: dict[str, int],
) -> None:
    """Writes labels to the output, unless it already holds all of them."""
    if output.exists() and labels.keys() == finished.keys():
        return
    sizes = read_file_sizes(output) if finished else {}
    sizes |= {name: file_sizes[name] for name in labels if name in file_sizes and name not in finished}
    write_labels(output, labels, settings, sizes)
