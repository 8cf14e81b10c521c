"""
Gazed merge units into Qwen2.5-VL and Qwen3-VL: their own tower and language model, fewer tokens, true positions.

This module says which merge units a gaze keeps, takes the others out of prompts and sees to it that what is left stays at
its place. Choosing patches is a selector's matter, running the tower on some units `qwen_vl_tower`'s, and answering the
MLLM's own.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from ..gazing_autogaze import GazeOutput
from ..selection_autogaze import GazeSelector
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .generation_options import check_generation_options, fit_generation_options, sequences_as_given
from .normalization import normalizing_part
from .prompts import with_labels
from .qwen_vl_gazing import UnitGazer, UnitSizes, warn_of_fixed_scales
from .qwen_vl_prompts import GazedPrompt, check_placeholders, find_positions, in_place
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


Setting = float | Sequence[float] | None

_MODELS = (Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration)
_IGNORED = -100  # what a label is where nothing is to be learned
# What the MLLM's processor gives besides tokens and the pixels of videos.
_PROCESSOR_KEYS = ("video_grid_thw", "second_per_grid_ts", "pixel_values", "image_grid_thw", "mm_token_type_ids")


class GazeQwenVL(ModelWrapper):
    """
    A Qwen2.5-VL or Qwen3-VL that sees the gazed merge units of videos only.

    The towers of these MLLMs make one token of every merge unit: 2x2 patches over a pair of frames. A selector that takes any
    grid gazes at these units themselves, so a ratio is the share of them that the language model reads. Of a gaze on
    another grid a unit is kept when a kept patch, of any scale, shares an area with it in one of its frames (see
    [`kept_units`]). The other units are dropped before the tower, and their tokens from the prompt. What is left keeps the
    rotary position, the window and the place in time, height and width that it has in the whole video, and an answer
    goes on at the position at which it would go on after the whole prompt. Parts and weights are the MLLM's, unchanged.

    `generate` answers, `forward` gives logits and, with labels, a loss to train with. Both take what the MLLM's own
    processor returns.

    Args:
        mllm ([`~transformers.PreTrainedModel`]):
            A `Qwen2_5_VLForConditionalGeneration` or `Qwen3VLForConditionalGeneration`.
        gaze_model ([`GazeSelector`], *optional*):
            What chooses, such as [`GreedyGazeSelector`]; one with fixed scales, such as [`AutoGazeModel`], keeps far more
            units than its ratio says. May be left out where every call is given a `gaze`.
        processor (*optional*):
            The processor, video processor or image processor that normalised the frames for the MLLM, so that the
            selector can look at them as well. As with `gaze_model`.
        gaze_processor ([`AutoGazeVideoProcessor`], *optional*):
            How the selector's frames are preprocessed. The published way by default.
        attention (`str`, *optional*, defaults to `"canvas"`):
            What a kept unit sees in the tower beside its own pair of frames: `"canvas"`, at every place that this pair did
            not keep, the latest unit that was kept there, in the layers with windows inside its window; `"frame"`,
            nothing. With every unit kept both are the tower's own attention.

    Raises:
        ValueError: if the MLLM is of no such kind, `attention` is none of these, or the processor does not say how it
            normalises.

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

    >>> inputs = {  # as a Qwen2_5_VLProcessor gives them: 4 frames of 32x32 pixels are 2x4x4 units
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
        Loads what [`~ModelWrapper.save_pretrained`] wrote, or wraps an MLLM from the Hub or a folder.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): as for the MLLM's own `from_pretrained`.
            gaze_model, processor, gaze_processor (*optional*): as in [`GazeQwenVL`]; those that were saved by default.
            kwargs: arguments of the MLLM's `from_pretrained`, such as `dtype` or `device_map`.

        Raises:
            ValueError: if the folder is of another wrapper.
        """
        name = pretrained_model_name_or_path
        facts = read_wrapper_file(name, cls, kwargs)
        parts = load_gazing_parts(name, facts, kwargs, gaze_model, processor, gaze_processor)
        return cls(cls._load_wrapped(name, facts, kwargs), **parts).eval()

    def _save_parts(self, folder: Path) -> dict[str, Any]:
        parts = save_gazing_parts(self, folder, self.processor, self.gaze_processor)
        return {**parts, "settings": {"attention": self.attention}}

    @property
    def _base(self) -> PreTrainedModel:
        """The MLLM without PEFT around it."""
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
        Calls the MLLM on prompts whose videos are gazed at.

        Args:
            input_ids, pixel_values_videos, attention_mask, labels, gaze:
                As in [`~GazeQwenVL.prepare_inputs`]; without videos the MLLM is called as it is.
            gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip: as in [`~GazeQwenVL.gaze`].
            video_grid_thw, second_per_grid_ts, pixel_values, image_grid_thw, mm_token_type_ids:
                As in [`~GazeQwenVL.prepare_inputs`]. They have names here so that `Trainer` keeps these columns of a data set.
            kwargs: further arguments of the MLLM.

        Returns:
            The MLLM's own output. Its `logits` are those of the tokens that are left, see
            [`~GazeQwenVL.prepare_inputs`]; with `labels` it has the `loss`, and the `labels` that
            belong to these logits.

        Raises:
            ValueError: as [`~GazeQwenVL.prepare_inputs`].
        """
        self._check_names(kwargs)
        given = {
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "mm_token_type_ids": mm_token_type_ids,
        }
        kwargs, given = ({key: value for key, value in part.items() if value is not None} for part in (kwargs, given))
        if pixel_values_videos is None:
            self._check_no_video(input_ids)
            return self.mllm(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **given, **kwargs)
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
            padding_side="left" if attention_mask is not None and not bool(attention_mask[:, 0].all()) else "right",
            **given,
        )
        with in_place(self._base, prompt):
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
        Answers prompts whose videos are gazed at, by the MLLM's own `generate`.

        Args:
            input_ids, pixel_values_videos, attention_mask, gaze:
                As in [`~GazeQwenVL.prepare_inputs`]; without videos the MLLM is called as it is.
            gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip: as in [`~GazeQwenVL.gaze`].
            kwargs:
                The other arguments of [`~GazeQwenVL.prepare_inputs`], such as `video_grid_thw`, and of the MLLM's
                `generate`, such as `max_new_tokens`. Lengths count from `input_ids` as they are given, and functions such as a
                `stopping_criteria` see them so. Options that are not known to give the MLLM's own answer on a pruned prompt
                are refused.

        Returns:
            What the MLLM's `generate` returns: sequences that start with `input_ids` as they were given, whatever length
            the prompts had inside, so that `[:, input_ids.shape[1] :]` are the answers.

        Raises:
            ValueError: as [`~GazeQwenVL.prepare_inputs`].
        """
        if pixel_values_videos is None:
            self._check_no_video(input_ids)
            return self.mllm.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        of_processor = {key: kwargs.pop(key) for key in _PROCESSOR_KEYS if key in kwargs}
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
            **of_processor,
        )
        options = fit_generation_options(self.generation_config, kwargs, input_ids, prompt.input_ids.shape[1])
        with in_place(self._base, prompt):
            output = self.mllm.generate(
                input_ids=prompt.input_ids,
                attention_mask=prompt.attention_mask,
                inputs_embeds=prompt.inputs_embeds,
                **options,
            )
        return sequences_as_given(output, input_ids, prompt.input_ids.shape[1])

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
        Takes the tokens of dropped units out of prompts, and encodes the others.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Prompts as the MLLM's processor writes them, with one placeholder per merge unit.
            pixel_values_videos (`torch.FloatTensor` of shape `(patches, channels * temporal_patch_size * patch_size**2)`):
                The patches of all videos, in the order in which the prompts name them.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 where a prompt is padded.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to learn, -100 elsewhere.
            gaze ([`GazeOutput`] or a sequence of them, *optional*):
                What to keep, over all videos, or one gaze per video, on any grid over the whole frame. Without it the
                gaze model chooses.
            gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip: as in [`~GazeQwenVL.gaze`].
            padding_side (`str`, *optional*, defaults to `"right"`): where prompts of unequal length are padded.
            video_grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
                Patches of each video in time, from top to bottom and from left to right.
            second_per_grid_ts (`torch.FloatTensor` of shape `(videos,)`, *optional*):
                Seconds between the pairs of frames (Qwen2.5-VL).
            pixel_values, image_grid_thw (*optional*): the pictures in the prompts. They are kept whole.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                1 for pictures, 2 for videos, 0 for words; read off `input_ids` if not given.

        Returns:
            [`GazedPrompt`]

        Raises:
            ValueError: if no prompt has a placeholder, there are not as many as units, a gaze does not fit the videos, or the
                side is none.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` must be 'left' or 'right', got {padding_side!r}")
        config, device = self.mllm.config, input_ids.device
        is_video, is_image = input_ids == config.video_token_id, input_ids == config.image_token_id
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_placeholders(config, "video", is_video, "pixel_values_videos", pixel_values_videos, video_grid_thw)
        check_placeholders(config, "image", is_image, "pixel_values", pixel_values, image_grid_thw)

        if gaze is None:
            settings = (gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip)
            gaze = self.gaze(pixel_values_videos, video_grid_thw, *settings)
        is_kept = torch.cat([kept.flatten() for kept in self._kept_units(gaze, video_grid_thw)]).to(device)
        is_left = attention_mask.bool().masked_scatter(is_video, is_kept)
        # Pictures come first, and are kept whole.
        pictures = int(is_image.sum())
        is_encoded = torch.cat([is_kept.new_ones(pictures), is_kept])
        if not is_encoded.any():
            raise ValueError("`gaze` must keep at least one patch of some video, got none")
        features, deepstack = encode_units(
            self._base.model.visual,
            torch.cat([pixels for pixels in (pixel_values, pixel_values_videos) if pixels is not None]),
            torch.cat([grids for grids in (image_grid_thw, video_grid_thw) if grids is not None]),
            is_encoded,
            self.attention,
        )
        visual_index = torch.full_like(input_ids, -1)
        visual_index[is_image] = torch.arange(pictures, device=device)
        visual_index[is_video & is_left] = torch.arange(pictures, len(features), device=device)

        mm_token_type_ids = is_image + 2 * is_video if mm_token_type_ids is None else mm_token_type_ids
        position_ids = find_positions(
            self._base,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_token_type_ids=mm_token_type_ids,
        )
        # An answer counts on from the last word, however late a video before it ends.
        places = torch.arange(input_ids.shape[1], device=device)
        last = (places * attention_mask).argmax(1, keepdim=True)
        last_position = position_ids.amax(0).gather(1, last).flatten()

        # Stable sorting closes the gaps: what is left goes to the right of the padding, or to the left.
        pads_left = padding_side == "left"
        source = torch.argsort(is_left if pads_left else ~is_left, dim=1, stable=True)
        length = int(is_left.sum(1).max())
        source = source[:, -length:] if pads_left else source[:, :length]
        is_real = is_left.gather(1, source)
        visual_index = visual_index.gather(1, source).masked_fill(~is_real, -1)
        input_ids = input_ids.gather(1, source)
        inputs_embeds = self.mllm.get_input_embeddings()(input_ids)
        is_visual = (visual_index >= 0).to(inputs_embeds.device)
        shown = visual_index[visual_index >= 0].to(features.device)
        return GazedPrompt(
            input_ids=input_ids,
            attention_mask=is_real.long(),
            inputs_embeds=inputs_embeds.masked_scatter(is_visual[..., None], features[shown].to(inputs_embeds)),
            position_ids=position_ids.gather(2, source.expand(3, -1, -1)),
            next_position=last_position + 1,
            visual_index=visual_index,
            deepstack=deepstack,
            labels=None if labels is None else labels.gather(1, source).masked_fill(~is_real, _IGNORED),
        )

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
        Gazes at the frames that the patches of videos were cut from.

        Where neither ratio, threshold nor budget is given, the selector's configuration decides.

        Args:
            pixel_values_videos, video_grid_thw: as in [`~GazeQwenVL.prepare_inputs`].
            gazing_ratio (`float` or sequence of `float`, *optional*):
                Share of the merge units to keep in every pair of frames, one at least; with a selector of fixed scales
                the share of its patches to keep in every frame.
            task_loss_requirement (`float` or sequence of `float`, *optional*):
                Loss at which a pair of frames, or a frame, is good enough, see [`~GazeSelector.generate`].
            clip_ratio (`float`, *optional*): share of all merge units of each video to keep, where they gain most.
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
        Counts what the language model reads of videos, a token per merge unit.

        Args:
            gaze, video_grid_thw: as in [`~GazeQwenVL.prepare_inputs`].

        Returns:
            `list[tuple[int, int]]`, one per video: merge units that the gaze keeps, and all that the video has.
        """
        return [(int(kept.sum()), kept.numel()) for kept in self._kept_units(gaze, video_grid_thw)]

    def _kept_units(
        self, gaze: GazeOutput | Sequence[GazeOutput], video_grid_thw: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Gives the units to keep, `(times, rows, cols)`, video by video."""
        gazes = list_gazes(gaze)
        if len(gazes) != len(video_grid_thw):
            raise ValueError(f"`gaze` must be one for each of the {len(video_grid_thw)} videos, got {len(gazes)}")
        vision = self.mllm.config.vision_config
        for number, (one, grid) in enumerate(zip(gazes, video_grid_thw.tolist(), strict=True)):
            try:
                units = (grid[0], grid[1] // vision.spatial_merge_size, grid[2] // vision.spatial_merge_size)
                yield kept_units(one, units, vision.temporal_patch_size)[0]
            except ValueError as error:
                raise ValueError(f"`gaze` does not fit video {number}: {error}") from error

    def _check_no_video(self, input_ids: torch.Tensor) -> None:
        if bool((input_ids == self.mllm.config.video_token_id).any()):
            raise ValueError("`pixel_values_videos` must be given for prompts with a video placeholder, got None")
