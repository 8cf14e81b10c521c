"""
MLLMs that see gazed videos, as models of lmms-eval.

Each is lmms-eval's own model of that MLLM: it loads it, samples frames, writes prompts and decodes answers. What is added is
the selector before the vision tower, and what every answer took.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.models.chat.qwen3_vl import Qwen3_VL
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.simple.llava_hf import LlavaHf
from transformers import PreTrainedModel

from ..checkpoints import load_selector
from ..integrations.mllm import GazeVideoLM
from ..integrations.qwen_vl import GazeQwenVL
from ..selection_autogaze import GazeSelector
from ..token_budgets_autogaze import budget_each_frame, check_clip_ratio, threshold_each_frame
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .measuring import AnswerCosts, MeasuredMLLM


_DENSE = "none"  # the selector that keeps everything, by not being there


class GazedModel:
    """
    What the gazed models of lmms-eval share; comes before the class of lmms-eval's own model.

    Args:
        selector (`str`, *optional*, defaults to `"features"`):
            What chooses: a selector of this package (`features`, `finest`, `greedy`), `autogaze`, the published one, a folder
            or a repository of the Hub; or `none`, with which the MLLM sees whole videos, and tokens and seconds are those.
        gazing_ratio, task_loss_requirement, clip_ratio (`float`, *optional*):
            How much to keep, as in [`~GazeQwenVL.gaze`] or [`~GazeVideoLM.gaze`]; with none of them the selector's
            configuration decides.
        batch_size (`int`, *optional*, defaults to 1): must be 1, as seconds are those of one answer.
        kwargs: arguments of lmms-eval's own model, such as `pretrained`, frames and pixels.

    Raises:
        ValueError: if a setting is out of range, there is no such selector, or settings are given that none uses.
    """

    own_name: str
    """What lmms-eval calls its own model of this MLLM. Some tasks have words for it."""
    logs_totals: bool = True
    """Whether lmms-eval's own model logs seconds and tokens of answers in total."""

    def __init__(
        self,
        selector: str = "features",
        gazing_ratio: float | None = None,
        task_loss_requirement: float | None = None,
        clip_ratio: float | None = None,
        batch_size: int | str = 1,
        **kwargs: Any,
    ):
        settings = {
            "gazing_ratio": gazing_ratio,
            "task_loss_requirement": task_loss_requirement,
            "clip_ratio": clip_ratio,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        _check(selector, settings, batch_size)
        chooser = None if selector == _DENSE else load_selector(selector, argument="selector")
        super().__init__(batch_size=batch_size, **kwargs)
        gazed = None
        if chooser is not None:
            gaze_model, gaze_processor = chooser[0].to(self.model.device), chooser[1].video_processor
            gazed = self._wrap(self.model, gaze_model, gaze_processor)
        self._measured = MeasuredMLLM(self.model, gazed, settings)

    def _wrap(
        self, mllm: PreTrainedModel, gaze_model: GazeSelector, gaze_processor: AutoGazeVideoProcessor
    ) -> GazeQwenVL | GazeVideoLM:
        return GazeQwenVL(mllm, gaze_model, self.processor, gaze_processor).eval()

    @property
    def model(self) -> Any:
        """What lmms-eval's own model asks."""
        measured = self.__dict__.get("_measured")
        return super().model if measured is None else measured

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        Answers requests as lmms-eval's own model does.

        Args:
            requests (`list[Instance]`): what tasks ask.

        Returns:
            `list[GenerationResult]`, in the order of the requests, each with its [`AnswerCosts`].
        """
        _ask_as(self.own_name, requests)
        costs: dict[int, AnswerCosts] = {}
        results = super().generate_until([self._noting(request, i, costs) for i, request in enumerate(requests)])
        self._note(None, costs)
        if costs:
            _log_means(list(costs.values()), self.logs_totals)
        texts = [unwrap_generation_output(result)[0] for result in results]
        return [GenerationResult(text, costs.get(i)) for i, text in enumerate(texts)]

    def _noting(self, request: Instance, number: int, costs: dict[int, AnswerCosts]) -> Instance:
        """Gives a request that says when lmms-eval's model, which sorts them, comes to it: it asks for what to show then."""

        def noting(show: Callable, *args: Any, **kwargs: Any) -> Any:
            self._note(number, costs)
            return show(*args, **kwargs)

        arguments = (partial(noting, part) if callable(part) else part for part in request.arguments)
        return replace(request, arguments=tuple(arguments))

    def _note(self, number: int | None, costs: dict[int, AnswerCosts]) -> None:
        """Keeps what the request before took, and raises its error."""
        measured, before = self._measured, self.__dict__.get("_number")
        if measured.error is not None:
            raise measured.error
        if before is not None and measured.costs is not None:
            costs[before] = measured.costs
        self._number, measured.costs = number, None


class GazeQwen2_5_VL(GazedModel, Qwen2_5_VL):
    """`gaze_qwen2_5_vl`: lmms-eval's `qwen2_5_vl` with a selector; see [`GazedModel`] for its arguments."""

    own_name = "qwen2_5_vl"


class GazeQwen3_VL(GazedModel, Qwen3_VL):
    """`gaze_qwen3_vl`: lmms-eval's `qwen3_vl` with a selector; see [`GazedModel`] for its arguments."""

    own_name = "qwen3_vl"


class GazeLlavaOnevision(GazedModel, LlavaHf):
    """`gaze_llava_onevision`: lmms-eval's `llava_hf` (simple) with a selector; see [`GazedModel`] for its arguments."""

    own_name = "llava_hf"
    logs_totals = False

    def _wrap(
        self, mllm: PreTrainedModel, gaze_model: GazeSelector, gaze_processor: AutoGazeVideoProcessor
    ) -> GazeQwenVL | GazeVideoLM:
        return GazeVideoLM(mllm, gaze_model, self._image_processor, gaze_processor).eval()


def _check(selector: str, settings: dict[str, float], batch_size: int | str) -> None:
    """Checks settings before anything is loaded."""
    if selector == _DENSE and settings:
        raise ValueError(f"`{next(iter(settings))}` must not be given with `selector` {_DENSE!r}, got {settings}")
    if "gazing_ratio" in settings:
        budget_each_frame(settings["gazing_ratio"], 1, 1)
    if "task_loss_requirement" in settings:
        threshold_each_frame(settings["task_loss_requirement"], 1, 1)
    check_clip_ratio(settings.get("clip_ratio"))
    if str(batch_size) != "1":
        raise ValueError(f"`batch_size` must be 1, as seconds are those of one answer, got {batch_size!r}")


def _ask_as(own_name: str, requests: list[Instance]) -> None:
    """Lets tasks that have words for lmms-eval's own model use them here, so that both are asked the same."""
    for request in requests:
        for part in request.arguments:
            task = getattr(part, "__self__", None)
            words = getattr(task, "lmms_eval_specific_kwargs", None) or {}
            if own_name in words:
                task.lmms_eval_specific_kwargs = words[own_name]


def _log_means(costs: list[AnswerCosts], are_totals_logged: bool) -> None:
    """Puts means over samples into `throughput` of lmms-eval's results, and totals where they are not there yet."""
    names = [name for name in costs[0].to_dict() if name.endswith(("input_tokens", "seconds"))]
    means = {name: mean(getattr(cost, name) for cost in costs) for name in names}
    seconds = sum(cost.choosing_seconds + cost.encoding_seconds + cost.answering_seconds for cost in costs)
    tokens = sum(cost.output_tokens for cost in costs)
    if are_totals_logged:  # lmms-eval adds them up
        seconds, tokens = 0.0, 0
    speed = tokens / seconds if seconds else 0.0
    log_metrics(total_elapsed_time=seconds, total_gen_tokens=tokens, avg_speed=speed, additional_metrics=means)
