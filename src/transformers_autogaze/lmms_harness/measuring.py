"""
Measures each answer: the tokens that the language model reads, and the seconds of selector, vision tower and language model.

lmms-eval's models prepare inputs and call `generate` of a [`MeasuredMLLM`], which calls the MLLM.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lmms_eval.api.instance import TokenCounts
from torch import nn
from transformers import PreTrainedModel

from ..integrations.mllm import GazeVideoLM
from ..integrations.qwen_vl import GazeQwenVL


@dataclass
class AnswerCosts(TokenCounts):
    """
    Tokens and seconds of one answer, which lmms-eval logs as the `token_counts` of a sample.

    Args:
        input_tokens (`int`): tokens of the prompt that the language model read.
        output_tokens (`int`): tokens of the answer.
        whole_input_tokens (`int`): tokens of the prompt without pruning.
        choosing_seconds (`float`): seconds of the selector; 0 without one.
        encoding_seconds (`float`): seconds of the vision tower, up to the start of the language model.
        answering_seconds (`float`): seconds of the language model, up to the end of the answer.
    """

    whole_input_tokens: int | None = None
    choosing_seconds: float | None = None
    encoding_seconds: float | None = None
    answering_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the values that are not `None`, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class MeasuredMLLM:
    """
    Wraps an MLLM and measures every call of `generate`, for one prompt at a time.

    All other attributes are those of the MLLM.

    Args:
        mllm ([`~transformers.PreTrainedModel`]): the MLLM.
        gazed ([`GazeQwenVL`] or [`GazeVideoLM`], *optional*): its wrapper with a selector. Without it videos are not pruned.
        settings (`dict[str, Any]`, *optional*): budgets and thresholds, as arguments of the wrapper's `gaze`.
    """

    def __init__(
        self,
        mllm: PreTrainedModel,
        gazed: GazeQwenVL | GazeVideoLM | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.mllm: Any = mllm
        self.gazed, self.settings = gazed, settings or {}
        self.costs: AnswerCosts | None = None
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "mllm":  # `copy.copy` asks for attributes before any is set
            raise AttributeError(name)
        return getattr(self.mllm, name)

    def generate(self, **inputs: Any) -> torch.Tensor:
        """
        Answers a prompt, and sets `costs`.

        Args:
            inputs: the outputs of the MLLM's processor, and arguments of its `generate`.

        Returns:
            `torch.LongTensor` of shape `(1, length)`: the prompt without pruning, then the answer.

        Raises:
            ValueError: as the wrapper. Also stored in `error`: some models of lmms-eval catch it and log an empty answer.
        """
        watch = _Stopwatch(self.mllm.device)
        handle = self.mllm.model.language_model.register_forward_pre_hook(watch.on_language_model, with_kwargs=True)
        try:
            output = self._generate(watch, inputs)
        except Exception as error:
            self.error = error
            raise
        finally:
            handle.remove()
        length = inputs["input_ids"].shape[1]
        self.costs = AnswerCosts(
            input_tokens=watch.prompt_tokens,
            output_tokens=output.shape[1] - length,
            whole_input_tokens=length,
            choosing_seconds=watch.chosen - watch.started,
            encoding_seconds=watch.encoded - watch.chosen,
            answering_seconds=synchronized_time(self.mllm.device) - watch.encoded,
        )
        return output

    def _generate(self, watch: "_Stopwatch", inputs: dict[str, Any]) -> torch.Tensor:
        if self.gazed is None or inputs.get("pixel_values_videos") is None:
            return self.mllm.generate(**inputs)
        grids = [inputs["video_grid_thw"]] if "video_grid_thw" in inputs else []
        gaze = self.gazed.gaze(inputs["pixel_values_videos"], *grids, **self.settings)
        watch.chosen = synchronized_time(watch.device)
        return self.gazed.generate(**inputs, gaze=gaze)


def synchronized_time(device: torch.device) -> float:
    """Returns the time in seconds after all work on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Stopwatch:
    """Records when selector, vision tower and language model start, and how many tokens the latter reads first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.started = self.chosen = self.encoded = synchronized_time(device)
        self.prompt_tokens: int | None = None

    def on_language_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the language model, whose first call reads the prompt."""
        if self.prompt_tokens is None:
            self.encoded, self.prompt_tokens = synchronized_time(self.device), kwargs["inputs_embeds"].shape[1]
