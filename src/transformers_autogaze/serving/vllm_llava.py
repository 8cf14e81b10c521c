"""vLLM's LLaVA-OneVision, with batches of embeddings of different numbers of tokens."""

from typing import Any

from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration


class GazeLlavaOnevisionForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision, whose base class fails on a batch of embeddings of different numbers of tokens."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if kwargs.keys() == {"image_embeds"}:
            return tuple(kwargs["image_embeds"])
        return super().embed_multimodal(**kwargs)
