"""
Where each MLLM of the LLaVA family keeps what a video goes through, and what it does with it.

One small class per MLLM; a new one is one more, see docs/integrations.md. An adapter only looks into an MLLM: it owns no
weights and changes nothing. It knows nothing of gazes or prompts.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel


class MLLMAdapter:
    """
    Finds the parts of an MLLM; the base of all adapters, made for the layout of LLaVA-NeXT-Video.

    Args:
        mllm ([`~transformers.PreTrainedModel`]): the MLLM with its language modelling head.
    """

    model_type = "llava_next_video"
    """`model_type` of the MLLM's configuration."""
    pools_features = True
    """Whether it pools what goes into the projector, if it pools, or what comes out."""

    def __init__(self, mllm: PreTrainedModel):
        self.mllm = mllm
        self.config = mllm.config

    @property
    def tower(self) -> nn.Module:
        """The vision tower that the frames of a video go through."""
        return self.mllm.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """What brings a patch's features `(.., features)` to the language model's `(.., hidden_size)`."""
        return self.mllm.model.multi_modal_projector

    @property
    def placeholder_id(self) -> int:
        """The token that stands for a video in a prompt."""
        return self.config.video_token_id

    @property
    def has_picture_token(self) -> bool:
        """Whether pictures have another token in a prompt than videos."""
        return self.placeholder_id != self.config.image_token_id

    @property
    def feature_layers(self) -> list[int]:
        """The layers of the tower whose states a patch's features are, side by side."""
        layers = self.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def keeps_cls(self) -> bool:
        """Whether the CLS token of a frame, if the tower has one, goes to the language model."""
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
        """Gives the rows and columns of tokens that the MLLM itself makes of a frame of `rows` and `cols` patches."""
        stride = self.config.spatial_pool_stride
        return rows // stride, cols // stride

    def pooling_weights(self) -> torch.Tensor | None:
        """Gives how much of each patch is in each of these tokens, `(tokens, patches)`; `None` if it is no such mean."""
        if self.config.spatial_pool_mode != "average":
            return None
        return self._read_weights(self.mllm.model.vision_resampler)

    def _read_weights(self, pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Reads the weights off what pooling, of features `(frames, patches, channels)`, makes of one patch a channel."""
        vision = self.config.vision_config
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
        return self._read_weights(self.mllm.model.apply_pooling)


class VideoLlavaAdapter(MLLMAdapter):
    model_type = "video_llava"
    keeps_cls = True  # of videos; the configuration speaks of pictures

    def pool_grid(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols

    def pooling_weights(self) -> None:
        return None

    @property
    def tower(self) -> nn.Module:
        return self.mllm.model.video_tower


class VipLlavaAdapter(LlavaAdapter):
    model_type = "vipllava"
    keeps_cls = False

    @property
    def feature_layers(self) -> list[int]:
        # Older versions of transformers know it in the plural alone.
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
    Gives the adapter of an MLLM.

    Raises:
        ValueError: if there is none, or the model has no language modelling head.
    """
    model_type = getattr(getattr(mllm, "config", None), "model_type", None)
    if model_type not in ADAPTERS or not hasattr(mllm, "lm_head"):
        raise ValueError(
            f"`mllm` must be a ..ForConditionalGeneration of {', '.join(ADAPTERS)}, got {type(mllm).__name__}; "
            "GazeQwenVL takes Qwen2.5-VL and Qwen3-VL, and docs/integrations.md says how to add an MLLM"
        )
    return ADAPTERS[model_type](mllm)
