"""
vLLM's processors of Qwen2.5-VL and Qwen3-VL, with a selector that gazes at the frames after preprocessing.

The processor's outputs have one more field, the mask of kept merge units (`KEPT`); pixels and placeholders of the other units
are removed. `vllm_models` encodes the kept units and computes their positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import BatchFeature
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLMultiModalProcessor, Qwen2_5_VLProcessingInfo
from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from ..integrations.normalization import normalizing_part
from ..integrations.qwen_vl_gazing import UnitGazer, UnitSizes
from ..integrations.qwen_vl_units import kept_units
from .settings import GAZE_ARGUMENTS, GAZE_SETTINGS, GazeSettings, load_gaze_model, read_settings


KEPT = "gaze_is_kept"
"""Name of the field with the mask of kept merge units of a video, in the order of tokens."""
_NORMALIZATION = ("image_mean", "image_std", "rescale_factor", "do_normalize", "do_rescale", "offset")


class GazeProcessingContext(InputProcessingContext):
    """Separates the arguments of gazing from those that transformers' processors take."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **options: Any) -> dict[str, Any]:
        merged = super().get_merged_mm_kwargs(kwargs, **options)
        return {name: value for name, value in merged.items() if name not in GAZE_ARGUMENTS}

    def read_gaze(self, kwargs: Mapping[str, object]) -> GazeSettings | None:
        """Reads the gazing arguments of a request; see [`read_settings`]."""
        config = self.get_mm_config()
        settings = read_settings(config.mm_processor_kwargs or {}, kwargs)
        if settings is not None and config.is_multimodal_pruning_enabled():
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in settings.options)} must not be given where vLLM itself prunes "
                f"videos, got `video_pruning_rate` {config.video_pruning_rate}"
            )
        return settings


class _GazeInfo(BaseProcessingInfo):
    """Replaces the context of a processor by [`GazeProcessingContext`]; to be the first base class."""

    def __init__(self, ctx: InputProcessingContext):
        super().__init__(GazeProcessingContext(ctx.model_config, ctx.tokenizer))


class GazeQwen2_5_VLProcessingInfo(_GazeInfo, Qwen2_5_VLProcessingInfo):
    """vLLM's information about the processor of Qwen2.5-VL."""


class GazeQwen3VLProcessingInfo(_GazeInfo, Qwen3VLProcessingInfo):
    """vLLM's information about the processor of Qwen3-VL."""


class _GazeProcessor(BaseMultiModalProcessor):
    """Gazes after vLLM's own preprocessing; to be the first base class."""

    can_gaze = True

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().get_dummy_inputs(*args, **kwargs)
        self.info.ctx.read_gaze({})  # Wrong settings of the engine raise here, before it starts.
        # vLLM measures with these inputs how much memory it needs, which must be enough for whole videos.
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, **dict.fromkeys(GAZE_SETTINGS)}
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        self.info.ctx.read_gaze(inputs.hf_processor_mm_kwargs)  # Wrong settings raise here, before any preprocessing.
        return super().apply(inputs, timing_ctx)

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        if "pixel_values_videos" not in data:
            return data
        settings = self.info.ctx.read_gaze(hf_processor_mm_kwargs)
        patches, grids = data["pixel_values_videos"], data["video_grid_thw"]
        if settings is None:
            data[KEPT] = torch.ones(int(self._count_units(grids).sum()), dtype=torch.bool)
            return data
        is_kept = torch.cat(self._gaze(patches, grids, settings, hf_processor_mm_kwargs))
        data[KEPT] = is_kept
        data["pixel_values_videos"] = patches.unflatten(0, (len(is_kept), -1))[is_kept].flatten(0, 1)
        return data

    def _count_units(self, grids: torch.Tensor) -> torch.Tensor:
        return grids.prod(-1) // self.info.get_hf_config().vision_config.spatial_merge_size ** 2

    def _gaze(
        self,
        patches: torch.Tensor,
        grids: torch.Tensor,
        settings: GazeSettings,
        hf_processor_mm_kwargs: Mapping[str, object],
    ) -> list[torch.Tensor]:
        """Gazes at videos; gives the mask of kept merge units of each."""
        for number, frames in enumerate(grids[:, 0].tolist()):
            if not frames:
                raise ValueError(f"video {number} must have frames to gaze at, got none")
        vision = self.info.get_hf_config().vision_config
        selector, gaze_processor = load_gaze_model(settings.gaze_model)
        sizes = UnitSizes(vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size)
        gazer = UnitGazer(selector, self._normalization(hf_processor_mm_kwargs), gaze_processor, sizes)
        kept = []
        for number, (gaze, grid) in enumerate(
            zip(gazer.gaze(patches, grids, **settings.options), grids.tolist(), strict=True)
        ):
            units = (grid[0], grid[1] // sizes.merge_size, grid[2] // sizes.merge_size)
            kept.append(kept_units(gaze, units, sizes.frames)[0].flatten().cpu())
            if not kept[-1].any():
                raise ValueError(f"{settings.options} keep nothing of video {number}; ask for more")
        return kept

    def _normalization(self, hf_processor_mm_kwargs: Mapping[str, object]) -> SimpleNamespace:
        """Gives the normalization of the frames: that of the processor, with the arguments of the request."""
        part = normalizing_part(self.info.get_hf_processor(**hf_processor_mm_kwargs))
        values = {name: getattr(part, name) for name in _NORMALIZATION if hasattr(part, name)}
        given = self.info._merge_and_resolve_mm_processor_kwargs(hf_processor_mm_kwargs)
        for source in (given, given.get("videos_kwargs", {})):
            values.update({name: source[name] for name in _NORMALIZATION if source.get(name) is not None})
        return SimpleNamespace(**values)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if KEPT in hf_inputs:
            units = self._count_units(hf_inputs["video_grid_thw"])
            kept = torch.stack([part.sum() for part in hf_inputs[KEPT].split(units.tolist())])
            patches = kept * self.info.get_hf_config().vision_config.spatial_merge_size ** 2
            fields[KEPT] = MultiModalFieldConfig.flat_from_sizes("video", units, keep_on_cpu=True)
            fields["pixel_values_videos"] = MultiModalFieldConfig.flat_from_sizes("video", patches)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [
            self._without_dropped(cast(PromptReplacement, update), out_mm_kwargs)
            if update.modality == "video"
            else update
            for update in updates
        ]

    def _without_dropped(self, update: PromptReplacement, out_mm_kwargs: MultiModalKwargsItems) -> PromptReplacement:
        """Removes the placeholder tokens of dropped units from the replacement of a video."""
        video_token = self.info.get_hf_config().video_token_id
        whole_video = cast(Callable[[int], Any], update.replacement)

        def replacement(item_idx: int) -> Any:
            whole = whole_video(item_idx)
            item = out_mm_kwargs["video"][item_idx]
            kept = cast(torch.Tensor, item[KEPT].data) if KEPT in item else None
            if kept is None or bool(kept.all()):
                return whole
            is_kept = iter(kept.tolist())
            tokens = whole.full if isinstance(whole, PromptUpdateDetails) else whole
            left = [token for token in tokens if token != video_token or next(is_kept)]
            return PromptUpdateDetails.select_token_id(left, video_token)

        return replace(update, replacement=replacement)


class GazeQwen2_5_VLMultiModalProcessor(_GazeProcessor, Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor of Qwen2.5-VL, which gazes at videos if a request says how much to keep."""


class GazeQwen3VLMultiModalProcessor(_GazeProcessor, Qwen3VLMultiModalProcessor):
    """vLLM's processor of Qwen3-VL, which gazes at videos if a request says how much to keep."""
