"""
NVILA-HD-Video as a model of lmms-eval, which has none of its own.

Processor and MLLM are the published remote code; a selector of this package can take the place of the one inside, see
`integrations.nvila`.
"""

import time
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from ..checkpoints import load_selector
from ..integrations.nvila import attach
from ..token_budgets_autogaze import budget_each_frame, threshold_each_frame
from .measuring import AnswerCosts


_PUBLISHED, _DENSE = "published", "none"
_GAZES = "_get_gazing_info_from_videos"


class GazeNvilaHD(lmms):
    """
    `gaze_nvila_hd`: NVILA-HD-Video, asked as its card says.

    Args:
        pretrained (`str`, *optional*, defaults to `"nvidia/NVILA-8B-HD-Video"`): a folder or a repository of the Hub.
        selector (`str`, *optional*, defaults to `"published"`):
            What chooses patches of tiles: the AutoGaze inside the published processor, a selector of four scales as in
            [`GazedModel`], or `none`, which keeps everything.
        gazing_ratio, task_loss_requirement (`float`, *optional*):
            How much of a tile's frames to keep; the published ratios by default and, for the published selector, its
            threshold.
        num_video_frames, num_video_frames_thumbnail, max_tiles_video, max_batch_size_autogaze, max_batch_size_siglip (`int`, *optional*):
            As in the published processor and MLLM, whose defaults they are.
        device_map (`str`, *optional*, defaults to `"auto"`): as in `from_pretrained`.
        batch_size (`int`, *optional*, defaults to 1): must be 1, as seconds are those of one answer.
        device (`str`, *optional*): is not used; `device_map` decides.

    Raises:
        ValueError: if a setting is out of range or there is no such selector.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "nvidia/NVILA-8B-HD-Video",
        selector: str = _PUBLISHED,
        gazing_ratio: float | None = None,
        task_loss_requirement: float | None = None,
        num_video_frames: int = 128,
        num_video_frames_thumbnail: int = 64,
        max_tiles_video: int = 48,
        max_batch_size_autogaze: int = 16,
        max_batch_size_siglip: int = 32,
        device_map: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
    ):
        super().__init__()
        settings: dict[str, Any] = {}
        if selector != _PUBLISHED:  # whose threshold is a loss as that one predicts it
            settings["task_loss_requirement_tile"] = None
        if selector == _DENSE:
            settings["gazing_ratio_tile"] = 1
        if gazing_ratio is not None:
            budget_each_frame(gazing_ratio, 1, 1)
            settings["gazing_ratio_tile"] = gazing_ratio
        if task_loss_requirement is not None:
            threshold_each_frame(task_loss_requirement, 1, 1)
            settings["task_loss_requirement_tile"] = task_loss_requirement
        if selector == _DENSE and {gazing_ratio, task_loss_requirement} != {None}:
            raise ValueError(
                f"`gazing_ratio` and `task_loss_requirement` must not be given with `selector` {_DENSE!r}"
            )
        if str(batch_size) != "1":
            raise ValueError(f"`batch_size` must be 1, as seconds are those of one answer, got {batch_size!r}")
        gaze_model = None
        if selector not in (_PUBLISHED, _DENSE):
            gaze_model, _ = load_selector(selector, argument="selector")
        self.processor = AutoProcessor.from_pretrained(
            pretrained,
            num_video_frames=num_video_frames,
            num_video_frames_thumbnail=num_video_frames_thumbnail,
            max_tiles_video=max_tiles_video,
            max_batch_size_autogaze=max_batch_size_autogaze,
            trust_remote_code=True,
            **settings,
        )
        self.model = AutoModel.from_pretrained(
            pretrained, trust_remote_code=True, device_map=device_map, max_batch_size_siglip=max_batch_size_siglip
        ).eval()
        if gaze_model is not None:
            attach(self.processor, gaze_model.to(self.model.device))
        self._time_gazing()

    def _time_gazing(self) -> None:
        """Notes the seconds that the processor's selector takes."""
        gazes, self._choosing_seconds = getattr(self.processor, _GAZES), 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = self._now()
            try:
                return gazes(*args, **kwargs)
            finally:
                self._choosing_seconds += self._now() - begun

        setattr(self.processor, _GAZES, timed)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    @torch.no_grad()
    def _answer(self, video: str, question: str, options: dict[str, Any]) -> GenerationResult:
        self._choosing_seconds = 0.0
        text = f"{self.processor.tokenizer.video_token}\n\n{question}"
        inputs = dict(self.processor(text=text, videos=video, return_tensors="pt"))
        inputs = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        length, begun = inputs["input_ids"].shape[1], self._now()
        output = self.model.generate(**inputs, **options)[:, length:]
        # The published code tells nobody when its tower is done, so that seconds of answering include it.
        costs = AnswerCosts(
            input_tokens=length,
            output_tokens=output.shape[1],
            choosing_seconds=self._choosing_seconds,
            answering_seconds=self._now() - begun,
        )
        return GenerationResult(self.processor.batch_decode(output, skip_special_tokens=True)[0].strip(), costs)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        Answers requests, each about one video.

        Args:
            requests (`list[Instance]`): what tasks ask.

        Returns:
            `list[GenerationResult]`, each with its [`AnswerCosts`]; seconds of encoding are among those of answering.

        Raises:
            ValueError: if a task shows anything but one video.
        """
        results = []
        for request in tqdm(requests, desc="Model Responding"):
            _, doc_to_messages, given, number, task, split = request.arguments
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
            images, videos, _ = messages.extract_media()
            if images or len(videos) != 1:
                raise ValueError(
                    f"`tasks` must show one video, but {task!r} shows {len(videos)} videos and {len(images)} pictures"
                )
            texts = [part.text for message in messages.messages for part in message.content if part.type == "text"]
            options = {"max_new_tokens": given.get("max_new_tokens", 16), "do_sample": False}
            results.append(self._answer(videos[0], "\n".join(texts), options))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("gaze_nvila_hd answers questions and gives no likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("gaze_nvila_hd answers one question at a time")
