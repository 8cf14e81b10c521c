"""The video processor of AutoGaze: resizing, cropping and normalisation, and its inverse, without torchvision."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch.nn import functional as F
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .frame_arrays_autogaze import (
    flatten_videos,
    frames_of_decoder,
    is_decoder,
    is_video_source,
    rate_of_decoder,
    to_clip,
    with_metadata,
)
from .frame_decoding_autogaze import read_video
from .frame_orientation_autogaze import to_rgb  # noqa: F401 (see modeling_autogaze)
from .frame_sampling_autogaze import sample_indices
from .video_sources_autogaze import resolve_source  # noqa: F401 (see modeling_autogaze)


# PIL's numbers of the filters that torch also has with antialiasing.
_FILTERS = {2: "bilinear", 3: "bicubic"}
_FORMATS = (ChannelDimension.FIRST, ChannelDimension.LAST)
_RESIZE_BATCH = 8  # frames that are resized at once in float32
_MAX_ASPECT_RATIO = 16  # of frames resized by their shorter side, so that very narrow ones do not exhaust the memory


class AutoGazeVideosKwargs(VideosKwargs, total=False):
    """
    Arguments of [`AutoGazeVideoProcessor`] in addition to those of every video processor.

    offset (`bool`): whether rescaling also subtracts 1, which gives -1..1.
    """

    offset: bool | None


class AutoGazeVideoProcessor(BaseVideoProcessor):
    r"""
    Preprocesses videos for AutoGaze as in its training (docs/specification.md, section 9).

    Frames are resized, optionally cropped, multiplied by `rescale_factor`, reduced by 1 (`offset`), and **then** normalised
    with `image_mean` and `image_std`. The defaults are those of the published checkpoint, so a folder with its
    `preprocessor_config.json` loads with `from_pretrained`. Every argument can also be given in a call, for that call only.

    Resizing is antialiased and rounds to integers, as in PIL, but runs batched in torch. The result is within 1 of PIL's
    values 0..255; most pixels are equal. Frames that already have the requested size are not changed.

    Works with and without torchvision.

    Args:
        do_resize (`bool`, *optional*, defaults to `True`): whether to resize.
        size (`int | dict[str, int]`, *optional*, defaults to `{"shortest_edge": 224}`):
            Size in pixels to resize to: `{"height": .., "width": ..}`, or `{"shortest_edge": ..}` (or just a number)
            for the shorter side; the longer one is in proportion, rounded down, and at most 16 times the shorter one.
        default_to_square (`bool`, *optional*, defaults to `False`): whether a single number means both sides.
        resample (`int`, *optional*, defaults to 2): PIL's number of the filter: 2 is bilinear, 3 bicubic.
        do_center_crop (`bool`, *optional*, defaults to `False`): whether to crop the centre after resizing.
        crop_size (`int | dict[str, int]`, *optional*, defaults to `{"height": 224, "width": 224}`):
            Size in pixels of the crop; a smaller frame is padded with black.
        do_rescale (`bool`, *optional*, defaults to `True`): whether to rescale the values 0..255.
        rescale_factor (`float`, *optional*, defaults to 1/127.5): factor of the values 0..255.
        offset (`bool`, *optional*, defaults to `True`): whether to subtract 1 after rescaling.
        do_normalize (`bool`, *optional*, defaults to `True`): whether to normalise with mean and standard deviation.
        image_mean, image_std (`list[float]`, *optional*, default to ImageNet's): mean and standard deviation per channel.
        num_frames (`int`, *optional*): number of frames to sample evenly; all by default.
        fps (`float`, *optional*): number of frames to sample per second. Excludes `num_frames`.
        do_sample_frames (`bool`, *optional*, defaults to `True`): `False` takes all frames, whatever the two above are.
        data_format (`str`, *optional*, defaults to `"channels_first"`):
            Channel dimension of the output, `"channels_first"` or `"channels_last"`.

    Frames are RGB and are not padded: `do_convert_rgb=False` and `do_pad=True` are refused.

    Example:

    ```python
    >>> from transformers_autogaze.video_processing_autogaze import AutoGazeVideoProcessor

    >>> processor = AutoGazeVideoProcessor()
    >>> video = np.zeros((64, 240, 320, 3), dtype=np.uint8)
    >>> inputs = processor(video, num_frames=16, return_tensors="pt")
    >>> inputs["pixel_values_videos"].shape
    torch.Size([1, 16, 3, 224, 298])

    ```
    """

    valid_kwargs = AutoGazeVideosKwargs  # type: ignore[assignment]  # the library's declares those of images
    model_input_names = ["pixel_values_videos"]

    do_resize = True
    size = {"shortest_edge": 224}
    default_to_square = False
    resample = 2
    do_center_crop = False
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    rescale_factor = 1 / 127.5
    offset = True
    do_normalize = True
    image_mean = [0.485, 0.456, 0.406]
    image_std = [0.229, 0.224, 0.225]
    num_frames = None
    fps = None
    do_sample_frames = True

    def __init__(self, **kwargs: Unpack[AutoGazeVideosKwargs]):
        # The published file has the class of the published code here, which must not be saved again.
        own: dict[str, Any] = {name: value for name, value in kwargs.items() if name != "image_processor_type"}
        super().__init__(**own)

    def preprocess(self, videos: Any, **kwargs: Unpack[AutoGazeVideosKwargs]) -> BatchFeature:
        """
        Loads, samples and preprocesses videos.

        Args:
            videos:
                One video or a list of them, nested in any way. A video is a path, an http(s) URL, bytes or a file object, a
                row of a `datasets` Video column or a list of paths of pictures (see
                [`~frame_decoding_autogaze.read_video`]); a decoder of torchcodec or decord; a pair of frames and metadata as
                returned by `load_video`; a list of PIL images or of arrays or tensors of one frame each; or an array or
                tensor of shape `(frames, height, width, channels)` or `(frames, channels, height, width)`, five-dimensional
                for a batch. Channels are 3 for RGB, 1 for grey or 4 for RGBA, of which alpha is dropped. Integers are 0..255.
                Floats are 0..1 if no value of the video exceeds 1 and 0..255 if some exceed 2; they are rounded to integers
                0..255.
            num_frames, fps, do_sample_frames (*optional*): frames to sample; see [`AutoGazeVideoProcessor`].
            video_metadata (`VideoMetadata | dict | list`, *optional*):
                Metadata of arrays, one per video, nested in any way, such as `fps`, which sampling by `fps` needs.
            input_data_format (`str`, *optional*):
                `"channels_first"` or `"channels_last"`, inferred by default. It is needed only for frames of 3 pixels in
                width or height; otherwise such arrays are read as channels last and tensors as channels first.
            device (`str | torch.device`, *optional*): device of the preprocessing; that of the input by default.
            return_metadata (`bool`, *optional*): whether to return `video_metadata`, a list of `VideoMetadata`.
            return_tensors (`str`, *optional*): `"pt"` or `"np"` to stack the videos; a list of tensors otherwise.
            kwargs: all other arguments of [`AutoGazeVideoProcessor`], for this call.

        Returns:
            `BatchFeature` with `pixel_values_videos`, floats of shape `(batch, frames, 3, height, width)`, or a list
            of `(frames, 3, height, width)` without `return_tensors`; of `(.., height, width, 3)` with
            `data_format="channels_last"`.

        Raises:
            ValueError: if a video is empty or not a video, has other channels or values out of range, if frames differ in
                size, if more frames are requested than there are, or if videos of different shapes cannot be stacked.
        """
        options = self._options(kwargs)
        clips, metadata = self.load_clips(videos, **kwargs)
        processed = [self._preprocess_clip(clip, options) for clip in clips]
        values: list[torch.Tensor] | torch.Tensor = processed
        if (return_tensors := kwargs.get("return_tensors")) is not None:
            shapes = [tuple(clip.shape) for clip in processed]
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"`videos` have the shapes {shapes} (frames, channels, height, width) after preprocessing and "
                    "cannot be stacked; give `num_frames` and a `size` with height and width, or leave out "
                    "`return_tensors` to get a list"
                )
            values = torch.stack(processed)
        features = BatchFeature({"pixel_values_videos": values}, tensor_type=return_tensors)
        if options["return_metadata"]:
            features["video_metadata"] = metadata
        return features

    def load_clips(
        self, videos: Any, **kwargs: Unpack[AutoGazeVideosKwargs]
    ) -> tuple[list[torch.Tensor], list[VideoMetadata]]:
        """
        Decodes videos and samples their frames, without preprocessing them.

        Args: as in [`~AutoGazeVideoProcessor.preprocess`]; those of preprocessing are only checked.

        Returns:
            `tuple` of two lists, one entry per video: the frames, a `torch.Tensor` of shape `(frames, 3, height,
            width)` and type uint8, and their `VideoMetadata`.
        """
        options = self._options(kwargs)
        num_frames, fps = kwargs.get("num_frames"), kwargs.get("fps")
        if num_frames is None and fps is None:
            num_frames, fps = self.num_frames, self.fps
        if not options["do_sample_frames"]:
            num_frames, fps = None, None
        videos, given = flatten_videos(videos), kwargs.get("video_metadata")
        given = _flatten(given) if isinstance(given, (list, tuple)) else [given] * len(videos)
        if len(given) != len(videos):
            raise ValueError(f"`video_metadata` must have one entry per video, {len(videos)}, got {len(given)}")
        clips, metadata = [], []
        for index, (video, info) in enumerate(zip(videos, given, strict=True)):
            if is_video_source(video):
                frames, info = read_video(video, num_frames, fps)
                clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
            else:
                name = f"`videos[{index}]`"
                clip, info = _load_frames(video, info, num_frames, fps, kwargs.get("input_data_format"), name)
            clips.append(clip)
            metadata.append(info)
        return clips, metadata

    def to_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Undoes rescaling, offset and normalisation; differentiable.

        Args:
            pixel_values (`torch.Tensor` of shape `(.., 3, height, width)`): output of this processor with its own
                configuration.

        Returns:
            `torch.Tensor` of the same shape: pixels in 0..1, up to rounding.
        """
        scale, shift = _scale_and_shift(self._options({}), pixel_values.device)
        return (pixel_values - shift) / (scale * 255)

    def to_pixel_values(self, levels: torch.Tensor) -> torch.Tensor:
        """
        Rescales and normalises frames that need no resizing; the inverse of [`~AutoGazeVideoProcessor.to_pixels`].

        Args:
            levels (`torch.Tensor` of shape `(.., 3, height, width)`): values 0..255 of any dtype.

        Returns:
            `torch.FloatTensor` of the same shape, with the configuration of this processor.
        """
        return _normalise(levels, self._options({}))

    def resize_levels(self, levels: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Resizes uint8 frames as this processor does, antialiased.

        On the CPU, frames with channels last in memory are resized several times faster than others.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): values 0..255.
            size (`tuple[int, int]`, *optional*): height and width in pixels; by default those of the processor's `size`.

        Returns:
            `torch.ByteTensor` of shape `(frames, 3, *size)`, on the same device.
        """
        if size is None:
            size = _target_size(self.size, levels.shape[-2], levels.shape[-1], "size")
        return _resize(levels, (size[0], size[1]), self.resample)

    def _options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Fills in a call's arguments from the configuration, and checks them before anything is decoded."""
        known = self.valid_kwargs.__annotations__
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(
                f"{type(self).__name__} knows no argument {', '.join(unknown)}; it takes {', '.join(known)}"
            )
        options = {key: getattr(self, key, None) if kwargs.get(key) is None else kwargs[key] for key in known}
        if options["do_pad"]:
            raise ValueError(
                "`do_pad` must be left out or False, since frames are not padded, got True; a `size` of height and width "
                "makes them equal"
            )
        if options["do_convert_rgb"] is False:
            raise ValueError("`do_convert_rgb` must be left out or True, since all frames become RGB, got False")
        if options["data_format"] not in (None, *_FORMATS):
            raise ValueError(
                f"`data_format` must be 'channels_first' or 'channels_last', got {options['data_format']!r}"
            )
        if options["do_resize"]:
            _target_size(options["size"], 1, 1, "size", options["default_to_square"])
            if options["resample"] not in _FILTERS:
                raise ValueError(
                    f"`resample` must be 2 (bilinear) or 3 (bicubic) as in PIL, got {options['resample']!r}"
                )
        if options["do_center_crop"]:
            _target_size(options["crop_size"], 1, 1, "crop_size")
        if options["do_rescale"] and not 0 < options["rescale_factor"] < math.inf:
            raise ValueError(f"`rescale_factor` must be a number above 0, got {options['rescale_factor']!r}")
        if options["do_normalize"]:
            for key in ("image_mean", "image_std"):
                numbers = torch.tensor(options[key], dtype=torch.float64)
                if numbers.numel() not in (1, 3):
                    raise ValueError(f"`{key}` must be one number or three, one per channel, got {options[key]!r}")
                if not numbers.isfinite().all() or (key == "image_std" and (numbers <= 0).any()):
                    kind = "numbers above 0, which pixels are divided by" if key == "image_std" else "finite numbers"
                    raise ValueError(f"`{key}` must be {kind}, got {options[key]!r}")
        return options

    def _preprocess_clip(self, clip: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        clip = clip.to(options["device"] or clip.device)
        if options["do_resize"]:
            height, width = clip.shape[-2:]
            size = _target_size(options["size"], height, width, "size", options["default_to_square"])
            clip = _resize(clip, size, options["resample"])
        if options["do_center_crop"]:
            height, width = clip.shape[-2:]
            clip = _center_crop(clip, _target_size(options["crop_size"], height, width, "crop_size"))
        clip = _normalise(clip, options)
        return clip.permute(0, 2, 3, 1).contiguous() if options["data_format"] == ChannelDimension.LAST else clip


def _load_frames(
    video: Any, metadata: Any, num_frames: int | None, fps: float | None, input_data_format: str | None, name: str
) -> tuple[torch.Tensor, VideoMetadata]:
    """Samples a video that is given as frames, with its metadata."""
    if (pair := with_metadata(video)) is not None:
        video, metadata = pair[0], metadata or pair[1]
    if is_decoder(video):
        metadata = {"fps": rate_of_decoder(video), **dict(metadata or {})}
    count = len(video)
    chosen: Sequence[int] = list(range(count))
    metadata = {key: value for key, value in dict(metadata or {}).items() if value is not None}
    metadata = VideoMetadata(**{"total_num_frames": count, "frames_indices": chosen, **metadata})
    if num_frames is not None or fps is not None:
        if metadata.total_num_frames != count:
            raise ValueError(
                f"`video_metadata` says {metadata.total_num_frames} frames, but {name} has {count}; give all frames to "
                "sample from, or `do_sample_frames=False`"
            )
        metadata.frames_indices = chosen = sample_indices(count, metadata.fps, num_frames, fps)
    if is_decoder(video):
        video = frames_of_decoder(video, chosen)
        chosen = range(len(video))
    clip = to_clip(video, chosen, input_data_format, name)
    metadata.height, metadata.width = metadata.height or clip.shape[-2], metadata.width or clip.shape[-1]
    return clip, metadata


def _flatten(items: Any) -> list[Any]:
    """Flattens nested lists."""
    return [part for item in items for part in (_flatten(item) if isinstance(item, (list, tuple)) else [item])]


def _target_size(size: Any, height: int, width: int, name: str, is_square: bool | None = False) -> tuple[int, int]:
    """Computes height and width of a frame by a `size` or `crop_size`; with `is_square`, a number means both."""
    if isinstance(size, Integral):
        is_square = is_square or name == "crop_size"
        size = {"height": size, "width": size} if is_square else {"shortest_edge": size}
    try:
        wanted = dict(size)
    except (TypeError, ValueError):
        wanted = {}
    target: tuple[Any, Any] = (None, None)
    if wanted.keys() == {"height", "width"}:
        target = wanted["height"], wanted["width"]
    elif wanted.keys() == {"shortest_edge"} and name == "size":
        edge, shorter = wanted["shortest_edge"], min(height, width)
        if isinstance(edge, Integral):
            edge = int(edge)
            longest = _MAX_ASPECT_RATIO * edge
            target = min(edge * height // shorter, longest), min(edge * width // shorter, longest)
    if any(not isinstance(side, Integral) or side < 1 for side in target):
        kinds = "{'height': .., 'width': ..}" + (" or {'shortest_edge': ..}" if name == "size" else "")
        raise ValueError(f"`{name}` must be a number of pixels or {kinds}, got {size!r}")
    return target


def _resize(clip: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """Resizes uint8 frames."""
    if tuple(clip.shape[-2:]) == size:
        return clip
    if clip.device.type == "cpu":
        return F.interpolate(clip, size, mode=_FILTERS[resample], antialias=True)
    # Floats take four times the memory, so a long clip is converted in parts.
    return torch.cat([_resize_in_floats(part, size, resample).to(clip.dtype) for part in clip.split(_RESIZE_BATCH)])


def _resize_in_floats(clip: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    # Torch resizes uint8 only on the CPU. Like PIL, this resizes first the width, then the height, and rounds half up each
    # time.
    for step in ((clip.shape[-2], size[1]), size):
        clip = F.interpolate(clip.float(), step, mode=_FILTERS[resample], antialias=True)
        clip = (clip + 0.5).floor().clamp(0, 255)
    return clip


def _center_crop(clip: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crops the centre of frames, padded with black."""
    (height, width), (high, wide) = clip.shape[-2:], size
    top, left = (height - high) // 2, (width - wide) // 2
    return F.pad(clip, (-left, wide - width + left, -top, high - height + top))


def _normalise(levels: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    scale, shift = _scale_and_shift(options, levels.device)
    # Channels are moved first together with the conversion to floats, which is faster than afterwards.
    return torch.addcmul(shift, levels.to(scale.dtype, memory_format=torch.contiguous_format), scale)


def _scale_and_shift(options: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Combines rescaling, offset and normalisation of values 0..255 into one scale and one shift per channel."""
    scale = torch.tensor(options["rescale_factor"] if options["do_rescale"] else 1.0, dtype=torch.float64)
    shift = torch.tensor(-1.0 if options["do_rescale"] and options["offset"] else 0.0, dtype=torch.float64)
    if options["do_normalize"]:
        mean, std = (torch.tensor(options[key], dtype=torch.float64) for key in ("image_mean", "image_std"))
        scale, shift = scale / std, (shift - mean) / std
    scale, shift = (x.float().view(-1, 1, 1).to(device) for x in (scale, shift))
    return scale, shift


AutoGazeVideoProcessor.register_for_auto_class()
