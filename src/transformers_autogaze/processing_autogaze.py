"""The processor of AutoGaze: from a video to the inputs of the selector and of a downstream encoder, and from gazes to records."""

import inspect
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin, Unpack

from .frame_arrays_autogaze import flatten_videos  # noqa: F401

# Unused imports: before 5.12, transformers loads only the modules that this file itself imports as remote code.
from .frame_decoding_autogaze import read_video  # noqa: F401
from .frame_orientation_autogaze import to_rgb  # noqa: F401
from .frame_sampling_autogaze import sample_indices  # noqa: F401
from .gaze_batches_autogaze import stack_gazes  # noqa: F401
from .gaze_files_autogaze import save_gaze  # noqa: F401
from .gaze_pictures_autogaze import paint_gaze  # noqa: F401
from .gazing_autogaze import GazeOutput
from .grid_autogaze import PUBLISHED_GRID, GazeGrid
from .video_processing_autogaze import AutoGazeVideoProcessor, AutoGazeVideosKwargs
from .video_sources_autogaze import resolve_source  # noqa: F401


_ENCODER_FOLDER = "encoder_processor"
_ENCODER_KEY = "encoder_processor_auto_class"


class AutoGazeProcessor(ProcessorMixin):
    r"""
    Preprocesses videos for a selector and, optionally, the same frames for the encoder of the kept patches.

    A video is decoded only once.

    Args:
        video_processor (`AutoGazeVideoProcessor`, *optional*):
            Preprocessing for the selector; the published one by default.
        encoder_processor (image processor, video processor or processor, *optional*):
            Processor of the downstream encoder, such as a `SiglipImageProcessor` or a `Qwen2VLVideoProcessor`. Of a processor
            for several modalities, the video processor is used, or the image processor if there is none. It is saved in the
            folder `encoder_processor`.
        target_scales (`Sequence[int]`, *optional*), target_patch_size (`int`, *optional*):
            Scales and patch size of the encoder that the gaze is for; [`~AutoGazeProcessor.match_encoder`] sets them. Both
            inputs then show the whole frame, resized to the finest scale.

    Example:

    ```python
    >>> from transformers_autogaze.processing_autogaze import AutoGazeProcessor

    >>> processor = AutoGazeProcessor()
    >>> inputs = processor(videos=np.zeros((64, 224, 224, 3), dtype=np.uint8), num_frames=16, return_tensors="pt")
    >>> inputs["pixel_values_videos"].shape
    torch.Size([1, 16, 3, 224, 224])

    ```
    """

    def __init__(
        self,
        video_processor: AutoGazeVideoProcessor | None = None,
        encoder_processor: Any = None,
        target_scales: Sequence[int | tuple[int, int]] | None = None,
        target_patch_size: int | None = None,
    ):
        # Without `super().__init__`, which requires a video processor of a class that needs torchvision.
        video_processor = AutoGazeVideoProcessor() if video_processor is None else video_processor
        if not hasattr(video_processor, "load_clips"):
            raise TypeError(f"`video_processor` must be an AutoGazeVideoProcessor, got {type(video_processor)}")
        if encoder_processor is not None:
            _auto_class_of(encoder_processor)
        self.video_processor = video_processor
        self.encoder_processor = encoder_processor
        if (target_scales is None) != (target_patch_size is None):
            raise ValueError(
                "`target_scales` and `target_patch_size` must be given together, got "
                f"target_scales={target_scales}, target_patch_size={target_patch_size}"
            )
        self.target_scales = None if target_scales is None else GazeGrid(target_scales, target_patch_size).scales
        self.target_patch_size = target_patch_size
        self.chat_template = None

    def match_encoder(self, config: PreTrainedConfig, selector_grid: GazeGrid = PUBLISHED_GRID) -> GazeGrid:
        """
        Sets the scales and the patch size of the gaze to those of an encoder; see [`GazeGrid.for_encoder`].

        Args:
            config (`PreTrainedConfig`): configuration of the vision tower, or of a model that has one.
            selector_grid (`GazeGrid`, *optional*):
                Grid of the selector, `model.config.grid`; that of the published checkpoint by default.

        Returns:
            [`GazeGrid`]: the grid of the gaze.

        Raises:
            ValueError: if the configuration has no `image_size` or `patch_size`.

        Example:

        ```python
        >>> from transformers import SiglipVisionConfig
        >>> from transformers_autogaze.processing_autogaze import AutoGazeProcessor

        >>> processor = AutoGazeProcessor()
        >>> grid = processor.match_encoder(SiglipVisionConfig(image_size=384, patch_size=14))
        >>> processor.gaze_kwargs
        {'target_scales': [56, 112, 196, 392], 'target_patch_size': 14}
        >>> inputs = processor(videos=np.zeros((2, 240, 320, 3), dtype=np.uint8), return_tensors="pt")
        >>> inputs["pixel_values_videos"].shape
        torch.Size([1, 2, 3, 392, 392])

        ```
        """
        tower = getattr(config, "vision_config", None) or config
        image_size = getattr(tower, "image_size", None) or getattr(tower, "crop_size", None)
        patch_size = getattr(tower, "patch_size", None)
        if image_size is None or patch_size is None:
            raise ValueError(
                "`config` must be that of a vision tower with `image_size` and `patch_size`, got "
                f"{type(config).__name__} with {image_size} and {patch_size}"
            )
        grid = selector_grid.for_encoder(image_size, patch_size)
        self.target_scales, self.target_patch_size = grid.scales, grid.patch_size
        return grid

    @property
    def gaze_kwargs(self) -> dict[str, Any]:
        """Arguments of `generate` for the encoder; empty before an encoder is matched."""
        if self.target_scales is None:
            return {}
        return {"target_scales": self.target_scales, "target_patch_size": self.target_patch_size}

    def _whole_frame(self) -> dict[str, Any]:
        """Returns the arguments of preprocessing that resize the whole frame to the finest scale."""
        if self.target_scales is None:
            return {}
        height, width = GazeGrid(self.target_scales, self.target_patch_size).sizes[-1]
        return {"do_resize": True, "size": {"height": height, "width": width}, "do_center_crop": False}

    def __call__(self, videos: Any, **kwargs: Unpack[AutoGazeVideosKwargs]) -> BatchFeature:
        """
        Loads and samples videos once and preprocesses them for the selector and the encoder.

        Args:
            videos: one video or a list of them; see [`AutoGazeVideoProcessor.preprocess`].
            kwargs: arguments of [`AutoGazeVideoProcessor.preprocess`]. Those that sample frames and `return_tensors` apply
                to the encoder as well; the other preprocessing of the encoder is that of its own processor.

        Returns:
            `BatchFeature` with `pixel_values_videos` for the selector, of shape `(batch, frames, 3, height, width)`, and
            every output of the encoder's processor with the prefix `encoder_`. An image processor takes every frame as an
            image; its outputs are grouped by video, so `encoder_pixel_values` has the shape `(batch, frames, channels,
            height, width)`.

        Raises:
            ValueError: see [`AutoGazeVideoProcessor.preprocess`].
        """
        clips, metadata = self.video_processor.load_clips(videos, **kwargs)
        loaded = {"video_metadata": metadata, "do_sample_frames": False, "input_data_format": "channels_first"}
        features = self.video_processor(clips, **{**self._whole_frame(), **kwargs, **loaded})
        if self.encoder_processor is not None:
            encoded = self._encode(clips, kwargs.get("return_tensors"), loaded)
            features.update({f"encoder_{key}": value for key, value in encoded.items()})
        return features

    def _encode(self, clips: list[torch.Tensor], return_tensors: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        """Runs the encoder's processor on uint8 frames of shape `(frames, 3, height, width)`."""
        processor, size = self.encoder_processor, self._whole_frame()
        if isinstance(processor, ProcessorMixin):
            processor = getattr(processor, "video_processor", None) or processor.image_processor
        if not hasattr(processor, "do_center_crop"):
            size.pop("do_center_crop", None)
        if _is_video_processor(processor):
            return processor(clips, return_tensors=return_tensors, **size, **loaded)
        # PIL images have an unambiguous channel dimension for every image processor.
        pictures = [[Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in clip] for clip in clips]
        if "videos" in inspect.signature(processor.preprocess).parameters:
            return processor(pictures, return_tensors=return_tensors, **size)
        counts = [len(clip) for clip in clips]
        encoded = processor([picture for clip in pictures for picture in clip], return_tensors=return_tensors, **size)
        return {key: _group(value, counts) for key, value in encoded.items()}

    def post_process_gaze(
        self, gaze: GazeOutput, target_sizes: tuple[int, int] | Sequence[tuple[int, int]]
    ) -> list[list[dict[str, Any]]]:
        """
        Converts a gaze to plain records, for JSON.

        Args:
            gaze ([`GazeOutput`]): the gaze of a batch of clips.
            target_sizes (`tuple[int, int]` or a sequence of them, one per clip):
                Height and width in pixels of the frames of the boxes; one pair for all clips, or one per clip.

        Returns:
            `list` with an entry per clip: a `list[dict]` with a record per kept patch in the order of choice, without padding,
            with `frame` (counted from 0), `scale` (the size in pixels that its frame was resized to, a number or
            `[height, width]`), `id` (counted from the first patch of the frame), `box` (`[left, top, right, bottom]` in
            pixels) and `order` (of choice in its frame, from 0).

        Raises:
            ValueError: if `target_sizes` are not positive or not one pair or one per clip.

        Example:

        ```python
        >>> from transformers_autogaze import GazeGrid, GazeOutput
        >>> from transformers_autogaze.processing_autogaze import AutoGazeProcessor

        >>> masks = [torch.tensor([[[True]]]), torch.tensor([[[False, False, False, True]]])]
        >>> gaze = GazeOutput.from_masks(masks, GazeGrid([16, 32], patch_size=16))
        >>> AutoGazeProcessor().post_process_gaze(gaze, target_sizes=(100, 200))[0][1]
        {'frame': 0, 'scale': 32, 'id': 4, 'box': [100.0, 50.0, 200.0, 100.0], 'order': 1}

        ```
        """
        sizes = np.asarray(target_sizes)
        sizes = sizes[None].repeat(gaze.batch_size, 0) if sizes.shape == (2,) else sizes
        if sizes.shape != (gaze.batch_size, 2) or not (sizes > 0).all():
            raise ValueError(
                f"`target_sizes` must be (height, width), or one such pair for each of {gaze.batch_size} clips, got "
                f"{target_sizes!r}"
            )
        real, frame = ~gaze.if_padded_gazing, gaze.frame_of_slot
        ids = (gaze.gazing_pos - frame * gaze.num_vision_tokens_each_frame).masked_fill(~real, 0)
        scale, _, _ = gaze.grid.locate(ids)
        earlier = gaze.num_real_each_frame.cumsum(1) - gaze.num_real_each_frame
        order = real.cumsum(1) - 1 - earlier[:, frame]
        scales = [list(size) if isinstance(size, (tuple, list)) else size for size in gaze.scales]
        boxes = {size: gaze.boxes(*size) for size in set(map(tuple, sizes.tolist()))}
        return [
            [
                {"frame": f, "scale": scales[s], "id": i, "box": box, "order": o}
                for f, s, i, box, o in zip(
                    frame[kept].tolist(),
                    scale[clip, kept].tolist(),
                    ids[clip, kept].tolist(),
                    boxes[tuple(sizes[clip].tolist())][clip, kept].tolist(),
                    order[clip, kept].tolist(),
                    strict=True,
                )
            ]
            for clip, kept in enumerate(real)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `processor_config.json`, with the Auto class of the encoder's processor."""
        output = super().to_dict()
        output.pop("encoder_processor", None)
        if self.encoder_processor is not None:
            output[_ENCODER_KEY] = _auto_class_of(self.encoder_processor)
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """
        Saves the processor with its code, and the encoder's processor in the folder `encoder_processor`.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to; created if missing.
            push_to_hub (`bool`, *optional*, defaults to `False`): whether to upload it as well.
            kwargs: `repo_id` (the folder's name by default) and arguments of `push_to_hub`.

        Returns:
            `list[str]`: the configuration files written.
        """
        files = super().save_pretrained(save_directory)
        if self.encoder_processor is not None:
            files += self.encoder_processor.save_pretrained(os.path.join(save_directory, _ENCODER_FOLDER)) or []
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory))), **kwargs)
        return files

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, processor_dict: dict[str, Any] | None = None, **kwargs
    ) -> list[Any]:
        # The base class loads all parts by Auto classes, of which `AutoVideoProcessor` needs torchvision.
        video_processor, encoder = kwargs.pop("video_processor", None), kwargs.pop("encoder_processor", None)
        trust_remote_code = kwargs.pop("trust_remote_code", None)
        if video_processor is None:
            video_processor = AutoGazeVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        auto_class = (processor_dict or {}).get(_ENCODER_KEY)
        if encoder is None and auto_class is not None:
            if auto_class not in ("AutoImageProcessor", "AutoVideoProcessor", "AutoProcessor"):
                raise ValueError(
                    f"`{_ENCODER_KEY}` must be AutoImageProcessor, AutoVideoProcessor or AutoProcessor, got "
                    f"{auto_class!r}"
                )
            hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
            encoder = getattr(transformers, auto_class).from_pretrained(
                pretrained_model_name_or_path,
                subfolder=os.path.join(kwargs.get("subfolder", ""), _ENCODER_FOLDER),
                trust_remote_code=trust_remote_code,
                **{key: kwargs[key] for key in hub if key in kwargs},
            )
        return [video_processor, encoder]


def _is_video_processor(processor: Any) -> bool:
    # Video processors are image processors as well, and the name of their base class depends on the release.
    return hasattr(processor, "get_video_processor_dict")


def _auto_class_of(encoder_processor: Any) -> str:
    """Returns the name of the Auto class that loads the encoder's processor."""
    if isinstance(encoder_processor, ProcessorMixin) and any(
        getattr(encoder_processor, part, None) is not None for part in ("video_processor", "image_processor")
    ):
        return "AutoProcessor"
    if _is_video_processor(encoder_processor):
        return "AutoVideoProcessor"
    if hasattr(encoder_processor, "get_image_processor_dict"):
        return "AutoImageProcessor"
    raise TypeError(
        "`encoder_processor` must be an image processor, a video processor or a processor that has one, such as "
        f"AutoImageProcessor.from_pretrained gives, got {type(encoder_processor)}"
    )


def _group(value: Any, counts: list[int]) -> Any:
    """Groups outputs per image by video, given the number of images of each video."""
    if not isinstance(value, (torch.Tensor, np.ndarray, list)) or len(value) != sum(counts):
        return value
    if not isinstance(value, list) and len(set(counts)) == 1:
        return value.reshape(len(counts), counts[0], *value.shape[1:])
    ends = np.cumsum(counts)
    return [list(value[end - count : end]) for end, count in zip(ends, counts, strict=True)]


AutoGazeProcessor.register_for_auto_class()
