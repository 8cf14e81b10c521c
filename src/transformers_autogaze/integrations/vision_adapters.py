"""
Adapters of the families of vision towers: how to find patch embedding, positions, prefix tokens, layers and final norm.

There is one small class per family; docs/integrations.md describes how to add one. An adapter reads from a tower, owns no
weights and changes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import pi
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import augment_patches_center_coordinates

from ..grid_autogaze import GazeGrid


class VisionAdapter:
    """
    Finds the modules of a tower. This base class of all adapters is for the modules of `ViTModel`.

    Args:
        tower (`nn.Module`): the innermost module with embeddings, layers and final norm.
    """

    model_type: str
    """`model_type` of the tower's configuration."""
    num_positions_prefix = 1
    """Number of prefix tokens with positions, which are the first in the position table."""

    def __init__(self, tower: nn.Module):
        self.tower: Any = tower  # `Any`, as the submodules are those of its own class

    @property
    def config(self) -> PreTrainedConfig:
        """The tower's own configuration."""
        return self.tower.config

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Size in pixels of the tower's images."""
        return self.config.image_size

    @property
    def tubelet_size(self) -> int:
        """Number of frames of one token."""
        return getattr(self.config, "tubelet_size", 1)

    @property
    def num_frames(self) -> int | None:
        """Number of frames of a clip, for a tower with positions for a fixed number of frames."""
        return None

    @property
    def embeddings(self) -> Any:
        """The `nn.Module` with patch embedding, positions and prefix tokens."""
        return self.tower.embeddings

    @property
    def patch_embedding(self) -> nn.Module:
        """The convolution that embeds a patch."""
        return self.embeddings.patch_embeddings.projection

    @property
    def patch_convolution(self) -> nn.Conv2d | nn.Conv3d:
        """The convolution without the adapters of PEFT around it."""
        module: Any = self.patch_embedding
        while hasattr(module, "base_layer"):
            module = module.base_layer
        return module

    @property
    def position_table(self) -> torch.Tensor | None:
        """Learned positions `(prefix + rows * columns, hidden)`, prefix first; `None` for rotary positions."""
        return self.embeddings.position_embeddings[0]

    @property
    def prefix_tokens(self) -> list[torch.Tensor]:
        """Tokens that precede the patches of a frame, each of shape `(.., hidden)`, in order."""
        return [self.embeddings.cls_token]

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the encoder."""
        # In newer versions of transformers these are attributes of the model itself.
        return self.tower.layers if hasattr(self.tower, "layers") else self.tower.encoder.layer

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last layer whose output is `last_hidden_state`, if there is one."""
        return self.tower.layernorm

    @property
    def native_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the tower's images."""
        size = self.image_size if isinstance(self.image_size, (tuple, list)) else (self.image_size,) * 2
        patch = self.patch_convolution.kernel_size
        return size[0] // patch[-2], size[1] // patch[-1]

    def positions(self, grid: GazeGrid) -> torch.Tensor | None:
        """
        Resizes the learned positions to every scale, bicubically (docs/specification.md, section 10).

        Args:
            grid (`GazeGrid`): the scales.

        Returns:
            `torch.FloatTensor` of shape `(times, patches, hidden)`, patches by id, with one time for a tower of images;
            `None` for rotary positions.
        """
        if self.position_table is None:
            return None
        table = self.position_table[self.num_positions_prefix :]
        rows, cols = self.native_grid
        table = table.view(-1, rows, cols, table.shape[-1]).permute(0, 3, 1, 2)
        # Interpolation in half precision would be inexact.
        float_table = table.to(torch.promote_types(table.dtype, torch.float32))
        resized = [
            table if size == (rows, cols) else F.interpolate(float_table, size, mode="bicubic", align_corners=False)
            for size in grid.grids
        ]
        return torch.cat([positions.flatten(2).to(table.dtype) for positions in resized], dim=2).transpose(1, 2)

    def prefix(self) -> torch.Tensor | None:
        """Returns the prefix tokens of a frame with their positions, `(prefix, hidden)`, or `None` if there are none."""
        if not self.prefix_tokens:
            return None
        tokens = torch.cat([token.reshape(-1, token.shape[-1]) for token in self.prefix_tokens])
        if self.position_table is None or not self.num_positions_prefix:
            return tokens
        with_positions = tokens[: self.num_positions_prefix] + self.position_table[: self.num_positions_prefix]
        return torch.cat([with_positions, tokens[self.num_positions_prefix :]])

    def finish_embedding(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the operations between positions and the first layer, such as dropout, to `(1, tokens, hidden)`."""
        return self.embeddings.dropout(hidden_states)

    def rotary(self, grid: GazeGrid, ids: torch.Tensor, time: torch.Tensor, dtype: torch.dtype) -> Any:
        """
        Computes the rotary positions for the layers.

        Args:
            grid (`GazeGrid`): the scales.
            ids (`torch.LongTensor` of shape `(tokens,)`): patch ids, counted from the first of the frame, -1 for prefix tokens.
            time (`torch.LongTensor` of shape `(tokens,)`): frame or tubelet of each token.
            dtype (`torch.dtype`): dtype of the hidden states.

        Returns:
            The argument `rotary` of [`~VisionAdapter.run_layer`]; `None` without rotary positions.
        """
        return None

    def run_layer(self, layer: nn.Module, hidden_states: torch.Tensor, rotary: Any) -> torch.Tensor:
        """Runs one layer on `(1, tokens, hidden)`."""
        return layer(hidden_states)


class ViTAdapter(VisionAdapter):
    """`ViTModel` and models with it: a CLS token, learned positions."""

    model_type = "vit"


class DeiTAdapter(VisionAdapter):
    """`DeiTModel`: a CLS and a distillation token, learned positions."""

    model_type = "deit"
    num_positions_prefix = 2

    @property
    def prefix_tokens(self) -> list[torch.Tensor]:
        return [self.embeddings.cls_token, self.embeddings.distillation_token]


class Dinov2Adapter(VisionAdapter):
    """`Dinov2Model`: a CLS token, learned positions."""

    model_type = "dinov2"


class Dinov2WithRegistersAdapter(VisionAdapter):
    """`Dinov2WithRegistersModel`: a CLS token, then registers without a position."""

    model_type = "dinov2_with_registers"

    @property
    def prefix_tokens(self) -> list[torch.Tensor]:
        return [self.embeddings.cls_token, self.embeddings.register_tokens]


class SiglipAdapter(VisionAdapter):
    """`SiglipVisionModel`, also of SigLIP 2 with fixed resolution: no prefix, learned positions."""

    model_type = "siglip_vision_model"
    num_positions_prefix = 0

    @property
    def prefix_tokens(self) -> list[torch.Tensor]:
        return []

    @property
    def patch_embedding(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @property
    def position_table(self) -> torch.Tensor:
        embedding = self.embeddings.position_embedding
        if type(embedding) is nn.Embedding:
            return embedding.weight
        # An adapter of PEFT adds to the weights only when it is called.
        return embedding(torch.arange(len(embedding.weight), device=embedding.weight.device))

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.encoder.layers

    @property
    def final_norm(self) -> nn.Module | None:
        return self.tower.post_layernorm

    def finish_embedding(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def run_layer(self, layer: nn.Module, hidden_states: torch.Tensor, rotary: Any) -> torch.Tensor:
        return layer(hidden_states, None)


class CLIPAdapter(SiglipAdapter):
    """`CLIPVisionModel`: a CLS token, learned positions, a norm before the layers and none after them."""

    model_type = "clip_vision_model"
    num_positions_prefix = 1
    final_norm = None

    @property
    def prefix_tokens(self) -> list[torch.Tensor]:
        return [self.embeddings.class_embedding]

    def finish_embedding(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.tower.pre_layrnorm(hidden_states)


class DINOv3ViTAdapter(VisionAdapter):
    """`DINOv3ViTModel`: a CLS token and registers, rotary positions of the centres of patches in -1..1."""

    model_type = "dinov3_vit"
    position_table = None

    @property
    def patch_embedding(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @property
    def prefix_tokens(self) -> list[torch.Tensor]:
        return [self.embeddings.cls_token, self.embeddings.register_tokens]

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.layer if hasattr(self.tower, "layer") else self.tower.model.layer

    @property
    def final_norm(self) -> nn.Module:
        return self.tower.norm

    def finish_embedding(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def rotary(
        self, grid: GazeGrid, ids: torch.Tensor, time: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale, row, col = grid.locate(ids.clamp(min=0))
        place = (torch.stack([row, col], dim=1).float() + 0.5) / torch.tensor(grid.grids, device=ids.device)[scale]
        centres = 2.0 * place - 1.0
        if self.tower.training:
            config = self.config
            centres = augment_patches_center_coordinates(
                centres, config.pos_embed_shift, config.pos_embed_jitter, config.pos_embed_rescale
            )
        frequencies = self.tower.rope_embeddings.inv_freq.to(ids.device)
        angles = (2 * pi * centres[:, :, None] * frequencies).flatten(1).tile(2)
        # Prefix tokens are not rotated.
        angles = angles.masked_fill((ids < 0)[:, None], 0)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def run_layer(self, layer: nn.Module, hidden_states: torch.Tensor, rotary: Any) -> torch.Tensor:
        return layer(hidden_states, position_embeddings=rotary)


class VideoMAEAdapter(VisionAdapter):
    """`VideoMAEModel`: tubelets without prefix, sin-cos positions over time and space."""

    model_type = "videomae"
    num_positions_prefix = 0
    prefix_tokens = []

    @property
    def num_frames(self) -> int:
        return self.config.num_frames

    def finish_embedding(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class VJEPA2Adapter(VisionAdapter):
    """The encoder of `VJEPA2Model`: tubelets without prefix, rotary positions over time, rows and columns."""

    model_type = "vjepa2"
    prefix_tokens = []
    position_table = None

    @property
    def image_size(self) -> int:
        return self.config.crop_size

    @property
    def patch_embedding(self) -> nn.Module:
        return self.embeddings.patch_embeddings.proj

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.layer

    def finish_embedding(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def rotary(self, grid: GazeGrid, ids: torch.Tensor, time: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        scale, row, col = grid.locate(ids)
        grids = torch.tensor(grid.grids, device=ids.device)[scale]
        # Centres of patches in units of the tower's own grid, whose patches have whole numbers.
        rows, cols = self.native_grid
        row = (row + 0.5) * (rows / grids[:, 0]) - 0.5
        col = (col + 0.5) * (cols / grids[:, 1]) - 0.5
        return [place.to(dtype) for place in (time, row, col)]

    def run_layer(self, layer: Any, hidden_states: torch.Tensor, rotary: Any) -> torch.Tensor:
        with _position_ids(layer.attention, rotary):
            return layer(hidden_states)[0]


@contextmanager
def _position_ids(attention: Any, position_ids: list[torch.Tensor]) -> Iterator[None]:
    """Sets the position ids of V-JEPA 2's attention, which has no argument for ids that are no whole numbers."""
    attention.get_position_ids = lambda x, masks=None: [ids.to(x.device) for ids in position_ids]
    try:
        yield
    finally:
        del attention.get_position_ids


ADAPTERS: dict[str, type[VisionAdapter]] = {
    adapter.model_type: adapter
    for adapter in (
        SiglipAdapter,
        CLIPAdapter,
        ViTAdapter,
        DeiTAdapter,
        Dinov2Adapter,
        Dinov2WithRegistersAdapter,
        DINOv3ViTAdapter,
        VideoMAEAdapter,
        VJEPA2Adapter,
    )
}
"""The adapters by `config.model_type`."""


def find_tower(model: nn.Module) -> str:
    """
    Finds the tower inside a model: the innermost module with the embeddings of a supported family.

    Args:
        model (`nn.Module`): a vision model, one with a head, or one that contains a vision tower beside other parts.

    Returns:
        `str`: the name of the module, for `model.get_submodule`.

    Raises:
        ValueError: if no module is of a supported family.
    """
    for name, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        # A `PeftModel` returns the attributes of the model inside, so only its own children count.
        if model_type in ADAPTERS and "embeddings" in dict(module.named_children()):
            return name
    config = getattr(model, "config", None)
    raise ValueError(
        f"`vision_model` must be of one of the families {', '.join(ADAPTERS)}, got {type(model).__name__} "
        f"({getattr(config, 'model_type', 'without a configuration')}); docs/integrations.md describes how to add one"
    )
