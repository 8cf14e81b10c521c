"""
NVILA-HD-Video as a model of lmms-eval, which has no model of it.

Processor and MLLM are the published remote code; a selector of this package can replace the one inside, see
`integrations.nvila`.
"""

from typing import Any, cast

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from ..hub.checkpoints import load_selector
from ..integrations.nvila import attach
from .measuring import AnswerCosts, synchronized_time
from .settings import NO_SELECTOR, read_settings


_PUBLISHED = "published"
_GAZING_METHOD = "_get_gazing_info_from_videos"


class GazeNvilaHD(lmms):
    """
    `gaze_nvila_hd`: NVILA-HD-Video, called as its model card describes.

    Args:
        pretrained (`str`, *optional*, defaults to `"nvidia/NVILA-8B-HD-Video"`): a folder or a repository of the Hub.
        selector (`str`, *optional*, defaults to `"published"`):
            The selector of patches of tiles: the AutoGaze inside the published processor, a selector with four scales as
            in [`GazedModel`], or `none`, which keeps all patches.
        gazing_ratio, task_loss_requirement (`float`, *optional*):
            Share of a tile's patches to keep in every frame, and threshold; the published ratios by default and, for the
            published selector, its threshold.
        num_video_frames, num_video_frames_thumbnail, max_tiles_video, max_batch_size_autogaze, max_batch_size_siglip (`int`, *optional*):
            As in the published processor and MLLM, with the same defaults.
        device_map (`str`, *optional*, defaults to `"auto"`): as in `from_pretrained`.
        batch_size (`int`, *optional*, defaults to 1): must be 1, as times are measured per answer.
        device (`str`, *optional*): unused, as lmms-eval passes it; see `device_map`.

    Raises:
        ValueError: if a setting is out of range, the selector does not exist, or settings are given with `none`.
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
        given = read_settings(
            selector, batch_size, gazing_ratio=gazing_ratio, task_loss_requirement=task_loss_requirement
        )
        settings: dict[str, Any] = {f"{name}_tile": value for name, value in given.items()}
        if selector != _PUBLISHED:  # The published threshold is one of the loss that the published selector predicts.
            settings.setdefault("task_loss_requirement_tile", None)
        if selector == NO_SELECTOR:
            settings["gazing_ratio_tile"] = 1
        gaze_model = None
        if selector not in (_PUBLISHED, NO_SELECTOR):
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
            cast(nn.Module, gaze_model).to(self.model.device)  # every selector that loads is a module
            attach(self.processor, gaze_model)
        self._measure_selector()

    def _measure_selector(self) -> None:
        """Adds the seconds of every call of the processor's selector to `_choosing_seconds`."""
        gaze, self._choosing_seconds = getattr(self.processor, _GAZING_METHOD), 0.0

        def measured_gaze(*args: Any, **kwargs: Any) -> Any:
            start = synchronized_time(self.model.device)
            try:
                return gaze(*args, **kwargs)
            finally:
                self._choosing_seconds += synchronized_time(self.model.device) - start

        setattr(self.processor, _GAZING_METHOD, measured_gaze)

    @torch.no_grad()
    def _answer(self, video: str, question: str, options: dict[str, Any]) -> GenerationResult:
        self._choosing_seconds = 0.0
        text = f"{self.processor.tokenizer.video_token}\n\n{question}"
        inputs = dict(self.processor(text=text, videos=video, return_tensors="pt"))
        inputs = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        length, start = inputs["input_ids"].shape[1], synchronized_time(self.model.device)
        output = self.model.generate(**inputs, **options)[:, length:]
        # The published code does not report the end of its vision tower, so `answering_seconds` includes the tower.
        costs = AnswerCosts(
            input_tokens=length,
            output_tokens=output.shape[1],
            choosing_seconds=self._choosing_seconds,
            answering_seconds=synchronized_time(self.model.device) - start,
        )
        return GenerationResult(self.processor.batch_decode(output, skip_special_tokens=True)[0].strip(), costs)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        Answers requests, each about one video.

        Args:
            requests (`list[Instance]`): the requests of lmms-eval's tasks.

        Returns:
            `list[GenerationResult]`, each with its [`AnswerCosts`]; `answering_seconds` includes the vision tower.

        Raises:
            ValueError: if a request has pictures, or not exactly one video.
        """
        results = []
        for request in tqdm(requests, desc="Model Responding"):
            _, doc_to_messages, generation_kwargs, doc_id, task, split = request.arguments
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            images, videos, _ = messages.extract_media()
            if images or len(videos) != 1:
                raise ValueError(
                    f"`tasks` must show one video, but {task!r} shows {len(videos)} videos and {len(images)} pictures"
                )
            texts = [part.text for message in messages.messages for part in message.content if part.type == "text"]
            options = {"max_new_tokens": generation_kwargs.get("max_new_tokens", 16), "do_sample": False}
            results.append(self._answer(videos[0], "\n".join(texts), options))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("gaze_nvila_hd answers questions and gives no likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("gaze_nvila_hd answers one question at a time")
