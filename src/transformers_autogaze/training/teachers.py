"""Teachers: image towers and the towers of Qwen's MLLMs, which encode frames at several scales, as targets of distillation."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from ..evaluation.feature_clips import encoder_normalization
from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..hub.checkpoints import load_complete, load_encoder, load_tower_config
from ..integrations.qwen_vl_tower import encode_units
from ..integrations.qwen_vl_units import fold_units
from ..integrations.vision import GazeVisionModel


_QWEN = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}


class FeatureTeacher(ABC):
    """
    An encoder that a network learns from; see [`load_teacher`].

    Args:
        encoder (`str` or `os.PathLike`): folder or Hub repository that it was loaded from.
        tower (`nn.Module`): its tower, with a `config`.
        grid ([`GazeGrid`]): scales and patches, each of which has one feature.
        hidden_size (`int`): channels of a feature.
        device (`torch.device`): device of the tower.
        dtype (`torch.dtype`): precision of the computation.
    """

    def __init__(
        self,
        encoder: str | os.PathLike,
        tower: Any,
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
        """Encodes normalised frames `(frames, 3, height, width)` separately, at one scale: `(frames, patches, hidden)`."""

    @abstractmethod
    def _encode_kept(self, frames: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        """Encodes the kept patches of a clip, at the finest scale and with attention to the canvas: `(kept, hidden)`."""

    @torch.no_grad()
    def __call__(self, levels: torch.Tensor, scales: Sequence[int] | None = None) -> torch.Tensor:
        """
        Encodes frames, each scale separately.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255, of the finest scale's size.
            scales (`Sequence[int]`, *optional*): indices of the scales, all by default.

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
        Encodes the kept patches of a clip, which attend to the canvas: to their frame and to patches kept before.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255 of one clip, as for a call.
            is_kept (`torch.BoolTensor` of shape `(frames, patches)`): the patches of the finest scale to encode.

        Returns:
            `torch.FloatTensor` of shape `(kept, hidden)`: frame by frame.
        """
        frames = self.processor.to_pixel_values(levels.to(self.device))
        with self._autocast():
            return self._encode_kept(frames, is_kept.to(self.device)).float()

    def fingerprint(self) -> str:
        """Returns a hash of the encoder's name, configuration and weights."""
        digest = hashlib.sha256(self.name.encode())
        digest.update(json.dumps(self._tower.config.to_dict(), sort_keys=True, default=str).encode())
        for name, weight in sorted(self._tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _autocast(self) -> AbstractContextManager:
        """Returns the context in which the encoder computes in `dtype`."""
        is_mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if is_mixed else nullcontext()


class TowerTeacher(FeatureTeacher):
    """An image tower that [`GazeVisionModel`] supports, with one feature for each patch. See [`load_teacher`]."""

    def __init__(self, encoder: str | os.PathLike, scales: Sequence[int], device: torch.device, dtype: torch.dtype):
        model, _ = load_encoder(encoder, argument="encoder")
        tower = GazeVisionModel(model.vision_model, [scale * model.grid.patch_size for scale in scales])
        super().__init__(encoder, tower, tower.grid, tower.hidden_size, device, dtype)
        self._finest_tower = GazeVisionModel(model.vision_model, tower.grid.sizes[-1:], attention="canvas").eval()

    def _encode(self, frames: torch.Tensor, scale: int) -> torch.Tensor:
        gaze = GazeOutput.full(self.grid, 1, len(frames), scale)
        return self._tower(frames[None], gaze, attention="frame").last_hidden_state.unflatten(0, (len(frames), -1))

    def _encode_kept(self, frames: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        gaze = GazeOutput.from_masks([is_kept[None]], self._finest_tower.grid)
        return self._finest_tower(frames[None], gaze).last_hidden_state


class UnitTeacher(FeatureTeacher):
    """
    The tower of a Qwen2.5-VL or Qwen3-VL, with one feature for each merge unit, which is one token of the language model.

    Each frame is encoded as a single image, which Qwen repeats to fill a temporal patch. See [`load_teacher`].
    """

    def __init__(self, encoder: str | os.PathLike, scales: Sequence[int], device: torch.device, dtype: torch.dtype):
        config = AutoConfig.from_pretrained(encoder)
        model = load_complete(
            _QWEN[config.model_type], encoder, config, "encoder", unused=r"language_model\.|^lm_head"
        )
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
        """Returns the numbers of rows and columns of patches of a frame."""
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
    Loads an encoder as teacher.

    Args:
        encoder (`str` or `os.PathLike`):
            Folder or Hub repository of an image tower that [`GazeVisionModel`] supports, or of a Qwen2.5-VL or Qwen3-VL, with the
            configuration of its image processor.
        scales (`Sequence[int]`): rows and columns of patches, or of merge units, at each scale, coarse to fine.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): device of the encoder.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Precision of the computation; with a lower precision, autocast is used and weights stay in float32.

    Returns:
        [`FeatureTeacher`]

    Raises:
        ValueError: if the encoder does not exist, is not supported or encodes videos, or the scales do not fit.
    """
    check_scales(scales)
    is_qwen = check_encoder(encoder).model_type in _QWEN
    return (UnitTeacher if is_qwen else TowerTeacher)(encoder, scales, torch.device(device), dtype)


def check_encoder(encoder: str | os.PathLike, argument: str = "encoder") -> PreTrainedConfig:
    """
    Checks that features can be learned from an encoder, before its weights are loaded.

    Args:
        encoder (`str` or `os.PathLike`): folder or Hub repository; see [`load_teacher`].
        argument (`str`, *optional*, defaults to `"encoder"`): name of the argument in messages.

    Returns:
        [`~transformers.PreTrainedConfig`] of the tower, or of the Qwen-VL.

    Raises:
        ValueError: if the encoder does not exist, is not supported or encodes videos.
    """
    config = load_tower_config(encoder, argument, _QWEN)
    num_frames = 1 if config.model_type in _QWEN else getattr(config, "tubelet_size", 1)
    if num_frames != 1:
        raise ValueError(
            f"`{argument}` must be a tower for images, got {os.fspath(encoder)!r} of the model type {config.model_type!r}, whose "
            f"tokens cover {num_frames} frames"
        )
    return config


def check_scales(scales: Sequence[int]) -> None:
    """Raises a ValueError if `scales` are not ascending positive whole numbers."""
    numbers = list(scales)
    if not numbers or any(not isinstance(n, int) or n < 1 for n in numbers) or numbers != sorted(set(numbers)):
        raise ValueError(
            f"`scales` must be rows of patches of each scale, whole numbers from coarse to fine such as 2 4 7 14, got "
            f"{numbers}"
        )
