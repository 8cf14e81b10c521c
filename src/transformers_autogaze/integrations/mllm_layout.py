"""The layout of a video's tokens for an MLLM of the LLaVA family: chunks, tiles, thumbnails and separators."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from .mllm_adapters import LlavaAdapter, MLLMAdapter
from .video_tokens import ORDERS, VideoClip, Videos, batch_clips, batch_streams, count_tokens, cut_clips
from .vision import GazeVisionModel


_NEWLINE = "image_newline"


@dataclass
class VideoLayout:
    """
    The layout of videos; its fields are arguments of [`GazeVideoLM`].

    Raises:
        ValueError: if a number is below 1 or the order is unknown.
    """

    chunk_frames: int
    max_batch_size: int
    order: str
    thumbnail_interval: int | None

    def __post_init__(self) -> None:
        numbers = {"chunk_frames": self.chunk_frames, "max_batch_size": self.max_batch_size}
        if self.thumbnail_interval is not None:
            numbers["thumbnail_interval"] = self.thumbnail_interval
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        if self.order not in ORDERS:
            raise ValueError(f"`order` must be one of {', '.join(map(repr, ORDERS))}, got {self.order!r}")

    def cut(
        self, videos: list[torch.Tensor], gazes: list[GazeOutput], grid: GazeGrid, vision: GazeVisionModel
    ) -> Iterator[list[list[VideoClip]]]:
        """Yields lists of batches of clips of one shape; the batches of a list are consecutive chunks of one stream."""
        is_canvas = vision.attention == "canvas"
        # No gradients flow through a stream, so a tower that may be in training gets whole videos.
        is_whole = is_canvas and (torch.is_grad_enabled() or vision.vision_model.training)
        is_stream = is_canvas and not is_whole
        clips = (
            clip
            for index, (video, gaze) in enumerate(zip(videos, gazes, strict=True))
            for clip in cut_clips(
                index,
                video,
                gaze,
                grid,
                len(video) if is_whole else self.chunk_frames,
                self.thumbnail_interval,
                keeps_empty=is_stream,
            )
        )
        if is_stream:
            return batch_streams(clips, self.max_batch_size)
        return ([batch] for batch in batch_clips(clips, self.max_batch_size))

    def count_tokens(
        self,
        gazes: Sequence[GazeOutput],
        grid: GazeGrid,
        vision: GazeVisionModel,
        adapter: MLLMAdapter,
        separator: list[int] | str | None,
    ) -> list[tuple[int, int]]:
        """Counts the tokens of videos; see [`GazeVideoLM.count_tokens`]."""
        num_prefix = sum(token.numel() // vision.hidden_size for token in vision.adapter.prefix_tokens)
        num_prefix = max(num_prefix - (not adapter.keeps_cls), 0)
        rows, cols = adapter.pool_grid(*vision.adapter.native_grid)
        separator_length = 1 if isinstance(separator, str) else len(separator or [])
        cut = grid, self.chunk_frames, self.thumbnail_interval
        counts = []
        for gaze in gazes:
            parts = count_tokens(gaze, *cut, order=self.order, num_prefix=num_prefix)
            kept = sum(parts) + max(len(parts) - 1, 0) * separator_length
            total = gaze.num_frames * gaze.frame_sampling_rate * (rows * cols + num_prefix)
            counts.append((kept + adapter.ends_with_newline, total + adapter.ends_with_newline))
        return counts


def check_separator(
    separator: int | Sequence[int] | str | None, adapter: MLLMAdapter, embeddings: Any
) -> list[int] | str | None:
    """
    Checks the separator between chunks, and returns it as ids or `"image_newline"`.

    Raises:
        ValueError: if it is not a token of the MLLM, and no new line that it has.
    """
    if separator is None:
        return None
    if separator == _NEWLINE:
        if adapter.newline is None:
            raise ValueError(f"`separator` cannot be {_NEWLINE!r}: a {type(adapter.mllm).__name__} has none")
        return separator
    ids: Sequence[Any] = [separator] if isinstance(separator, int) else separator
    size = embeddings.num_embeddings
    if not ids or any(not isinstance(token, int) or not 0 <= token < size for token in ids):
        raise ValueError(f"`separator` must be ids of tokens in 0..{size - 1} or {_NEWLINE!r}, got {separator!r}")
    return list(ids)


def embed_separator(separator: list[int] | str | None, adapter: MLLMAdapter, embeddings: Any) -> torch.Tensor | None:
    """Returns the embeddings of the separator between chunks, `(tokens, hidden_size)`."""
    if separator is None:
        return None
    if separator == _NEWLINE:
        return adapter.newline[None]
    return embeddings(torch.tensor(separator, device=embeddings.weight.device))


def has_videos(
    adapter: MLLMAdapter, input_ids: torch.Tensor, videos: Videos | None, options: Mapping[str, Any]
) -> bool:
    """
    Returns whether videos are given, and checks that their placeholders are not those of images.

    Raises:
        ValueError: if a prompt has the placeholder of a video that is not given, or images have the same placeholder.
    """
    token = adapter.placeholder_id
    is_image_token = options.get("pixel_values") is not None and not adapter.has_image_token
    if videos is None:
        shape = tuple(getattr(options.get("pixel_values"), "shape", ()))
        if is_image_token and isinstance(adapter, LlavaAdapter) and len(shape) != 4:
            raise ValueError(
                "`pixel_values` must be images of shape (images, channels, height, width), got the shape "
                f"{shape}; videos are `pixel_values_videos`"
            )
        if not is_image_token and bool((input_ids == token).any()):
            raise ValueError(
                f"`pixel_values_videos` must be given for prompts with the video placeholder {token}, got None"
            )
        return False
    if is_image_token:
        raise ValueError(
            f"`pixel_values` cannot go with `pixel_values_videos`: a {type(adapter.mllm).__name__} has one token, {token}, "
            "for both"
        )
    return True
