"""The pipeline "video-token-pruning", from videos in any form to their gaze, records and statistics."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Pipeline
from transformers.pipelines.base import no_collate_fn
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .canvas_measures_autogaze import MeasuringSearch  # noqa: F401
from .canvas_search_autogaze import Canvas  # noqa: F401
from .cells_autogaze import CellTables  # noqa: F401
from .clip_schedule_autogaze import ClipSchedule  # noqa: F401
from .composite_autogaze import CompositeReconstruction
from .configuration_autogaze import GazeSelectorConfig  # noqa: F401
from .cuda_graphs_autogaze import ReplayedCall  # noqa: F401
from .frame_arrays_autogaze import flatten_videos
from .frame_decoding_autogaze import read_video  # noqa: F401 (see modeling_autogaze)
from .frame_orientation_autogaze import to_rgb  # noqa: F401 (see modeling_autogaze)
from .frame_sampling_autogaze import check_sampling
from .gaze_batches_autogaze import stack_gazes  # noqa: F401
from .gaze_files_autogaze import save_gaze  # noqa: F401
from .gaze_pictures_autogaze import paint_gaze  # noqa: F401
from .gazing_autogaze import GazeOutput
from .grid_autogaze import GazeGrid
from .processing_autogaze import AutoGazeProcessor
from .selection_autogaze import GazeSelector, check_names, resize_frames
from .token_budgets_autogaze import check_budgets
from .video_processing_autogaze import AutoGazeVideoProcessor  # noqa: F401 (see modeling_autogaze)
from .video_sources_autogaze import resolve_source  # noqa: F401 (see modeling_autogaze)


Setting = float | Sequence[float] | None


def gaze_clip_by_clip(
    selector: GazeSelector,
    pixel_values_videos: torch.Tensor,
    gazing_ratio: Setting = None,
    task_loss_requirement: Setting = None,
    **options,
) -> GazeOutput:
    """
    Chooses patches of videos of any length, in clips of the length that the selector was trained on.

    Args:
        selector ([`GazeSelector`]):
            The selector. Its `config.max_num_frames` is the length of a clip; with `None`, a video is one clip.
        pixel_values_videos (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`):
            Normalised frames.
        gazing_ratio, task_loss_requirement (`float` or sequence of `float`, *optional*):
            As in [`~GazeSelector.generate`]; a sequence has one value for each frame of a clip and applies to every clip.
        options: further arguments of [`~GazeSelector.generate`].

    Returns:
        [`GazeOutput`] of the videos.

    Raises:
        ValueError: if a sequence has not the length of a clip, or an argument of `generate` is out of range.
    """
    total = pixel_values_videos.shape[1]
    length = min(selector.config.max_num_frames or total, total)
    per_frame: dict[str, Any] = {"gazing_ratio": gazing_ratio, "task_loss_requirement": task_loss_requirement}
    for name, setting in per_frame.items():
        if setting is not None and np.ndim(setting) and len(setting) != length:
            expected = f"{length} of them, one for each frame of the video"
            if length < total:
                expected = (
                    f"{length} of them, one for each frame of a clip (the video of {total} frames is gazed at in clips of "
                    f"{length}, and every clip takes the same numbers)"
                )
            raise ValueError(f"`{name}` must be one number or {expected}, got {len(setting)}")

    def of_clip(setting: Any, frames: int) -> Any:
        return setting if setting is None or not np.ndim(setting) else setting[:frames]

    return GazeOutput.concatenate(
        [
            selector.generate(
                clip,
                gazing_ratio=of_clip(gazing_ratio, clip.shape[1]),
                task_loss_requirement=of_clip(task_loss_requirement, clip.shape[1]),
                **options,
            )
            for clip in pixel_values_videos.split(length, dim=1)
        ]
    )


class VideoTokenPruningPipeline(Pipeline):
    """
    Chooses the patches of videos that a vision encoder needs: `pipeline("video-token-pruning")`.

    A video longer than the selector's clips (16 frames for the published model) is processed clip by clip.

    Args:
        model ([`GazeSelector`] and [`~transformers.PreTrainedModel`]):
            The selector, such as [`AutoGazeModel`]. Without one, `pipeline` uses the default selector, a
            [`FeatureGazeModel`] that keeps a quarter of a clip's tokens, on the finest scale.
        processor ([`AutoGazeProcessor`], *optional*):
            Preprocessing of videos; the published one by default.
        kwargs: the arguments of [`~transformers.Pipeline`], such as `device` and `batch_size`, and default arguments of
            calls.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import pipeline
    >>> import transformers_autogaze

    >>> prune = pipeline("video-token-pruning", device="cpu")
    >>> result = prune(np.zeros((8, 64, 96, 3), dtype=np.uint8), gazing_ratio=0.1)
    >>> result["statistics"]["num_patches"], sorted(result["records"][0])
    (152, ['box', 'frame', 'id', 'order', 'scale'])

    ```
    """

    model: Any  # a `PreTrainedModel` that is a `GazeSelector`
    processor: AutoGazeProcessor

    _load_processor = None
    # The library declares these as `None` only.
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(self, model, processor: AutoGazeProcessor | None = None, **kwargs):
        processor = AutoGazeProcessor() if processor is None else processor
        super().__init__(model=model, processor=processor, **kwargs)

    def __call__(  # type: ignore[override]  # as in other pipelines, the first argument has its own name
        self, videos: Any, **kwargs
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterable[dict[str, Any]]:
        """
        Prunes one video or many.

        Args:
            videos:
                A video as [`AutoGazeProcessor`] takes it: a path, a URL, bytes, a list of PIL images, an array or tensor
                of frames; or a list, generator or `Dataset` of videos.
            gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip (*optional*):
                How much to keep; see [`~GazeSelector.generate`]. A sequence has one value per frame of a clip. Without any of
                them, the selector's configuration applies.
            target_scales, target_patch_size (*optional*):
                Scales and patch size of the encoder that the gaze is for; see [`~GazeSelector.generate`]. The frames
                are resized to the last scale.
            num_frames, fps (*optional*): which frames to take, as [`AutoGazeProcessor`] does.
            return_patches (`bool`, *optional*, defaults to `False`): whether to return the pixels of the kept patches.
            return_reconstruction (`bool`, *optional*, defaults to `False`): whether to return the closed-form
                reconstruction from the kept patches.
            batch_size (`int`, *optional*, defaults to 1): number of videos of equal shape in a batch.
            num_workers (`int`, *optional*, defaults to 0): number of processes that decode videos.

        Returns:
            `dict` for one video, a list of them for a list, an iterator for a generator or `Dataset`. If one of several videos
            cannot be read, a warning is issued and its result is `{"error": message}`. The keys are:

            - `gaze` ([`GazeOutput`]): the gaze, a batch of one;
            - `records` (`list[dict]`): frame, scale, box and order of each kept patch, in the size of the original frames;
            - `statistics` (`dict`): see [`~GazeOutput.statistics`]; with `return_reconstruction` also `psnr`, in dB;
            - `patches` (`torch.FloatTensor` of shape `(N, 3, patch_size, patch_size)`), if requested: pixels in 0..1;
            - `reconstruction` (`torch.FloatTensor` of shape `(frames, 3, height, width)`), if requested: pixels in 0..1,
              in the size of the finest scale.

        Raises:
            ValueError: if a single video cannot be read, or an argument is out of range.
            TypeError: if there is no such argument.
        """
        if isinstance(videos, Dataset):
            return super().__call__(videos, **kwargs)
        if isinstance(videos, Iterator):
            return super().__call__((video for video in videos), **kwargs)
        listed = flatten_videos(videos)
        results = super().__call__(listed, **kwargs)
        is_list = isinstance(videos, (list, tuple)) and listed[0] is not videos
        return results if is_list or getattr(videos, "ndim", 0) == 5 else results[0]

    def _try_preprocess(self, video: Any, **params) -> dict[str, Any]:
        """Preprocesses one video; returns the error if it cannot be read."""
        try:
            return self.preprocess(video, **params)
        except (OSError, ValueError) as error:
            return {"error": error}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Saves the selector, the processor and their code to a folder from which `pipeline` loads them.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to; created if missing.
            kwargs: the arguments of [`~transformers.PreTrainedModel.save_pretrained`].
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(
        self,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
        target_scales: Sequence[int] | None = None,
        target_patch_size: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        return_patches: bool | None = None,
        return_reconstruction: bool | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess = {"num_frames": num_frames, "fps": fps, "target_scales": target_scales}
        forward = {
            "gazing_ratio": gazing_ratio,
            "task_loss_requirement": task_loss_requirement,
            "clip_ratio": clip_ratio,
            "tokens_per_clip": tokens_per_clip,
            "target_scales": target_scales,
            "target_patch_size": target_patch_size,
            "return_patches": return_patches,
            "return_reconstruction": return_reconstruction,
        }
        check_names(
            'pipeline("video-token-pruning")', unknown, [self._sanitize_parameters], ("batch_size", "num_workers")
        )
        check_budgets(gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip)
        # Only given arguments, so that others do not override the pipeline's defaults.
        return _without_none(preprocess), _without_none(forward), {}

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[dict[str, Any]]:
        """Processes videos in order, in batches of consecutive videos of equal shape."""
        check_sampling(preprocess_params.get("num_frames"), preprocess_params.get("fps"))
        prepared: Dataset
        if isinstance(inputs, Iterator):
            prepared = PipelineIterator(inputs, self._try_preprocess, preprocess_params)
            num_workers = min(num_workers, 1)
        else:
            prepared = PipelineDataset(inputs, self._try_preprocess, preprocess_params)
        is_single = hasattr(inputs, "__len__") and len(inputs) == 1
        loader = DataLoader(prepared, num_workers=num_workers, batch_size=1, collate_fn=no_collate_fn)
        for batch in _batches_of_equal_shape(loader, batch_size):
            if (error := batch[0].get("error")) is not None:
                if is_single:
                    raise error
                warnings.warn(f"a video is left out: {error}", stacklevel=2)
                yield {"error": str(error)}
                continue
            videos = torch.cat([item["pixel_values_videos"] for item in batch])
            outputs = self.forward({"pixel_values_videos": videos}, **forward_params)
            gaze = GazeOutput(**outputs["gaze"])
            for index, item in enumerate(batch):
                own = {key: value[index] for key, value in outputs.items() if key != "gaze"}
                item = {"gaze": gaze.select(index), "frame_size": item["frame_size"], **own}
                yield self.postprocess(item, **postprocess_params)

    def preprocess(  # type: ignore[override]  # pipelines name their own arguments
        self,
        video: Any,
        num_frames: int | None = None,
        fps: float | None = None,
        target_scales: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Decodes one video and returns its `pixel_values_videos` and the size of its frames."""
        processor = self.processor.video_processor
        clips, metadata = processor.load_clips(video, num_frames=num_frames, fps=fps)
        size = None
        if target_scales is not None:
            height, width = GazeGrid(target_scales, patch_size=1).sizes[-1]
            size = {"height": height, "width": width}
        features = processor(
            clips,
            do_sample_frames=False,
            input_data_format="channels_first",
            data_format="channels_first",
            return_tensors="pt",
            size=size,
        )
        return {"pixel_values_videos": features["pixel_values_videos"], "frame_size": tuple(clips[0].shape[-2:])}

    def _forward(  # type: ignore[override]  # pipelines name their own arguments
        self,
        model_inputs: dict[str, torch.Tensor],
        return_patches: bool = False,
        return_reconstruction: bool = False,
        **settings,
    ) -> dict[str, Any]:
        # Frames are resized in float32 at least, before the model converts them to its dtype.
        video = model_inputs["pixel_values_videos"].to(torch.promote_types(self.model.dtype, torch.float32))
        gaze = gaze_clip_by_clip(self.model, video, **settings)
        outputs: dict[str, Any] = {"gaze": gaze}
        if return_patches or return_reconstruction:
            pixels = self.processor.video_processor.to_pixels(video.float()).clamp(0, 1)
            if return_patches:
                outputs["patches"] = gaze.gather_patches(pixels).clamp(0, 1)
            if return_reconstruction:
                frames = resize_frames(pixels, gaze.grid.sizes[-1]).clamp(0, 1)
                outputs["reconstruction"] = CompositeReconstruction(gaze.grid).reconstruct(frames, gaze)
                error = (outputs["reconstruction"] - frames).square().mean((1, 2, 3, 4))
                outputs["psnr"] = -10 * error.clamp(min=1e-10).log10()
        return outputs

    def postprocess(  # type: ignore[override]  # there are no arguments
        self, model_outputs: dict[str, Any]
    ) -> dict[str, Any]:
        """Converts the gaze of one video to records and statistics."""
        gaze = model_outputs["gaze"]
        result = {
            "gaze": gaze,
            "records": self.processor.post_process_gaze(gaze, model_outputs["frame_size"])[0],
            "statistics": gaze.statistics(),
        }
        if "patches" in model_outputs:
            result["patches"] = model_outputs["patches"]
        if "reconstruction" in model_outputs:
            result["reconstruction"] = model_outputs["reconstruction"]
            result["statistics"]["psnr"] = float(model_outputs["psnr"])
        return result


def _without_none(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _batches_of_equal_shape(items: Iterable[dict[str, Any]], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for item in items:
        if batch and (len(batch) == batch_size or _shape_of(batch[0]) != _shape_of(item)):
            yield batch
            batch = []
        if "error" in item:
            yield [item]
        else:
            batch.append(item)
    if batch:
        yield batch


def _shape_of(item: dict[str, Any]) -> tuple[int, ...] | None:
    return None if "error" in item else tuple(item["pixel_values_videos"].shape)
