"""
MLLMs with a selector, as models of lmms-eval.

Each derives from lmms-eval's own model of that MLLM, which loads it, samples frames, formats prompts and decodes answers. The
subclass adds the selector before the vision tower, and the measurements of every answer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any, cast

from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.models.chat.qwen3_vl import Qwen3_VL
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.simple.llava_hf import LlavaHf
from torch import nn
from transformers import PreTrainedModel

from ..hub.checkpoints import load_selector
from ..integrations.mllm import GazeVideoLM
from ..integrations.qwen_vl import GazeQwenVL
from ..selection_autogaze import GazeSelector
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .measuring import AnswerCosts, MeasuredMLLM
from .settings import NO_SELECTOR, read_settings


class GazedModel(lmms):
    """
    Mixin with what the models have in common; it precedes lmms-eval's own model in the base classes.

    Args:
        selector (`str`, *optional*, defaults to `"features"`):
            The selector: one of this package (`features`, `finest`, `greedy`), the published `autogaze`, a folder or a
            repository of the Hub; or `none`, with which videos are not pruned but tokens and seconds are measured.
        gazing_ratio, task_loss_requirement, clip_ratio (`float`, *optional*):
            Budgets and threshold, as in [`~GazeQwenVL.gaze`] or [`~GazeVideoLM.gaze`]; those of the selector's
            configuration by default.
        batch_size (`int`, *optional*, defaults to 1): must be 1, as times are measured per answer.
        kwargs: arguments of lmms-eval's own model, such as `pretrained` and those of frames and pixels.

    Raises:
        ValueError: if a setting is out of range, the selector does not exist, or settings are given with `none`.
    """

    base_name: str
    """Name of lmms-eval's own model of this MLLM, by which some tasks specify prompts."""
    base_logs_totals: bool = True
    """Whether lmms-eval's own model logs the total seconds and tokens of all answers."""

    def __init__(
        self,
        selector: str = "features",
        gazing_ratio: float | None = None,
        task_loss_requirement: float | None = None,
        clip_ratio: float | None = None,
        batch_size: int | str = 1,
        **kwargs: Any,
    ):
        settings = read_settings(
            selector,
            batch_size,
            gazing_ratio=gazing_ratio,
            task_loss_requirement=task_loss_requirement,
            clip_ratio=clip_ratio,
        )
        # Before the MLLM, which takes longer to load.
        loaded = None if selector == NO_SELECTOR else load_selector(selector, argument="selector")
        super().__init__(batch_size=batch_size, **kwargs)
        gazed = None
        if loaded is not None:
            gaze_model, gaze_processor = loaded
            cast(nn.Module, gaze_model).to(self.model.device)  # every selector that loads is a module
            gazed = self._wrap(self.model, gaze_model, gaze_processor.video_processor)
        self._measured = MeasuredMLLM(self.model, gazed, settings)

    def _wrap(
        self, mllm: PreTrainedModel, gaze_model: GazeSelector, gaze_processor: AutoGazeVideoProcessor
    ) -> GazeQwenVL | GazeVideoLM:
        return GazeQwenVL(mllm, gaze_model, self.processor, gaze_processor).eval()

    @property
    def model(self) -> Any:
        """The MLLM that lmms-eval's own model calls: the measured one, as soon as it is loaded."""
        measured = self.__dict__.get("_measured")
        return super().model if measured is None else measured

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        Answers requests as lmms-eval's own model does.

        Args:
            requests (`list[Instance]`): the requests of lmms-eval's tasks.

        Returns:
            `list[GenerationResult]`, in the order of the requests, each with its [`AnswerCosts`].
        """
        _use_prompts_of(self.base_name, requests)
        costs: dict[int, AnswerCosts] = {}
        results = super().generate_until([self._track(request, i, costs) for i, request in enumerate(requests)])
        self._begin_request(None, costs)
        if costs:
            _log_means(list(costs.values()), self.base_logs_totals)
        texts = [unwrap_generation_output(result)[0] for result in results]
        return [GenerationResult(text, costs.get(i)) for i, text in enumerate(texts)]

    def _track(self, request: Instance, index: int, costs: dict[int, AnswerCosts]) -> Instance:
        """
        Returns a copy of a request that calls `_begin_request` when lmms-eval's model comes to it.

        That model answers requests in another order. It begins each by a call of the function that returns the messages or
        visuals, one of the request's arguments.
        """

        def tracked(function: Callable, *args: Any, **kwargs: Any) -> Any:
            self._begin_request(index, costs)
            return function(*args, **kwargs)

        arguments = (partial(tracked, part) if callable(part) else part for part in request.arguments)
        return replace(request, arguments=tuple(arguments))

    def _begin_request(self, index: int | None, costs: dict[int, AnswerCosts]) -> None:
        """Stores the costs of the previous request, or raises its error; `None` ends the last request."""
        measured, previous = self._measured, self.__dict__.get("_request_index")
        if measured.error is not None:
            raise measured.error
        if previous is not None and measured.costs is not None:
            costs[previous] = measured.costs
        self._request_index, measured.costs = index, None


class GazeQwen2_5_VL(GazedModel, Qwen2_5_VL):
    """`gaze_qwen2_5_vl`: lmms-eval's `qwen2_5_vl` with a selector; see [`GazedModel`] for its arguments."""

    base_name = "qwen2_5_vl"


class GazeQwen3_VL(GazedModel, Qwen3_VL):
    """`gaze_qwen3_vl`: lmms-eval's `qwen3_vl` with a selector; see [`GazedModel`] for its arguments."""

    base_name = "qwen3_vl"


class GazeLlavaOnevision(GazedModel, LlavaHf):
    """`gaze_llava_onevision`: lmms-eval's `llava_hf` (simple) with a selector; see [`GazedModel`] for its arguments."""

    base_name = "llava_hf"
    base_logs_totals = False

    def _wrap(
        self, mllm: PreTrainedModel, gaze_model: GazeSelector, gaze_processor: AutoGazeVideoProcessor
    ) -> GazeQwenVL | GazeVideoLM:
        return GazeVideoLM(mllm, gaze_model, self._image_processor, gaze_processor).eval()


def _use_prompts_of(base_name: str, requests: list[Instance]) -> None:
    """Makes tasks that specify prompts for lmms-eval's own model use them here too, so that the questions are the same."""
    for request in requests:
        for part in request.arguments:
            task = getattr(part, "__self__", None)
            prompts = getattr(task, "lmms_eval_specific_kwargs", None) or {}
            if base_name in prompts:
                task.lmms_eval_specific_kwargs = prompts[base_name]


def _log_means(costs: list[AnswerCosts], are_totals_logged: bool) -> None:
    """Logs means over samples to `throughput` of lmms-eval's results, and the totals unless they are logged already."""
    names = [name for name in costs[0].to_dict() if name.endswith(("input_tokens", "seconds"))]
    means = {name: mean(getattr(cost, name) for cost in costs) for name in names}
    seconds = sum(cost.choosing_seconds + cost.encoding_seconds + cost.answering_seconds for cost in costs)
    tokens = sum(cost.output_tokens for cost in costs)
    if are_totals_logged:  # lmms-eval adds up all logged totals
        seconds, tokens = 0.0, 0
    speed = tokens / seconds if seconds else 0.0
    log_metrics(total_elapsed_time=seconds, total_gen_tokens=tokens, avg_speed=speed, additional_metrics=means)
