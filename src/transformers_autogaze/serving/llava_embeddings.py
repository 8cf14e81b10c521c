"""
Encodes gazed videos as embeddings for vLLM's LLaVA-OneVision, which accepts any number of tokens for a picture.

Selector, tower and projector run here, the language model in vLLM. This module does not import vLLM.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..gazing_autogaze import GazeOutput
from ..integrations.mllm import GazeVideoLM
from ..integrations.video_tokens import Videos


@dataclass(frozen=True)
class VideoEmbeddings:
    """
    Embeddings of videos in the forms that vLLM takes.

    Args:
        embeddings (`list[torch.FloatTensor]`): inputs of the language model for each video, of shape `(tokens, hidden_size)`.
    """

    embeddings: list[torch.Tensor]

    @property
    def multi_modal_data(self) -> dict[str, list[torch.Tensor]]:
        """The `multi_modal_data` of a request to `LLM.generate`, whose prompt has one `<image>` per video."""
        return {"image": self.embeddings}

    @property
    def content(self) -> list[dict[str, str]]:
        """Parts of a chat message, one per video, for a server that was started with `--enable-mm-embeds`."""
        return [{"type": "image_embeds", "image_embeds": _to_text(part)} for part in self.embeddings]


@torch.no_grad()
def embed_for_vllm(
    model: GazeVideoLM,
    pixel_values_videos: Videos,
    gaze: GazeOutput | Sequence[GazeOutput] | None = None,
    **settings: Any,
) -> VideoEmbeddings:
    """
    Encodes videos as embeddings that vLLM's LLaVA-OneVision takes as pictures.

    vLLM must be started with `enable_mm_embeds` (`--enable-mm-embeds`), and prompts have an `<image>` for each video. Answers
    are then those of `model.generate` for the prompt with `<video>` in its place.

    Args:
        model ([`GazeVideoLM`]): a `LlavaOnevisionForConditionalGeneration` with the weights that vLLM serves.
        pixel_values_videos, gaze: as in [`~GazeVideoLM.prepare_inputs`].
        settings: arguments of [`~GazeVideoLM.gaze`], such as `gazing_ratio`; only if no gaze is given.

    Returns:
        [`VideoEmbeddings`], on the CPU.

    Raises:
        ValueError: if the model is another MLLM, both a gaze and settings are given, or as in [`~GazeVideoLM.gaze`].

    Example:

    ```python
    >>> from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    >>> from transformers_autogaze import AutoGazeVideoProcessor, GreedyGazeSelector
    >>> from transformers_autogaze.integrations import GazeVideoLM
    >>> from transformers_autogaze.serving.llava_embeddings import embed_for_vllm

    >>> tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> vision = {"model_type": "siglip_vision_model", **tiny, "image_size": 32, "patch_size": 8}
    >>> text = {"model_type": "qwen2", **tiny, "num_key_value_heads": 2, "vocab_size": 50}
    >>> config = LlavaOnevisionConfig(vision_config=vision, text_config=text, image_token_index=48, video_token_index=49)
    >>> mllm = LlavaOnevisionForConditionalGeneration(config).eval()
    >>> model = GazeVideoLM(mllm, GreedyGazeSelector(), processor=AutoGazeVideoProcessor())

    >>> video = embed_for_vllm(model, torch.randn(1, 4, 3, 32, 32), gazing_ratio=0.5)
    >>> video.multi_modal_data["image"][0].shape  # two places of each frame, and the new line at the end
    torch.Size([9, 16])
    >>> video.content[0]["type"]
    'image_embeds'

    ```
    """
    kind = model.adapter.model_type
    if kind != "llava_onevision":
        raise ValueError(
            f"`model` must wrap a LLaVA-OneVision, for which vLLM takes embeddings of any number of tokens, got {kind}"
        )
    if gaze is not None and settings:
        raise ValueError(f"`gaze` and settings must not be given together, got also {', '.join(settings)}")
    gaze = model.gaze(pixel_values_videos, **settings) if gaze is None else gaze
    return VideoEmbeddings([part.detach().cpu() for part in model.embed_videos(pixel_values_videos, gaze)])


def _to_text(embeddings: torch.Tensor) -> str:
    """Encodes embeddings as vLLM reads them in a request: a `.npy` file, which has no bfloat16, in base64."""
    file = io.BytesIO()
    np.save(file, embeddings.float().numpy(), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
