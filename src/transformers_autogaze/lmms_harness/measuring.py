"""
What an answer costs: tokens that the language model reads, and seconds of choosing, of encoding and of answering.

This module stands between lmms-eval's models, which prepare inputs and ask, and the MLLM, which answers.
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
    What one answer took, logged by lmms-eval as the `token_counts` of a sample.

    Args:
        input_tokens (`int`): tokens that the language model read before it answered.
        output_tokens (`int`): tokens of the answer.
        whole_input_tokens (`int`): tokens of the prompt with everything of its videos.
        choosing_seconds (`float`): seconds of the selector; 0 without one.
        encoding_seconds (`float`): seconds from there until the language model begins to read: the vision tower.
        answering_seconds (`float`): seconds from there until the answer is whole: the language model.
    """

    whole_input_tokens: int | None = None
    choosing_seconds: float | None = None
    encoding_seconds: float | None = None
    answering_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Gives what is known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class MeasuredMLLM:
    """
    Stands in for an MLLM: answers as it does, or as its gazed wrapper, and says what that took.

    Prompts are answered one at a time. All that is not `generate` is the MLLM's own.

    Args:
        mllm ([`~transformers.PreTrainedModel`]): the MLLM.
        gazed ([`GazeQwenVL`] or [`GazeVideoLM`], *optional*): its wrapper. Without it videos are read whole.
        settings (`dict[str, float]`, *optional*): how much the selector keeps, as arguments of the wrapper's `gaze`.
    """

    def __init__(
        self,
        mllm: PreTrainedModel,
        gazed: GazeQwenVL | GazeVideoLM | None = None,
        settings: dict[str, float] | None = None,
    ):
        self.mllm, self.gazed, self.settings = mllm, gazed, settings or {}
        self.costs: AnswerCosts | None = None
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "mllm":  # while a copy is made, before it has attributes
            raise AttributeError(name)
        return getattr(self.mllm, name)

    def generate(self, **inputs: Any) -> torch.Tensor:
        """
        Answers a prompt, and leaves what it took in `costs`.

        Args:
            inputs: what the MLLM's processor gives, and options of its `generate`.

        Returns:
            `torch.LongTensor` of shape `(1, length)`: the prompt as it was given, then the answer.

        Raises:
            ValueError: as the wrapper; the error stays in `error`, as lmms-eval takes one for an empty answer.
        """
        watch = _Watch(self.mllm.device)
        handle = self.mllm.model.language_model.register_forward_pre_hook(watch.see_prompt, with_kwargs=True)
        try:
            output = self._answer(watch, inputs)
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
            choosing_seconds=watch.chosen - watch.begun,
            encoding_seconds=watch.encoded - watch.chosen,
            answering_seconds=watch.now() - watch.encoded,
        )
        return output

    def _answer(self, watch: "_Watch", inputs: dict[str, Any]) -> torch.Tensor:
        if self.gazed is None or inputs.get("pixel_values_videos") is None:
            return self.mllm.generate(**inputs)
        grids = [inputs["video_grid_thw"]] if "video_grid_thw" in inputs else []
        gaze = self.gazed.gaze(inputs["pixel_values_videos"], *grids, **self.settings)
        watch.chosen = watch.now()
        return self.gazed.generate(**inputs, gaze=gaze)


class _Watch:
    """Notes when the selector, the tower and the language model begin, and how much the latter reads at first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.begun = self.chosen = self.now()
        self.encoded: float = self.begun
        self.prompt_tokens: int | None = None

    def now(self) -> float:
        """Waits for the device, and gives the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def see_prompt(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Is called before every call of the language model; the first one reads the prompt."""
        if self.prompt_tokens is None:
            self.encoded, self.prompt_tokens = self.now(), kwargs["inputs_embeds"].shape[1]
