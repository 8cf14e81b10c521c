"""
[`GazeQwenVL`]: Qwen2.5-VL and Qwen3-VL on the kept merge units of videos, with the positions of the whole video.

It finds the merge units that a gaze keeps and removes the tokens of the others from the prompts. `qwen_vl_gazing` chooses
the patches, `qwen_vl_tower` encodes the kept units, and the MLLM itself generates.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from ..gazing_autogaze import GazeOutput
from ..selection_autogaze import GazeSelector
from ..video.tiles import Setting
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .generation_options import check_generation_options, generate_on_pruned_prompts
from .normalization import normalizing_part
from .prompts import padding_side_of, with_labels
from .qwen_vl_gazing import UnitGazer, UnitSizes, warn_of_fixed_scales
from .qwen_vl_prompts import (
    GazedPrompt,
    WholePrompt,
    check_placeholders,
    compute_position_ids,
    drop_tokens,
    language_model_inputs,
)
from .qwen_vl_tower import UNIT_ATTENTION_CHOICES, encode_units
from .qwen_vl_units import kept_units
from .video_tokens import list_gazes
from .wrapping import (
    ModelWrapper,
    load_gazing_parts,
    read_wrapper_file,
    save_gazing_parts,
    without_peft,
)


_MODELS = (Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration)
# Outputs of the MLLM's processor, besides tokens and the pixels of videos.
_PROCESSOR_KEYS = ("video_grid_thw", "second_per_grid_ts", "pixel_values", "image_grid_thw", "mm_token_type_ids")


class GazeQwenVL(ModelWrapper):
    """
    Wraps Qwen2.5-VL or Qwen3-VL, which then reads only the kept merge units of videos.

    The vision towers of these MLLMs make one token of every merge unit: 2x2 patches over a pair of frames. A selector that
    takes any grid chooses among these units, so a ratio is the share of them that the language model reads. With a gaze on
    another grid, a unit is kept if a kept patch of any scale overlaps it in one of its frames (see [`kept_units`]). The other
    units are dropped before the tower, and their tokens from the prompt. The kept units have the rotary positions and the
    window that they have in the whole video, the kept tokens the time, height and width, and the answer starts at the
    position that follows the whole prompt. Modules and weights are the MLLM's, unchanged.

    `generate` answers prompts; `forward` returns logits and, with labels, the training loss. Both take the outputs of the
    MLLM's own processor.

    Args:
        mllm ([`~transformers.PreTrainedModel`]):
            A `Qwen2_5_VLForConditionalGeneration` or `Qwen3VLForConditionalGeneration`.
        gaze_model ([`GazeSelector`], *optional*):
            The selector, such as [`GreedyGazeSelector`]; one with fixed scales, such as [`AutoGazeModel`], keeps far more
            units than its ratio says. Not needed if every call is given a `gaze`.
        processor (*optional*):
            The processor, video processor or image processor that normalised the frames for the MLLM, needed to convert
            them for the selector. Not needed if every call is given a `gaze`.
        gaze_processor ([`AutoGazeVideoProcessor`], *optional*):
            Preprocesses the selector's frames; by default with the published settings.
        attention (`str`, *optional*, defaults to `"canvas"`):
            What a kept unit attends to in the tower beside its own pair of frames: `"canvas"`, the latest kept unit at every
            place where this pair kept none, in layers with window attention only inside its window; `"frame"`, nothing
            else. If every unit is kept, both are the tower's own attention.

    Raises:
        ValueError: if the MLLM is of another type, `attention` is none of these, or the processor has no normalisation
            attributes.

    Example:

    ```python
    >>> from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
    >>> from transformers_autogaze import GazeGrid, GazeOutput, GreedyGazeSelector
    >>> from transformers_autogaze.integrations.qwen_vl import GazeQwenVL

    >>> tiny = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50}
    >>> text = {**tiny, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    >>> text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    >>> vision = {**tiny, "depth": 1, "num_heads": 2, "patch_size": 4, "window_size": 16, "out_hidden_size": 32}
    >>> tokens = {"image_token_id": 46, "video_token_id": 47, "vision_start_token_id": 48, "vision_end_token_id": 49}
    >>> mllm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    >>> model = GazeQwenVL(mllm.eval(), GreedyGazeSelector(), Qwen2VLImageProcessor())

    >>> inputs = {  # as a Qwen2_5_VLProcessor returns them: 4 frames of 32x32 pixels are 2x4x4 units
    ...     "input_ids": torch.tensor([[1, 48, *[47] * 32, 49, 2]]),
    ...     "pixel_values_videos": torch.randn(2 * 8 * 8, 3 * 2 * 4 * 4),
    ...     "video_grid_thw": torch.tensor([[2, 8, 8]]),
    ... }
    >>> mask = torch.tensor([[[True, False, False, False]]]).expand(1, 4, 4)  # the top left quarter of every frame
    >>> gaze = GazeOutput.from_masks([mask], GazeGrid([32]))
    >>> model(**inputs, gaze=gaze).logits.shape  # 4 words and 2x2x2 units
    torch.Size([1, 12, 50])
    >>> model.generate(**inputs, gazing_ratio=0.1, max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 39])

    ```
    """

    wrapped_name = "mllm"
    mllm: Any  # an MLLM with `generate`, or its `PeftModel`

    def __init__(
        self,
        mllm: PreTrainedModel,
        gaze_model: GazeSelector | None = None,
        processor: Any = None,
        gaze_processor: AutoGazeVideoProcessor | None = None,
        attention: str = "canvas",
    ):
        super().__init__()
        if not isinstance(without_peft(mllm), _MODELS):
            raise ValueError(
                f"`mllm` must be a {' or '.join(model.__name__ for model in _MODELS)}, got {type(mllm).__name__}; "
                "GazeVideoLM takes the LLaVA family"
            )
        if attention not in UNIT_ATTENTION_CHOICES:
            raise ValueError(
                f"`attention` must be one of {', '.join(map(repr, UNIT_ATTENTION_CHOICES))}, got {attention!r}"
            )
        self.mllm, self.gaze_model, self.attention = mllm, gaze_model, attention
        self.processor = None if processor is None else normalizing_part(processor)
        self.gaze_processor = gaze_processor
        self._has_warned = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        gaze_model: GazeSelector | None = None,
        processor: Any = None,
        gaze_processor: AutoGazeVideoProcessor | None = None,
        **kwargs: Any,
    ) -> "GazeQwenVL":
        """
        Loads what [`~ModelWrapper.save_pretrained`] saved, or wraps an MLLM from the Hub or a folder.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): as for the MLLM's own `from_pretrained`.
            gaze_model, processor, gaze_processor (*optional*): as in [`GazeQwenVL`]; by default those that were saved.
            kwargs: arguments of the MLLM's `from_pretrained`, such as `dtype` or `device_map`.

        Raises:
            ValueError: if another wrapper was saved.
        """
        name = pretrained_model_name_or_path
        wrapper_config = read_wrapper_file(name, cls, kwargs)
        parts = load_gazing_parts(name, wrapper_config, kwargs, gaze_model, processor, gaze_processor)
        return cls(cls._load_wrapped(name, wrapper_config, kwargs), **parts).eval()

    def _save_parts(self, folder: Path) -> dict[str, Any]:
        parts = save_gazing_parts(self, folder, self.processor, self.gaze_processor)
        return {**parts, "settings": {"attention": self.attention}}

    @property
    def _base(self) -> PreTrainedModel:
        """The MLLM, without a `PeftModel` around it."""
        return without_peft(self.mllm)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gaze: GazeOutput | Sequence[GazeOutput] | None = None,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Calls the MLLM on pruned prompts.

        Args:
            input_ids, pixel_values_videos, attention_mask, labels, gaze:
                As in [`~GazeQwenVL.prepare_inputs`]; without videos the MLLM is called with unchanged inputs.
            gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip: as in [`~GazeQwenVL.gaze`].
            video_grid_thw, second_per_grid_ts, pixel_values, image_grid_thw, mm_token_type_ids:
                As in [`~GazeQwenVL.prepare_inputs`]. They are in the signature so that `Trainer` keeps these columns.
            kwargs: further arguments of the MLLM.

        Returns:
            The MLLM's own output. Its `logits` are those of the kept tokens, see [`~GazeQwenVL.prepare_inputs`]; with
            `labels` it has the `loss`, and the `labels` of these logits.

        Raises:
            ValueError: as [`~GazeQwenVL.prepare_inputs`].
        """
        self._check_names(kwargs)
        processed: dict[str, Any] = {
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "mm_token_type_ids": mm_token_type_ids,
        }
        kwargs, processed = (
            {key: value for key, value in inputs.items() if value is not None} for inputs in (kwargs, processed)
        )
        if pixel_values_videos is None:
            self._check_no_video(input_ids)
            return self.mllm(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **processed, **kwargs)
        prompt = self.prepare_inputs(
            input_ids,
            pixel_values_videos,
            attention_mask,
            labels,
            gaze,
            gazing_ratio,
            task_loss_requirement,
            clip_ratio=clip_ratio,
            tokens_per_clip=tokens_per_clip,
            padding_side=padding_side_of(attention_mask),
            **processed,
        )
        with language_model_inputs(self._base, prompt):
            output = self.mllm(
                inputs_embeds=prompt.inputs_embeds,
                attention_mask=prompt.attention_mask,
                position_ids=prompt.position_ids,
                labels=prompt.labels,
                **kwargs,
            )
        return with_labels(output, prompt.labels)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        gaze: GazeOutput | Sequence[GazeOutput] | None = None,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Answers prompts with the MLLM's own `generate` on pruned prompts.

        Args:
            input_ids, pixel_values_videos, attention_mask, gaze:
                As in [`~GazeQwenVL.prepare_inputs`]; without videos the MLLM is called with unchanged inputs.
            gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip: as in [`~GazeQwenVL.gaze`].
            kwargs:
                The other arguments of [`~GazeQwenVL.prepare_inputs`], such as `video_grid_thw`, and of the MLLM's
                `generate`, such as `max_new_tokens`. Lengths, and callbacks such as `stopping_criteria`, refer to `input_ids`.
                Options that are not known to give the MLLM's own answer on a pruned prompt are refused.

        Returns:
            What the MLLM's `generate` returns. Its sequences start with `input_ids`, whatever the lengths of the pruned
            prompts, so that `[:, input_ids.shape[1] :]` are the answers.

        Raises:
            ValueError: as [`~GazeQwenVL.prepare_inputs`], and if an option is refused.
        """
        if pixel_values_videos is None:
            self._check_no_video(input_ids)
            return self.mllm.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        processed = {key: kwargs.pop(key) for key in _PROCESSOR_KEYS if key in kwargs}
        check_generation_options(self.generation_config, kwargs)
        prompt = self.prepare_inputs(
            input_ids,
            pixel_values_videos,
            attention_mask,
            gaze=gaze,
            gazing_ratio=gazing_ratio,
            task_loss_requirement=task_loss_requirement,
            clip_ratio=clip_ratio,
            tokens_per_clip=tokens_per_clip,
            padding_side="left",
            **processed,
        )
        inputs = {name: getattr(prompt, name) for name in ("input_ids", "attention_mask", "inputs_embeds")}
        with language_model_inputs(self._base, prompt):
            return generate_on_pruned_prompts(self.mllm, inputs, kwargs, input_ids)

    def prepare_inputs(
        self,
        input_ids: torch.Tensor,
        pixel_values_videos: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gaze: GazeOutput | Sequence[GazeOutput] | None = None,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        padding_side: str = "right",
        *,
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
        video_grid_thw: torch.Tensor,
        second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> GazedPrompt:
        """
        Prunes prompts: removes the tokens of dropped units and encodes the kept units.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Prompts as the MLLM's processor returns them, with one placeholder per merge unit.
            pixel_values_videos (`torch.FloatTensor` of shape `(patches, channels * temporal_patch_size * patch_size**2)`):
                The patches of all videos, in the order of their placeholders.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 where a prompt is padded.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to learn, -100 elsewhere.
            gaze ([`GazeOutput`] or a sequence of them, *optional*):
                The kept patches: one batch for all videos, or one gaze per video, on any grid over the whole frame. By
                default the gaze model chooses them.
            gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip: as in [`~GazeQwenVL.gaze`].
            padding_side (`str`, *optional*, defaults to `"right"`): where prompts of unequal length are padded.
            video_grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
                Patches of each video in time, height and width.
            second_per_grid_ts (`torch.FloatTensor` of shape `(videos,)`, *optional*):
                Seconds between the pairs of frames (Qwen2.5-VL).
            pixel_values, image_grid_thw (*optional*): the images in the prompts. All their units are kept.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                1 for images, 2 for videos, 0 for words; by default computed from `input_ids`.

        Returns:
            [`GazedPrompt`]

        Raises:
            ValueError: if the numbers of placeholders and units differ, a gaze does not fit the videos or keeps nothing, or
                `padding_side` is neither.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` must be 'left' or 'right', got {padding_side!r}")
        config = self.mllm.config
        is_video, is_image = input_ids == config.video_token_id, input_ids == config.image_token_id
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_placeholders(config, "video", is_video, "pixel_values_videos", pixel_values_videos, video_grid_thw)
        check_placeholders(config, "image", is_image, "pixel_values", pixel_values, image_grid_thw)

        if gaze is None:
            settings = (gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip)
            gaze = self.gaze(pixel_values_videos, video_grid_thw, *settings)
        is_unit_kept = torch.cat([kept.flatten() for kept in self._kept_units(gaze, video_grid_thw)])
        is_unit_kept = is_unit_kept.to(input_ids.device)
        features, deepstack = self._encode_units(
            torch.cat([is_unit_kept.new_ones(int(is_image.sum())), is_unit_kept]),
            [pixel_values, pixel_values_videos],
            [image_grid_thw, video_grid_thw],
        )
        position_ids = compute_position_ids(
            self._base,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_token_type_ids=is_image + 2 * is_video if mm_token_type_ids is None else mm_token_type_ids,
        )
        whole = WholePrompt(input_ids, attention_mask, is_video, is_image, position_ids, labels)
        embedding = self.mllm.get_input_embeddings()
        return drop_tokens(whole, is_unit_kept, embedding, features, deepstack, padding_side)

    def _encode_units(
        self, is_kept: torch.Tensor, pixels: list[torch.Tensor | None], grids: list[torch.Tensor | None]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Encodes the kept units of images and then videos; see [`encode_units`]."""
        if not is_kept.any():
            raise ValueError("`gaze` must keep at least one patch of some video, got none")
        pixel_values, grid_thw = (torch.cat([part for part in parts if part is not None]) for parts in (pixels, grids))
        return encode_units(self._base.model.visual, pixel_values, grid_thw, is_kept, self.attention)

    def gaze(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
        **options: Any,
    ) -> list[GazeOutput]:
        """
        Gazes at the frames of videos, which are put together from their patches.

        Without a ratio, threshold or budget, those of the selector's configuration are used.

        Args:
            pixel_values_videos, video_grid_thw: as in [`~GazeQwenVL.prepare_inputs`].
            gazing_ratio (`float` or sequence of `float`, *optional*):
                Share of the merge units to keep of every pair of frames, at least one; with a selector of fixed scales,
                the share of its patches to keep of every frame.
            task_loss_requirement (`float` or sequence of `float`, *optional*):
                Loss threshold of a pair of frames, or of a frame; see [`~GazeSelector.generate`].
            clip_ratio (`float`, *optional*): share of all merge units of each video to keep: those with the largest gains.
            tokens_per_clip (`int`, *optional*): the same as a number of units.
            options: for a selector of fixed scales, other arguments of [`gaze_video`].

        Returns:
            `list[GazeOutput]`, one per video, a batch of one over whole frames. With a selector that takes any grid, its
            patches are the merge units and its frames the pairs of frames.

        Raises:
            ValueError: if there is no gaze model or processor, a selector of fixed scales is given a budget for the clip, or
                as in [`~GazeSelector.generate`].
        """
        if self.gaze_model is None or self.processor is None:
            raise ValueError("`gaze` must be given where the model was made without `gaze_model` and `processor`")
        vision = self.mllm.config.vision_config
        sizes = UnitSizes(vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size)
        gaze = UnitGazer(self.gaze_model, self.processor, self.gaze_processor, sizes).gaze(
            pixel_values_videos,
            video_grid_thw,
            gazing_ratio=gazing_ratio,
            task_loss_requirement=task_loss_requirement,
            clip_ratio=clip_ratio,
            tokens_per_clip=tokens_per_clip,
            **options,
        )
        if not self.gaze_model.takes_any_grid and not self._has_warned:
            self._has_warned = True
            warn_of_fixed_scales(self.gaze_model, gaze, self.count_units(gaze, video_grid_thw))
        return gaze

    def count_units(
        self, gaze: GazeOutput | Sequence[GazeOutput], video_grid_thw: torch.Tensor
    ) -> list[tuple[int, int]]:
        """
        Counts the tokens of videos that the language model reads, one for each merge unit.

        Args:
            gaze, video_grid_thw: as in [`~GazeQwenVL.prepare_inputs`].

        Returns:
            `list[tuple[int, int]]`: for each video, the numbers of kept merge units and of all its merge units.
        """
        return [(int(kept.sum()), kept.numel()) for kept in self._kept_units(gaze, video_grid_thw)]

    def _kept_units(
        self, gaze: GazeOutput | Sequence[GazeOutput], video_grid_thw: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Yields the mask of kept units `(times, rows, cols)` of each video."""
        gazes = list_gazes(gaze)
        if len(gazes) != len(video_grid_thw):
            raise ValueError(f"`gaze` must be one for each of the {len(video_grid_thw)} videos, got {len(gazes)}")
        vision = self.mllm.config.vision_config
        for index, (video_gaze, (times, rows, cols)) in enumerate(zip(gazes, video_grid_thw.tolist(), strict=True)):
            try:
                units = (times, rows // vision.spatial_merge_size, cols // vision.spatial_merge_size)
                yield kept_units(video_gaze, units, vision.temporal_patch_size)[0]
            except ValueError as error:
                raise ValueError(f"`gaze` does not fit video {index}: {error}") from error

    def _check_no_video(self, input_ids: torch.Tensor) -> None:
        if bool((input_ids == self.mllm.config.video_token_id).any()):
            raise ValueError("`pixel_values_videos` must be given for prompts with a video placeholder, got None")
