"""
Qwen2.5-VL and Qwen3-VL in vLLM, as a model of lmms-eval; the plug-in in `serving` gazes at the videos.

lmms-eval's own `vllm_generate` starts the engine, samples frames, formats prompts and decodes answers. The subclass adds what
that lacks: metadata of videos, which vLLM requires, and the tokens and seconds of every answer.
"""

from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.models.chat.vllm_generate import VLLMGenerate

from .measuring import AnswerCosts


class GazeVLLM(VLLMGenerate):
    """
    `gaze_vllm`: lmms-eval's `vllm_generate`, with the costs of every answer.

    Args:
        kwargs: arguments of lmms-eval's own model, such as `model`, `nframes` and `max_pixels`, and arguments of vLLM's engine.
            Videos are gazed at as `mm_processor_kwargs` says, for example `{"gaze_model": "features", "gazing_ratio": 0.25}`.
    """

    def make_one_request(self, request: Instance) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Makes the request to vLLM, in which every video has metadata.

        Args:
            request (`Instance`): a request of one of lmms-eval's tasks.

        Returns:
            `tuple` of the inputs of vLLM's `LLM.generate` and the arguments of its `SamplingParams`.
        """
        inputs, params = super().make_one_request(request)
        data = inputs["multi_modal_data"]
        if "video" in data:
            # The base class omits the metadata for all but Qwen3-VL.
            fps = inputs["mm_processor_kwargs"]["fps"]
            data["video"] = [
                (video, _describe_frames(video, fps)) if isinstance(video, torch.Tensor) else video
                for video in data["video"]
            ]
        return inputs, params

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        Answers requests as lmms-eval's own model does.

        Args:
            requests (`list[Instance]`): the requests of lmms-eval's tasks.

        Returns:
            `list[GenerationResult]`, in the order of the requests, each with its [`AnswerCosts`]; `answering_seconds` are those
            from the start of the request in the engine, vision tower included.
        """
        generate = self.client.generate
        costs: list[AnswerCosts] = []

        def measured_generate(*args: Any, **kwargs: Any) -> list[Any]:
            outputs = generate(*args, **kwargs)
            costs.extend(_read_costs(output) for output in outputs)
            return outputs

        self.client.generate = measured_generate
        try:
            results = super().generate_until(requests)
        finally:
            del self.client.generate
        return [GenerationResult(result.text, cost) for result, cost in zip(results, costs, strict=True)]


def _describe_frames(video: torch.Tensor, fps: float) -> dict[str, Any]:
    """Makes vLLM's metadata of sampled frames, `(frames, channels, height, width)`, `fps` of them per second of the video."""
    return {
        "fps": fps,
        "total_num_frames": len(video),
        "frames_indices": list(range(len(video))),
        "duration": len(video) / fps,
        "do_sample_frames": False,
    }


def _read_costs(output: Any) -> AnswerCosts:
    """Reads tokens and seconds from an output of vLLM."""
    times = output.metrics
    return AnswerCosts(
        input_tokens=len(output.prompt_token_ids),
        output_tokens=len(output.outputs[0].token_ids),
        answering_seconds=None if times is None else times.last_token_ts - times.scheduled_ts,
    )
