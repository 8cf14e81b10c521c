"""
Teachers: encoders that tell a network what they make of every place of a frame, seen at several scales.

This module owns how image towers and the towers of Qwen's MLLMs are loaded and asked. What becomes of their features is
`teacher_features`' matter.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from ..evaluation.feature_clips import encoder_normalization
from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..hub.checkpoints import load_config, load_encoder, load_whole
from ..integrations.qwen_vl_tower import encode_units
from ..integrations.qwen_vl_units import fold_units
from ..integrations.vision import GazeVisionModel


_QWEN = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}


class FeatureTeacher(ABC):
    """
    An encoder that tells what it makes of frames; see [`load_teacher`].

    Args:
        encoder (`str` or `os.PathLike`): folder or Hub repository that it was loaded from.
        tower (`nn.Module`): its tower.
        grid ([`GazeGrid`]): scales and patches that features are made of, one feature each.
        hidden_size (`int`): channels of a feature.
        device (`torch.device`): where it computes.
        dtype (`torch.dtype`): what it computes in.
    """

    def __init__(
        self,
        encoder: str | os.PathLike,
        tower: nn.Module,
        grid: GazeGrid,
        hidden_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.name = Path(encoder).name if os.path.isdir(encoder) else str(encoder)
        """`str`: the encoder's name."""
        self.grid, self.hidden_size, self.device, self.dtype = grid, hidden_size, device, dtype
        self.processor = encoder_normalization(encoder, tower.config.model_type)
        self._tower = tower.eval().requires_grad_(False).to(device)

    @abstractmethod
    def _encode(self, frames: torch.Tensor, scale: int) -> torch.Tensor:
        """Encodes normalised frames `(frames, 3, height, width)` one by one: `(frames, patches, hidden)` of a scale."""

    @abstractmethod
    def _encode_kept(self, frames: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        """Encodes the kept patches of a clip, at the finest scale and with attention to the canvas: `(kept, hidden)`."""

    @torch.no_grad()
    def __call__(self, levels: torch.Tensor, scales: Sequence[int] | None = None) -> torch.Tensor:
        """
        Encodes frames, every scale alone.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255, of the finest scale's size.
            scales (`Sequence[int]`, *optional*): numbers of the scales to see frames at, all by default.

        Returns:
            `torch.FloatTensor` of shape `(frames, patches, hidden)`: features of the patches of these scales, by id.
        """
        frames = self.processor.to_pixel_values(levels.to(self.device))
        scales = range(len(self.grid.grids)) if scales is None else scales
        with self._autocast():
            return torch.cat([self._encode(frames, scale).float() for scale in scales], dim=1)

    @torch.no_grad()
    def encode_kept(self, levels: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        """
        Encodes the kept patches of a clip as a video model would: a patch sees its frame and what was kept before.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): as for a call, of one clip.
            is_kept (`torch.BoolTensor` of shape `(frames, patches)`): the patches of the finest scale to encode.

        Returns:
            `torch.FloatTensor` of shape `(kept, hidden)`: frame by frame.
        """
        frames = self.processor.to_pixel_values(levels.to(self.device))
        with self._autocast():
            return self._encode_kept(frames, is_kept.to(self.device)).float()

    def fingerprint(self) -> str:
        """Gives a number that is another one for another encoder, configuration or weights."""
        digest = hashlib.sha256(self.name.encode())
        digest.update(json.dumps(self._tower.config.to_dict(), sort_keys=True, default=str).encode())
        for name, weight in sorted(self._tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _autocast(self) -> AbstractContextManager:
        """Gives the context in which the encoder computes in `dtype`."""
        is_mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if is_mixed else nullcontext()


class TowerTeacher(FeatureTeacher):
    """An image tower that [`GazeVisionModel`] takes; its features are those of patches. See [`load_teacher`]."""

    def __init__(self, encoder: str | os.PathLike, scales: Sequence[int], device: torch.device, dtype: torch.dtype):
        found, _ = load_encoder(encoder, argument="encoder")
        if found.adapter.tubelet_size != 1:
            raise ValueError(
                f"`encoder` must be a tower for images, got {found.config.model_type}, whose tokens cover "
                f"{found.adapter.tubelet_size} frames"
            )
        tower = GazeVisionModel(found.vision_model, [scale * found.grid.patch_size for scale in scales])
        super().__init__(encoder, tower, tower.grid, tower.hidden_size, device, dtype)
        self._finest = GazeVisionModel(found.vision_model, tower.grid.sizes[-1:], attention="canvas").eval()

    def _encode(self, frames: torch.Tensor, scale: int) -> torch.Tensor:
        gaze = GazeOutput.full(self.grid, 1, len(frames), scale)
        return self._tower(frames[None], gaze, attention="frame").last_hidden_state.unflatten(0, (len(frames), -1))

    def _encode_kept(self, frames: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        gaze = GazeOutput.from_masks([is_kept[None]], self._finest.grid)
        return self._finest(frames[None], gaze).last_hidden_state


class UnitTeacher(FeatureTeacher):
    """
    The tower of a Qwen2.5-VL or Qwen3-VL; its features are those of merge units, what the language model reads as a token.

    A frame is seen as a picture is, at both times of a unit. See [`load_teacher`].
    """

    def __init__(self, encoder: str | os.PathLike, scales: Sequence[int], device: torch.device, dtype: torch.dtype):
        config = AutoConfig.from_pretrained(encoder)
        model = load_whole(_QWEN[config.model_type], encoder, config, "encoder", unused=r"language_model\.|^lm_head")
        vision = config.vision_config
        self.sizes = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        side = vision.spatial_merge_size * vision.patch_size
        grid = GazeGrid([scale * side for scale in scales], side)
        super().__init__(encoder, model.model.visual, grid, vision.out_hidden_size, device, dtype)

    def _encode(self, frames: torch.Tensor, scale: int) -> torch.Tensor:
        if self.grid.sizes[scale] != tuple(frames.shape[-2:]):
            frames = F.interpolate(frames, self.grid.sizes[scale], mode="bicubic", align_corners=False)
        counts = self._count_patches(frames)
        features = self._encode_units(frames, counts.new_tensor([[1, *counts]] * len(frames)))
        return features.unflatten(0, (len(frames), -1))

    def _encode_kept(self, frames: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        if not is_kept.any():
            return frames.new_zeros(0, self.hidden_size)
        counts = self._count_patches(frames)
        return self._encode_units(frames, counts.new_tensor([[len(frames), *counts]]), is_kept.flatten())

    def _count_patches(self, frames: torch.Tensor) -> torch.Tensor:
        """Gives the rows and columns of patches of a frame."""
        return torch.tensor(frames.shape[-2:], device=frames.device) // self.sizes[1]

    def _encode_units(
        self, frames: torch.Tensor, grid_thw: torch.Tensor, is_kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        merge, _, times = self.sizes
        pixel_values = fold_units(frames.repeat_interleave(times, dim=0), *self.sizes)
        if is_kept is None:
            is_kept = torch.ones(len(pixel_values) // merge**2, dtype=torch.bool, device=frames.device)
        return encode_units(self._tower, pixel_values, grid_thw, is_kept, attention="canvas")[0]


def load_teacher(
    encoder: str | os.PathLike,
    scales: Sequence[int],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FeatureTeacher:
    """
    Loads an encoder to learn from.

    Args:
        encoder (`str` or `os.PathLike`):
            Folder or Hub repository of an image tower that [`GazeVisionModel`] takes, or of a Qwen2.5-VL or Qwen3-VL, with the
            configuration of its image processor.
        scales (`Sequence[int]`): rows and columns of patches, or of merge units, of each scale, coarse to fine.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where it computes.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            What it computes in; weights stay in float32, and with `torch.bfloat16` products are rounded.

    Returns:
        [`FeatureTeacher`]

    Raises:
        ValueError: if there is no such encoder, its family is not known, it is one for videos, or the scales do not fit.
    """
    check_scales(scales)
    is_qwen = load_config(encoder, "encoder").model_type in _QWEN
    return (UnitTeacher if is_qwen else TowerTeacher)(encoder, scales, torch.device(device), dtype)


def check_scales(scales: Sequence[int]) -> None:
    """Raises a ValueError where `scales` are not rows of patches, coarse to fine."""
    numbers = list(scales)
    if not numbers or any(not isinstance(n, int) or n < 1 for n in numbers) or numbers != sorted(set(numbers)):
        raise ValueError(
            f"`scales` must be rows of patches of each scale, whole numbers from coarse to fine such as 2 4 7 14, got "
            f"{numbers}"
        )
