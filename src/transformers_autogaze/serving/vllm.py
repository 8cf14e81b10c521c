"""
The plug-in for vLLM: Qwen2.5-VL and Qwen3-VL whose towers see the gazed merge units of videos only.

vLLM calls [`register`] in each of its processes. This module imports nothing of vLLM before.
"""

_MODELS = {
    "Qwen2_5_VLForConditionalGeneration": "vllm_models",
    "Qwen3VLForConditionalGeneration": "vllm_models",
    "LlavaOnevisionForConditionalGeneration": "vllm_llava",
}


def register() -> None:
    """
    Puts the models that can gaze in the places of vLLM's own; called by vLLM, any number of times.

    They are vLLM's own until a request, or the engine's `mm_processor_kwargs`, says how much to keep of videos: then a
    selector gazes at the frames in vLLM's processor, and the tower and the language model get the kept merge units alone.
    Other models refuse such a request. LLaVA-OneVision takes embeddings of gazed videos, see [`embed_for_vllm`].
    """
    from vllm import ModelRegistry

    from .vllm_guard import refuse_elsewhere

    for name, module in _MODELS.items():
        ModelRegistry.register_model(name, f"transformers_autogaze.serving.{module}:Gaze{name}")
    refuse_elsewhere()
