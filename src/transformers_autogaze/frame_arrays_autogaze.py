"""
Conversion of frames to uint8 tensors, from arrays, tensors, pictures and decoders of other libraries.

Files are decoded in `frame_decoding_autogaze`.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.video_utils import VideoMetadata

from .video_sources_autogaze import encoded_video, is_picture_list, pixels_of


def is_video_source(value: Any) -> bool:
    """Returns whether `value` is a source of [`read_video`], rather than frames."""
    if isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(value, "read"):
        return True
    return is_picture_list(value) or encoded_video(value) is not None


def with_metadata(value: Any) -> tuple[Any, Any] | None:
    """Returns a pair of frames and metadata, as returned by `load_video` of transformers; `None` for anything else."""
    if not isinstance(value, (list, tuple)) or len(value) != 2 or getattr(value[0], "ndim", 0) != 4:
        return None
    frames, metadata = value
    if isinstance(metadata, (VideoMetadata, dict)) or metadata is None:
        return frames, metadata
    # `load_video` returns a list of `None` for frames.
    return (frames, None) if isinstance(metadata, list) and all(item is None for item in metadata) else None


def frames_of_decoder(decoder: Any, indices: Sequence[int]) -> Any:
    """Decodes frames with torchcodec or decord to an array or a tensor; raises a `ValueError` if that fails."""
    try:
        frames = decoder.get_frames_at(list(indices)).data if hasattr(decoder, "get_frames_at") else None
        frames = decoder.get_batch(list(indices)) if frames is None else frames
    except RuntimeError as error:  # as both report damage
        raise ValueError(
            f"`source` {type(decoder).__name__} cannot decode all of the frames {indices[0]} to {indices[-1]}; give the path of "
            f"the video, whose undamaged part PyAV reads: {error}"
        ) from error
    return frames.asnumpy() if hasattr(frames, "asnumpy") else frames


def rate_of_decoder(decoder: Any) -> float | None:
    """Returns the frame rate of a decoder of torchcodec or decord, if known."""
    metadata = getattr(decoder, "metadata", None)
    return decoder.get_avg_fps() if hasattr(decoder, "get_avg_fps") else getattr(metadata, "average_fps", None)


def is_decoder(value: Any) -> bool:
    """Returns whether `value` is a decoder of torchcodec or decord."""
    return hasattr(value, "__len__") and (hasattr(value, "get_frames_at") or hasattr(value, "get_batch"))


class _DecoderFrames:
    """Frames `(height, width, 3)` of a decoder, each decoded on access."""

    def __init__(self, decoder: Any):
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.decoder)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        return _channels_last(frames_of_decoder(self.decoder, [index]))[0]


def unwrap_frames(source: Any) -> tuple[Any, float | None]:
    """Returns the frames `(height, width, 3)` of a decoder or of the output of `load_video`, and their rate."""
    if (pair := with_metadata(source)) is not None:
        frames, metadata = _channels_last(pair[0]), dict(pair[1] or {})
        rate, total = metadata.get("fps"), metadata.get("total_num_frames") or len(frames)
        return frames, rate * len(frames) / total if rate else None
    return (_DecoderFrames(source), rate_of_decoder(source)) if is_decoder(source) else (source, None)


def _channels_last(frames: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    is_first = frames.shape[1] == 3 and frames.shape[-1] != 3
    return torch.as_tensor(frames).permute(0, 2, 3, 1) if is_first else frames


def flatten_videos(videos: Any) -> list[Any]:
    """Lists the videos of any nesting: sources, four-dimensional arrays and lists of frames."""
    if is_video_source(videos) or is_decoder(videos) or with_metadata(videos) is not None:
        return [videos]
    if isinstance(videos, Image.Image):
        return [[videos]]
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim in (3, 4, 5):
        return list(videos) if videos.ndim == 5 else [videos if videos.ndim == 4 else videos[None]]
    if isinstance(videos, (list, tuple)) and len(videos):
        if any(item is None for item in videos):
            places = [place for place, item in enumerate(videos) if item is None]
            raise ValueError(f"`videos` must hold videos or frames, got None in the places {places} of a list")
        if all(_is_frame(item) for item in videos):
            return [videos]
        return [video for item in videos for video in flatten_videos(item)]
    if isinstance(videos, (list, tuple)):
        raise ValueError("`videos` must hold at least one video of at least one frame, got an empty list")
    shape = getattr(videos, "shape", None)
    raise ValueError(
        "`videos` must be a path, an http(s) URL, bytes, a list of frames or of pictures' paths, an array or tensor of 3 to 5 "
        f"dimensions, or a list of these, got {type(videos)}{'' if shape is None else f' of shape {tuple(shape)}'}"
    )


def to_clip(video: Any, indices: Sequence[int], input_data_format: str | None, name: str) -> torch.Tensor:
    """Converts frames of a video to a uint8 tensor of shape `(frames, 3, height, width)`."""
    if len(video) == 0:
        raise ValueError(f"{name} must have at least one frame, got none")
    if isinstance(video, (list, tuple)):
        kinds = {
            kind.__name__ for kind in (Image.Image, np.ndarray, torch.Tensor) for f in video if isinstance(f, kind)
        }
        if len(kinds) > 1:
            raise ValueError(f"{name} must hold frames of one kind, got {sorted(kinds)}")
        numbers: Sequence[int] = range(len(video))
        if isinstance(video[0], Image.Image):
            # Converting pictures is slow, so only the requested ones are converted.
            video, numbers = [pixels_of(video[index]) for index in indices], indices
            indices, input_data_format = range(len(video)), "channels_last"
        for number, frame in zip(numbers, video, strict=True):
            if frame.shape != video[0].shape:
                raise ValueError(
                    f"{name} must hold frames of one size, but frame {number} has the shape {tuple(frame.shape)} and "
                    f"frame {numbers[0]} {tuple(video[0].shape)}"
                )
            if _kind_of(frame) != _kind_of(video[0]):
                raise ValueError(
                    f"{name} must hold frames of one kind of numbers, but frame {number} has {_kind_of(frame)} and frame "
                    f"{numbers[0]} {_kind_of(video[0])}, which mean other brightness"
                )
        video = torch.stack(list(video)) if isinstance(video[0], torch.Tensor) else np.stack(video)
    prefers_last = isinstance(video, np.ndarray)
    if prefers_last:
        # Torch accepts neither read-only arrays nor negative strides.
        video = torch.from_numpy(np.require(video, requirements=("C", "W")))
    if video.ndim == 3:
        video, input_data_format = video[:, None], "channels_first"
    if 0 in video.shape:
        raise ValueError(f"{name} must have frames of at least one pixel, got the shape {tuple(video.shape)}")
    if _channels_are_last(video, input_data_format, prefers_last, name):
        video = video.permute(0, 3, 1, 2)
    clip = _to_levels(video, name)[torch.as_tensor(indices)] if len(indices) < len(video) else _to_levels(video, name)
    return clip.expand(-1, 3, -1, -1) if clip.shape[1] == 1 else clip[:, :3]


def _kind_of(frame: np.ndarray | torch.Tensor) -> str:
    kinds = {"float": "floats", "bool": "truth values"}
    return next((kind for name, kind in kinds.items() if name in str(frame.dtype)), "integers")


def _is_frame(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim in (2, 3))


def _channels_are_last(video: torch.Tensor, input_data_format: str | None, prefers_last: bool, name: str) -> bool:
    formats = (ChannelDimension.FIRST, ChannelDimension.LAST)
    counts = dict(zip(formats, (video.shape[1], video.shape[3]), strict=True))
    if input_data_format is None:
        likely = [f for f in formats if counts[f] == 3] or [f for f in formats if counts[f] in (1, 4)]
        if len(likely) == 2:
            likely = [formats[prefers_last]]
            warnings.warn(
                f"{name} of shape {tuple(video.shape)} could have its channels first or last and is taken as "
                f"{likely[0].value}; give `input_data_format` to choose",
                stacklevel=2,
            )
    elif input_data_format in formats:
        likely = [f for f in formats if f == input_data_format and counts[f] in (1, 3, 4)]
    else:
        raise ValueError(f"`input_data_format` must be 'channels_first' or 'channels_last', got {input_data_format!r}")
    if not likely:
        raise ValueError(
            f"{name} must have the shape (frames, height, width, channels) or (frames, channels, height, width) with "
            f"1, 3 or 4 channels, got {tuple(video.shape)}{f' as {input_data_format}' if input_data_format else ''}"
        )
    return likely[0] == ChannelDimension.LAST


def _to_levels(video: torch.Tensor, name: str) -> torch.Tensor:
    """Converts pixels of any dtype to uint8."""
    if video.dtype == torch.uint8:
        return video
    if video.dtype == torch.bool or video.is_complex():
        raise ValueError(f"{name} must hold integers in 0..255 or floats in 0..1, got {video.dtype}")
    is_float, kind = video.is_floating_point(), video.dtype
    video = video.float() if is_float else video.long()
    low, high = video.min().item(), video.max().item()
    if is_float and low >= -1e-3 and high <= 1 + 1e-3:
        video = video * 255
    elif not (low >= 0 and high <= 255) or (is_float and high <= 2):
        # Floats slightly above 1 are more likely to result from a resize than from an almost black video.
        raise ValueError(
            f"{name} must hold integers in 0..255, or floats in 0..1 or 0..255, got {kind} in {low:g}..{high:g}; "
            "clamp it or undo a normalisation"
        )
    return video.round().clamp(0, 255).to(torch.uint8) if is_float else video.to(torch.uint8)
