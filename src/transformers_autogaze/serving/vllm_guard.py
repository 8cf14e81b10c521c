"""Makes vLLM's other models refuse the arguments of gazing, which they would silently ignore."""

from functools import wraps
from typing import Any

from vllm.multimodal.processing import BaseMultiModalProcessor

from .settings import GAZE_ARGUMENTS


def refuse_elsewhere() -> None:
    """Patches vLLM's base processor so that processors without `can_gaze` refuse the arguments of gazing; once per process."""
    processor: Any = BaseMultiModalProcessor
    apply = processor.apply
    if hasattr(apply, "refuses_gaze"):
        return

    @wraps(apply)
    def checked(self: BaseMultiModalProcessor, inputs: Any, timing_ctx: Any) -> Any:
        if not getattr(self, "can_gaze", False):
            context = self.info.ctx
            given = {**(context.get_mm_config().mm_processor_kwargs or {}), **inputs.hf_processor_mm_kwargs}
            names = [f"`{name}`" for name in GAZE_ARGUMENTS if given.get(name) is not None]
            if names:
                raise ValueError(
                    f"{', '.join(names)} must not be given to {', '.join(context.model_config.architectures)}; gazing is "
                    "for Qwen2.5-VL and Qwen3-VL"
                )
        return apply(self, inputs, timing_ctx)

    processor.apply = checked
    processor.apply.refuses_gaze = True
