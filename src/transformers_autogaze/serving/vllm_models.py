"""vLLM's Qwen2.5-VL and Qwen3-VL, whose towers encode only the kept merge units of gazed videos."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from vllm.model_executor.models.interfaces import SupportsEncoderCudaGraph, SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder, Qwen3VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from .vllm_processing import (
    KEPT,
    GazeQwen2_5_VLMultiModalProcessor,
    GazeQwen2_5_VLProcessingInfo,
    GazeQwen3VLMultiModalProcessor,
    GazeQwen3VLProcessingInfo,
)
from .vllm_tower import encode_kept_units


class _GazeModel(nn.Module, SupportsMultiModal, SupportsEncoderCudaGraph, SupportsMRoPE):
    """Encodes the kept units of gazed videos and gives them their M-RoPE positions; to be the first base class."""

    config: Any  # both are set by vLLM's models
    visual: Any

    def embed_multimodal(self, **kwargs: Any) -> Any:
        is_kept = kwargs.pop(KEPT, None)
        if is_kept is None or bool(is_kept.all()):
            return super().embed_multimodal(**kwargs)
        unit = self.visual.spatial_merge_size**2
        grids = kwargs["video_grid_thw"]
        kept = is_kept.split((grids.prod(1) // unit).tolist())
        patches = kwargs["pixel_values_videos"].split([int(part.sum()) * unit for part in kept])
        is_whole = torch.stack([part.all() for part in kept])
        features: list[Any] = [None] * len(kept)
        for number, feature in self._embed_gazed(patches, grids, kept, (~is_whole).nonzero().flatten().tolist()):
            features[number] = feature
        # Videos of which everything is kept go through vLLM's own code, also in a batch with gazed ones.
        if whole := is_whole.nonzero().flatten().tolist():
            pixels = torch.cat([patches[number] for number in whole])
            found = super().embed_multimodal(pixel_values_videos=pixels, video_grid_thw=grids[whole])
            for number, feature in zip(whole, found, strict=True):
                features[number] = feature
        return tuple(features)

    def _embed_gazed(
        self,
        patches: tuple[torch.Tensor, ...],
        grids: torch.Tensor,
        kept: tuple[torch.Tensor, ...],
        numbers: list[int],
    ) -> Any:
        """Encodes the videos of these numbers; gives pairs of a number and the features of the video."""
        parts = [kept[number] for number in numbers]
        pixels = torch.cat([patches[number] for number in numbers])
        features = encode_kept_units(self.visual, pixels, grids[numbers], torch.cat(parts))
        return zip(numbers, features.split([int(part.sum()) for part in parts]), strict=True)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        # vLLM counts the positions in the prompt with all units; those of dropped units are then left out.
        tokens: list[int] = []
        is_left: list[bool] = []
        features, copied = [], 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            position = feature.mm_position
            text = input_tokens[copied : position.offset]
            tokens, is_left = tokens + text, is_left + [True] * len(text)
            copied = position.offset + position.length
            placeholder, is_left_here = self._restore(input_tokens[position.offset : copied], feature)
            moved = replace(position, offset=len(tokens), length=len(placeholder), is_embed=None)
            features.append(replace(feature, mm_position=moved))
            tokens, is_left = tokens + placeholder, is_left + is_left_here
        text = input_tokens[copied:]
        tokens, is_left = tokens + text, is_left + [True] * len(text)
        if all(is_left):
            return super().get_mrope_input_positions(input_tokens, mm_features)
        positions, delta = super().get_mrope_input_positions(tokens, features)
        return positions[:, torch.tensor(is_left)], delta + len(tokens) - len(input_tokens)

    def _restore(self, placeholder: list[int], feature: MultiModalFeatureSpec) -> tuple[list[int], list[bool]]:
        """Adds the dropped units to the placeholder of a video; gives its tokens, and whether each is in the prompt."""
        if feature.data is None or KEPT not in feature.data:
            return placeholder, [True] * len(placeholder)
        is_kept = cast(torch.Tensor, feature.data[KEPT].data)
        video_token, start_token = self.config.video_token_id, self.config.vision_start_token_id
        if start_token not in placeholder:  # Qwen2.5-VL: nothing but units
            return [video_token] * len(is_kept), is_kept.tolist()
        grid = cast(torch.Tensor, feature.data["video_grid_thw"].data)
        frames = iter(is_kept.view(int(grid[0]), -1).tolist())
        tokens, is_left = [], []
        for token in placeholder:
            if token != video_token:
                tokens.append(token)
                is_left.append(True)
            if token == start_token:
                units = next(frames)
                tokens += [video_token] * len(units)
                is_left += units
        return tokens, is_left

    def get_encoder_cudagraph_config(self) -> Any:
        # A CUDA graph is captured with all units of a video.
        config = super().get_encoder_cudagraph_config()
        return replace(config, modalities=[modality for modality in config.modalities if modality != "video"])


@MULTIMODAL_REGISTRY.register_processor(
    GazeQwen2_5_VLMultiModalProcessor, info=GazeQwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class GazeQwen2_5_VLForConditionalGeneration(_GazeModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, which sees only the kept merge units of gazed videos."""


@MULTIMODAL_REGISTRY.register_processor(
    GazeQwen3VLMultiModalProcessor, info=GazeQwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class GazeQwen3VLForConditionalGeneration(_GazeModel, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL, which sees only the kept merge units of gazed videos."""
