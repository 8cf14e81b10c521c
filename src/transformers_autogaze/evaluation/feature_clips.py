"""Clips for the comparison by encoder features: consecutive frames, or frames spread over a video as MLLMs sample them."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import cached_file

from ..frame_decoding_autogaze import stream_video
from ..video_processing_autogaze import AutoGazeVideoProcessor


SAMPLINGS = ("spread", "consecutive")
"""Sampling of a clip's frames: evenly over the whole video, or consecutively from the beginning."""


class FeatureClip(NamedTuple):
    """
    A clip to measure features on.

    Args:
        name (`str`): name of the video, with the index of the first frame for consecutive frames.
        sampling (`str`): one of `SAMPLINGS`.
        levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): frames in levels 0..255.
    """

    name: str
    sampling: str
    levels: torch.Tensor


def count_clips(
    videos: Sequence[str | os.PathLike],
    samplings: Sequence[str] = SAMPLINGS,
    num_frames: int = 16,
    max_clips: int = 4,
) -> int:
    """
    Counts the clips of videos and checks that they can be read; the videos are opened, but not decoded to their ends.

    Args:
        videos (`Sequence` of `str` or `os.PathLike`): the videos; see [`read_video`].
        samplings (`Sequence[str]`, *optional*): samplings of the frames, all of `SAMPLINGS` by default.
        num_frames, max_clips (*optional*): as for [`read_clips`].

    Returns:
        `int`: number of clips that [`read_clips`] yields for all of them.

    Raises:
        ValueError: if a video cannot be read or is too short, two have the same name, or a number is below 1.
        FileNotFoundError: if a file does not exist.
    """
    for name, value in {"num_frames": num_frames, "max_clips": max_clips}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if not videos:
        raise ValueError("`videos` must name at least one video, got none")
    names = [os.path.basename(video) for video in videos]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`videos` must have different names, which identify results; got {', '.join(twice)} twice")
    clips = 0
    for video in videos:
        count = stream_video(video)[0].total_num_frames
        if count < num_frames:
            raise ValueError(f"`videos`: {video} has {count} frames, a clip needs {num_frames}")
        clips += min(max_clips, count // num_frames) * ("consecutive" in samplings) + ("spread" in samplings)
    return clips


def read_clips(
    video: str | os.PathLike,
    size: int,
    sampling: str = "spread",
    num_frames: int = 16,
    max_clips: int = 4,
) -> Iterator[FeatureClip]:
    """
    Reads the clips of one video, resized to a square.

    Args:
        video (`str` or `os.PathLike`): the video; see [`read_video`].
        size (`int`): height and width in pixels to resize frames to, antialiased and without keeping their aspect ratio.
        sampling (`str`, *optional*, defaults to `"spread"`): sampling of the frames, one of `SAMPLINGS`.
        num_frames (`int`, *optional*, defaults to 16): frames of a clip.
        max_clips (`int`, *optional*, defaults to 4): maximum number of clips of consecutive frames.

    Yields:
        [`FeatureClip`]: the clips of consecutive frames, or the single clip of frames spread over the video.
    """
    name = os.path.basename(video)
    resizer = AutoGazeVideoProcessor()

    if sampling == "spread":
        metadata, frames = stream_video(video, num_frames=num_frames)
        names = [name]
    else:
        metadata, frames = stream_video(video)
        count = min(max_clips, metadata.total_num_frames // num_frames)
        names = [f"{name}:{index * num_frames}" for index in range(count)]
    for name in names:
        decoded = list(islice(frames, num_frames))
        if len(decoded) < num_frames:
            raise ValueError(
                f"`videos`: {video} is damaged: only {len(decoded)} of {num_frames} frames of {name} can be decoded"
            )
        levels = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        yield FeatureClip(name, sampling, resizer.resize_levels(levels, (size, size)))


def encoder_normalization(encoder: str | os.PathLike, model_type: str) -> AutoGazeVideoProcessor:
    """
    Loads the normalisation of an encoder's frames.

    Args:
        encoder (`str` or `os.PathLike`): a folder or a Hub repository with the configuration of an image processor.
        model_type (`str`): the tower's; DINO towers without this configuration have ImageNet's mean and standard deviation.

    Returns:
        [`AutoGazeVideoProcessor`] with the normalisation of the encoder's own processor, but not its sizes.

    Raises:
        OSError: if the configuration cannot be read.
        ValueError: if there is none.
    """
    settings: dict[str, Any] = {"rescale_factor": 1 / 255, "offset": False}
    files = ("processor_config.json", "preprocessor_config.json")
    # The error of an existing file that cannot be read is raised.
    if any(cached_file(str(encoder), file, _raise_exceptions_for_missing_entries=False) for file in files):
        found, _ = ImageProcessingMixin.get_image_processor_dict(str(encoder))
    elif model_type.startswith("dinov"):
        found = {}
    else:
        raise ValueError(
            f"`encoder` {encoder} must have a preprocessor_config.json with the normalisation of its frames; save the "
            "encoder's own image processor there"
        )
    keys = ("image_mean", "image_std", "rescale_factor", "offset", "do_rescale", "do_normalize")
    settings |= {key: found[key] for key in keys if found.get(key) is not None}
    return AutoGazeVideoProcessor(**settings)
