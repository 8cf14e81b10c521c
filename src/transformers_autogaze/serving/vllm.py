"""
The plug-in for vLLM: Qwen2.5-VL and Qwen3-VL that encode only the kept merge units of videos.

vLLM calls [`register`] in each of its processes. Importing this module does not import vLLM.
"""

_MODELS = {
    "Qwen2_5_VLForConditionalGeneration": "vllm_models",
    "Qwen3VLForConditionalGeneration": "vllm_models",
    "LlavaOnevisionForConditionalGeneration": "vllm_llava",
}


def register() -> None:
    """
    Registers subclasses of vLLM's models under the models' own names; vLLM may call it any number of times.

    They behave as vLLM's own models unless a request, or the `mm_processor_kwargs` of the engine, says how much to keep of
    videos: then a selector gazes at the frames in vLLM's processor, and the tower and the language model get only the kept merge
    units. Other models refuse such a request. LLaVA-OneVision takes embeddings of gazed videos, see [`embed_for_vllm`].
    """
    from vllm import ModelRegistry

    from .vllm_guard import refuse_elsewhere

    for name, module in _MODELS.items():
        ModelRegistry.register_model(name, f"transformers_autogaze.serving.{module}:Gaze{name}")
    refuse_elsewhere()
