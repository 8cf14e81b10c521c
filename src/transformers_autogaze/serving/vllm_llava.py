"""vLLM's LLaVA-OneVision with embeddings of any number of tokens beside each other in a batch."""

from typing import Any

from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration


class GazeLlavaOnevisionForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision; its own takes embeddings in a batch only where all have as many tokens, and dies of others."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if kwargs.keys() == {"image_embeds"}:
            return tuple(kwargs["image_embeds"])
        return super().embed_multimodal(**kwargs)
