"""
Labels: which patches of each frame to keep, in which order, and the task loss after each.

This module owns the greedy search that makes them, for a clip or a whole collection, and the files that hold them. It
knows nothing of models; what a patch is worth it asks of a reconstruction.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch.utils.data import DataLoader, Dataset

from ..composite_autogaze import (
    CompositeReconstruction,
    ReconstructionOutput,
    mse_to_task_loss,
    task_loss_to_mse,
)
from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import budget_each_frame, resize_frames
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .videos import VideoCollection


_NEGLIGIBLE_MSE = 2e-5  # of a cell, 47 dB: what lies far below need not be told apart


class ClipLabels(NamedTuple):
    """
    What to learn from one clip.

    Args:
        gazing_pos (`list[list[int]]`):
            For each frame, the patches to keep in the order of choice, counted from the first patch of the frame.
        task_losses (`list[list[float]]`):
            Task loss of the frame after each of them.
    """

    gazing_pos: list[list[int]]
    task_losses: list[list[float]]


class GreedyLabeller:
    """
    Labels clips by greedy search: next is the patch that lowers the task loss of its frame most.

    On the closed form the search is exact. Any other reconstruction has to rebuild the frame once for every candidate,
    so there the closed form proposes the patches that it gains most from, `beam` of them, and the reconstruction takes
    the best; a frame ends early when none of them lowers its loss. Either way losses never rise along a frame.

    Args:
        grid ([`GazeGrid`]): the patches to choose from.
        reconstruction (`Callable`, *optional*):
            What patches are worth: called as `reconstruction(pixels, gaze, frames)`, it gives a
            [`ReconstructionOutput`]. The closed form if not given.
        gazing_ratio (`float` or `Sequence[float]`, *optional*, defaults to 0.1):
            Share of the patches of a frame to choose at most, one number or one for every frame.
        task_loss_requirement (`float`, *optional*): task loss at which a frame is done; none by default.
        beam (`int`, *optional*, defaults to 16): patches that the closed form proposes at each step.

    Raises:
        ValueError: if `beam` is not a positive whole number or `reconstruction` cannot be called.

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
        reconstruction: Callable[..., ReconstructionOutput] | None = None,
        gazing_ratio: float | Sequence[float] = 0.1,
        task_loss_requirement: float | None = None,
        beam: int = 16,
    ):
        if reconstruction is not None and not callable(reconstruction):
            raise ValueError(f"`reconstruction` must be callable, got {type(reconstruction).__name__}")
        if not isinstance(beam, int) or beam < 1:
            raise ValueError(f"`beam` must be a whole number of at least 1, got {beam!r}")
        budget_each_frame(gazing_ratio, len(gazing_ratio) if isinstance(gazing_ratio, Sequence) else 1, 1)
        self.grid = grid
        self.reconstruction = reconstruction
        self.gazing_ratio = gazing_ratio
        self.task_loss_requirement = task_loss_requirement
        self.beam = beam
        self.composite = CompositeReconstruction(grid)

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
        budgets = budget_each_frame(self.gazing_ratio, pixels.shape[1], self.grid.num_patches)
        if self.reconstruction is not None:
            return [self._search(clip[None], budgets.tolist()) for clip in pixels]
        limit = None
        if self.task_loss_requirement is not None:
            limit = task_loss_to_mse(pixels.new_full(pixels.shape[:2], self.task_loss_requirement))
        found = self.composite.search(pixels, budgets, limit)
        losses = mse_to_task_loss(found.mse)
        return [
            ClipLabels(
                *(
                    [per_slot[:count].tolist() for per_slot, count in zip(clip, counts, strict=True)]
                    for clip in (found.ids[number], losses[number])
                )
            )
            for number, counts in enumerate(found.counts.tolist())
        ]

    def _search(self, pixels: torch.Tensor, budgets: list[int]) -> ClipLabels:
        """Searches a clip `(1, frames, 3, height, width)` on a reconstruction that is not the closed form."""
        labels, standing = ClipLabels([], []), torch.full_like(pixels[:, 0], 0.5)
        for t, budget in enumerate(budgets):
            frame = pixels[:, t]
            errors = self.composite.cell_errors(frame, standing)
            kept = torch.zeros(1, self.grid.num_patches, dtype=torch.bool, device=pixels.device)
            ids, losses = [], []
            while len(ids) < budget:
                gains = self.composite.gains(errors, kept)[0].masked_fill(kept[0], -torch.inf)
                candidates = gains.topk(min(self.beam, self.grid.num_patches - len(ids))).indices
                loss = self._try(pixels[:, : t + 1], [*labels.gazing_pos, ids], candidates)
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
            standing = self.composite.reconstruct(frame[:, None], masks, standing)[:, 0]
        return labels

    def _try(self, pixels: torch.Tensor, ids: list[list[int]], candidates: torch.Tensor) -> torch.Tensor:
        """Measures the loss of the last frame with each candidate added to its patches, `(candidates,)`."""
        count = len(candidates)
        known = torch.tensor(
            [id + t * self.grid.num_patches for t, frame_ids in enumerate(ids) for id in frame_ids],
            dtype=torch.long,
            device=pixels.device,
        )
        last = candidates[:, None] + (len(ids) - 1) * self.grid.num_patches
        gazing_pos = torch.cat([known.expand(count, -1), last], dim=1)
        counts = torch.tensor([len(frame_ids) for frame_ids in ids], device=pixels.device)
        counts[-1] += 1
        gaze = GazeOutput.from_ids(gazing_pos, torch.zeros_like(gazing_pos, dtype=torch.bool), counts, self.grid)
        return self.reconstruction(pixels.expand(count, -1, -1, -1, -1), gaze, [len(ids) - 1]).loss[:, 0]


def label_clip(
    composite: CompositeReconstruction,
    pixels: torch.Tensor,
    budgets: torch.Tensor,
    max_error: torch.Tensor | None = None,
) -> tuple[ClipLabels, torch.Tensor]:
    """
    Labels one clip by the greedy search of the closed form, every frame at a threshold of its own.

    Args:
        composite ([`CompositeReconstruction`]): the closed form.
        pixels (`torch.FloatTensor` of shape `(frames, 3, height, width)`): pixels in 0..1, of the finest scale's size.
        budgets (`torch.LongTensor` of shape `(frames,)`): patches of each frame at most.
        max_error (`torch.FloatTensor` of shape `(frames,)`, *optional*):
            Mean squared error at which a frame is done; see [`CompositeReconstruction.search`].

    Returns:
        `tuple` of the [`ClipLabels`] and the images that the frames stood on before their patches were laid, a
        `torch.FloatTensor` shaped like `pixels`: the reconstruction of the frame before, mid-grey before the first.
    """
    standing = [pixels.new_full((1, *pixels.shape[1:]), 0.5)]
    labels = ClipLabels([], [])
    for t in range(len(pixels)):
        limit = None if max_error is None else max_error[None, t : t + 1]
        found = composite.search(pixels[None, t : t + 1], budgets[t : t + 1], limit, standing[-1])
        count = int(found.counts)
        labels.gazing_pos.append(found.ids[0, 0, :count].tolist())
        labels.task_losses.append(mse_to_task_loss(found.mse[0, 0, :count]).tolist())
        standing.append(found.reconstruction)
    return labels, torch.cat(standing[:-1])


def label_gaze(
    composite: CompositeReconstruction, pixels: torch.Tensor, gaze: GazeOutput, step_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Labels every step of a gaze, whoever made it, with what greedy search would choose next.

    Args:
        composite ([`CompositeReconstruction`]): the closed form.
        pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
            Pixels in 0..1, one frame per frame of gaze, of the finest scale's size.
        gaze ([`GazeOutput`]): what was chosen, in order.
        step_size (`int`): patches of a step; steps begin anew with every frame.

    Returns:
        `tuple` of labels `(batch, N)`, ids counted from the first patch of the first frame; the measured task loss after
        each slot of the gaze, of the same shape; and what each patch would gain in each slot, `(batch, N, patches)`.
    """
    ids, gains = composite.continuations(pixels, gaze, step_size)
    labels = ids + gaze.frame_of_slot * composite.grid.num_patches
    return labels, mse_to_task_loss(composite.measure(pixels, gaze)), gains.to(pixels)


def standing_frames(
    composite: CompositeReconstruction, pixels: torch.Tensor, masks: list[torch.Tensor]
) -> torch.Tensor:
    """
    Rebuilds what the frames of clips stand on before their patches are laid.

    Args:
        composite ([`CompositeReconstruction`]): the closed form.
        pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
            Pixels in 0..1, of the finest scale's size.
        masks (`list[torch.BoolTensor]` of shape `(batch, frames, patches)`): what was kept, one mask per scale.

    Returns:
        `torch.FloatTensor` shaped like `pixels`: the reconstruction of the frame before, mid-grey before the first.
    """
    rebuilt = composite.reconstruct(pixels, masks)
    return torch.cat([torch.full_like(rebuilt[:, :1], 0.5), rebuilt[:, :-1]], dim=1)


class FrameValues(NamedTuple):
    """
    Where a frame needs patches before any is laid, to learn beside labels.

    Args:
        cell_losses (`torch.FloatTensor` of shape `(.., scales, *cells)`):
            Task loss of every cell as it stands, and with each scale but the finest, which leaves none, laid there; of a
            mean squared error that is 2e-5 too high, so that what is good enough does not differ.
        patch_gains (`torch.FloatTensor` of shape `(.., patches)`):
            By how much each patch would lower the squared error of the frame, if it were laid first.
    """

    cell_losses: torch.FloatTensor
    patch_gains: torch.FloatTensor

    @classmethod
    def measure(
        cls, composite: CompositeReconstruction, pixels: torch.Tensor, standing: torch.Tensor
    ) -> "FrameValues":
        """Measures frames `(.., 3, height, width)` that stand on images of the same shape."""
        errors = composite.cell_errors(pixels.flatten(0, -4), standing.flatten(0, -4))
        gains = composite.gains(errors).unflatten(0, pixels.shape[:-3])
        mse = errors[:, :-1] * errors[0, 0].numel() / pixels.shape[-3:].numel()
        losses = mse_to_task_loss(mse + _NEGLIGIBLE_MSE).unflatten(0, pixels.shape[:-3])
        return cls(losses.to(pixels), gains.to(pixels))


def gazed_pixels(levels: torch.Tensor, processor: AutoGazeVideoProcessor, size: tuple[int, int]) -> torch.Tensor:
    """
    Brings whole frames to the pixels that a selector gazes at.

    Args:
        levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255.
        processor ([`AutoGazeVideoProcessor`]): how frames are preprocessed.
        size (`tuple[int, int]`): height and width of the finest scale.

    Returns:
        `torch.FloatTensor` of shape `(frames, 3, *size)`: pixels in 0..1.
    """
    frames = processor.resize_levels(levels).float() / 255
    return resize_frames(frames[None], size)[0].clamp(0, 1)


class _WholeClips(Dataset):
    """Clips evenly taken from the videos of some numbers, as pixels; `None` where a video cannot be read."""

    def __init__(self, videos: VideoCollection, numbers: list[int], num_frames: int, size: tuple[int, int]):
        self.videos = videos
        self.numbers = numbers
        self.num_frames = num_frames
        self.size = size
        self.processor = AutoGazeVideoProcessor()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | None]:
        number = self.numbers[index]
        levels = self.videos.read_evenly(number, self.num_frames)
        return self.videos.names[number], None if levels is None else gazed_pixels(levels, self.processor, self.size)


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

    What is done already lies in a file beside the output until all is done, so a run that was cut off goes on where it
    stopped. Several runs, on as many machines as you like, each do one shard of the same collection.

    Args:
        videos ([`VideoCollection`]): the videos; those that cannot be read, or are too short, are skipped.
        labeller ([`GreedyLabeller`]): makes the labels.
        output (`str` or `os.PathLike`): file to write, `.json`; with several shards the shard is added to its name.
        num_frames (`int`, *optional*, defaults to 16): frames of a clip, evenly taken over the video.
        batch_size (`int`, *optional*, defaults to 8): clips that are searched together.
        num_workers (`int`, *optional*, defaults to 0): processes that decode.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where to search.
        shard (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): which shard to do, from 1, and how many there are.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if there is no such shard, or the output is no `.json`.
    """
    number, count = shard
    if not 1 <= number <= count:
        raise ValueError(f"`shard` must be one of 1..{count} and how many there are, got {shard}")
    output = Path(output)
    if output.suffix != ".json":
        raise ValueError(f"`output` must end in .json, got {str(output)!r}")
    if count > 1:
        output = output.with_stem(f"{output.stem}-{number:05}-of-{count:05}")
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".partial.jsonl")
    done = _read_lines(unfinished)
    numbers = list(range(number - 1, len(videos), count))
    clips = _WholeClips(
        videos, [i for i in numbers if videos.names[i] not in done], num_frames, labeller.grid.sizes[-1]
    )
    loader = DataLoader(clips, batch_size, num_workers=num_workers, collate_fn=list)
    with (
        unfinished.open("a", encoding="utf-8") as file,
        tqdm(total=len(numbers), initial=len(done), unit="video", desc="labelling") as progress,
    ):
        for batch in loader:
            readable = {name: pixels for name, pixels in batch if pixels is not None}
            if readable:
                labels = labeller(torch.stack(list(readable.values())).to(device))
                for name, clip in zip(readable, labels, strict=True):
                    done[name] = clip
                    file.write(json.dumps([name, clip._asdict()]) + "\n")
                file.flush()
            progress.update(len(batch))
    write_labels(output, {videos.names[i]: done[videos.names[i]] for i in numbers if videos.names[i] in done})
    unfinished.unlink()
    return output


def _read_lines(path: Path) -> dict[str, ClipLabels]:
    """Reads what an unfinished run has done; a last line that was cut off does not count and is removed."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if len(whole) < len(text):
        path.write_text(whole, encoding="utf-8")
    return {name: ClipLabels(**labels) for name, labels in map(json.loads, whole.splitlines())}


def write_labels(path: str | os.PathLike, labels: Mapping[str, ClipLabels]) -> None:
    """
    Writes labels in the published JSON shape, `{video: {"gazing_pos": .., "task_losses": ..}}`.

    Args:
        path (`str` or `os.PathLike`): file to write; an old one is replaced only once the new one is whole.
        labels (`Mapping[str, ClipLabels]`): labels by the names of the videos.
    """
    path = Path(path)
    whole = path.with_name(path.name + ".part")
    whole.write_text(json.dumps({name: clip._asdict() for name, clip in labels.items()}), encoding="utf-8")
    whole.replace(path)


def read_labels(*paths: str | os.PathLike, grid: GazeGrid | None = None) -> dict[str, ClipLabels]:
    """
    Reads label files, such as the shards of one collection.

    Args:
        paths (`str` or `os.PathLike`): files in the published JSON shape.
        grid ([`GazeGrid`], *optional*): patches that the labels must belong to; checked if given.

    Returns:
        `dict[str, ClipLabels]` by the names of the videos.

    Raises:
        ValueError: if a file is not of this shape, frames and losses do not fit each other, or an id lies outside the
            grid.

    Example:

    ```python
    >>> from transformers_autogaze.training.labels import ClipLabels, read_labels, write_labels

    >>> write_labels("labels.json", {"clip.mp4": ClipLabels([[3, 0]], [[0.9, 0.5]])})
    >>> read_labels("labels.json")
    {'clip.mp4': ClipLabels(gazing_pos=[[3, 0]], task_losses=[[0.9, 0.5]])}

    ```
    """
    labels = {}
    for path in paths:
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
            found = {name: ClipLabels(clip["gazing_pos"], clip["task_losses"]) for name, clip in entries.items()}
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f'`paths`: {str(path)!r} must hold {{video: {{"gazing_pos": .., "task_losses": ..}}}}, but reading it '
                f"gave {type(error).__name__}: {error}"
            ) from error
        for name, clip in found.items():
            _check_labels(f"{str(path)!r}, {name!r}", clip, grid)
        labels |= found
    return labels


def _check_labels(where: str, labels: ClipLabels, grid: GazeGrid | None) -> None:
    counts = [[len(frame) for frame in part] for part in labels]
    if counts[0] != counts[1] or not counts[0] or min(counts[0]) < 1:
        raise ValueError(
            f"`paths`: {where} must hold at least one patch for each frame and one loss for each patch, got "
            f"{counts[0]} patches and {counts[1]} losses"
        )
    if grid is not None:
        outside = [id for frame in labels.gazing_pos for id in frame if not 0 <= id < grid.num_patches]
        if outside:
            raise ValueError(f"`paths`: {where} must hold ids in 0..{grid.num_patches - 1}, got {outside[0]}")


def labels_to_table(labels: Mapping[str, ClipLabels]) -> Any:
    """
    Makes a `datasets` table of labels, to keep or share where files of JSON are too clumsy.

    Args:
        labels (`Mapping[str, ClipLabels]`): labels by the names of the videos.

    Returns:
        `datasets.Dataset` with the columns `video`, `gazing_pos` and `task_losses`.
    """
    from datasets import Dataset as Table
    from datasets import Features, List, Value

    features = Features(
        {
            "video": Value("string"),
            "gazing_pos": List(List(Value("int32"))),
            "task_losses": List(List(Value("float64"))),
        }
    )
    rows = [{"video": name, **clip._asdict()} for name, clip in labels.items()]
    return Table.from_list(rows, features=features)


def labels_from_table(table: Any) -> dict[str, ClipLabels]:
    """
    Reads labels out of a table that [`labels_to_table`] made.

    Args:
        table (`datasets.Dataset`): with the columns `video`, `gazing_pos` and `task_losses`.

    Returns:
        `dict[str, ClipLabels]` by the names of the videos.
    """
    return {row["video"]: ClipLabels(row["gazing_pos"], row["task_losses"]) for row in table}
