"""
Adapters of the MLLMs of the LLaVA family: how to find the modules and settings that a video needs.

There is one small class per MLLM; docs/integrations.md describes how to add one. An adapter reads from an MLLM, owns no
weights and changes nothing.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel


class MLLMAdapter:
    """
    Finds the modules and settings of an MLLM. This base class of all adapters is the one of LLaVA-NeXT-Video.

    Args:
        mllm ([`~transformers.PreTrainedModel`]): the MLLM with its language modelling head.
    """

    model_type = "llava_next_video"
    """`model_type` of the MLLM's configuration."""
    pools_features = True
    """Whether pooling, if any, comes before the projector, or after it."""

    def __init__(self, mllm: PreTrainedModel):
        self.mllm = mllm
        self.config = mllm.config

    @property
    def tower(self) -> PreTrainedModel:
        """The vision tower for the frames of a video."""
        return self.mllm.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """The projector from patch features `(.., features)` to `(.., hidden_size)` of the language model."""
        return self.mllm.model.multi_modal_projector

    @property
    def placeholder_id(self) -> int:
        """The token of the placeholder of a video."""
        return self.config.video_token_id

    @property
    def has_image_token(self) -> bool:
        """Whether images and videos have different placeholders."""
        return self.placeholder_id != self.config.image_token_id

    @property
    def feature_layers(self) -> list[int]:
        """The layers of the tower whose hidden states are concatenated to a patch's features."""
        layers = self.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def keeps_cls(self) -> bool:
        """Whether the language model reads the CLS token of a frame, if the tower has one."""
        return self.config.vision_feature_select_strategy == "full"

    @property
    def newline(self) -> torch.Tensor | None:
        """The MLLM's own embedding of a new line, `(hidden_size,)`, if it has one."""
        newline = getattr(self.mllm.model, "image_newline", None)
        if newline is None or newline.device.type != "meta":
            return newline
        from accelerate.utils import align_module_device

        with align_module_device(self.mllm.model):
            return self.mllm.model.image_newline.clone()

    @property
    def ends_with_newline(self) -> bool:
        """Whether a new line follows every video."""
        return False

    def pool_grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Returns the rows and columns of tokens to which the MLLM pools a frame of `rows` and `cols` patches."""
        stride = self.config.spatial_pool_stride
        return rows // stride, cols // stride

    def pooling_weights(self) -> torch.Tensor | None:
        """Returns the weights of patches in pooled tokens, `(tokens, patches)`; `None` if pooling is not a weighted mean."""
        if self.config.spatial_pool_mode != "average":
            return None
        return self._compute_weights(self.mllm.model.vision_resampler)

    def _compute_weights(self, pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Computes the weights of a pooling of features `(frames, patches, channels)`."""
        vision = self.config.vision_config
        # Channel `i` is one at patch `i` and zero elsewhere.
        with torch.no_grad():
            return pool(torch.eye((vision.image_size // vision.patch_size) ** 2)[None])[0]


class LlavaAdapter(MLLMAdapter):
    model_type = "llava"

    def pool_grid(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols

    def pooling_weights(self) -> None:
        return None

    @property
    def placeholder_id(self) -> int:
        return self.config.image_token_id


class LlavaOnevisionAdapter(MLLMAdapter):
    model_type = "llava_onevision"
    ends_with_newline = True
    pools_features = False

    def pool_grid(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // 2), -(-cols // 2)

    def pooling_weights(self) -> torch.Tensor:
        return self._compute_weights(self.mllm.model.apply_pooling)


class VideoLlavaAdapter(MLLMAdapter):
    model_type = "video_llava"
    keeps_cls = True  # of videos; the configuration's setting is for images

    def pool_grid(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols

    def pooling_weights(self) -> None:
        return None

    @property
    def tower(self) -> PreTrainedModel:
        return self.mllm.model.video_tower


class VipLlavaAdapter(LlavaAdapter):
    model_type = "vipllava"
    keeps_cls = False

    @property
    def feature_layers(self) -> list[int]:
        # Older versions of transformers have only the plural.
        layers = getattr(self.config, "vision_feature_layer", None)
        layers = self.config.vision_feature_layers if layers is None else layers
        return [layers] if isinstance(layers, int) else list(layers)


ADAPTERS: dict[str, type[MLLMAdapter]] = {
    adapter.model_type: adapter
    for adapter in (LlavaAdapter, MLLMAdapter, LlavaOnevisionAdapter, VideoLlavaAdapter, VipLlavaAdapter)
}
"""The adapters by `config.model_type`."""


def adapt_mllm(mllm: PreTrainedModel) -> MLLMAdapter:
    """
    Returns the adapter of an MLLM.

    Raises:
        ValueError: if there is none, or the model has no language modelling head.
    """
    model_type = getattr(getattr(mllm, "config", None), "model_type", None)
    if model_type not in ADAPTERS or not hasattr(mllm, "lm_head"):
        raise ValueError(
            f"`mllm` must be a ..ForConditionalGeneration of {', '.join(ADAPTERS)}, got {type(mllm).__name__}; "
            "GazeQwenVL takes Qwen2.5-VL and Qwen3-VL, and docs/integrations.md describes how to add an MLLM"
        )
    return ADAPTERS[model_type](mllm)
