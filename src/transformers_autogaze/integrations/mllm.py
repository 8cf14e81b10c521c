"""
Gazed patches into a video MLLM of the LLaVA family: its own tower, projector and language model, fewer tokens.

This module carries videos from frames to prompts. Choosing patches is a selector's matter, encoding them
[`GazeVisionModel`]'s, where an MLLM keeps its parts that of `mllm_adapters`, and answering the MLLM's own.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import GazeSelector
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .encoder_gazing import EncoderFrameGazer, Setting
from .generation_options import check_generation_options, fit_generation_options, sequences_as_given
from .mllm_adapters import MLLMAdapter, adapt_mllm
from .mllm_encoding import ClipEncoder
from .mllm_layout import VideoLayout, check_separator, embed_separator, has_videos
from .normalization import normalizing_part
from .place_pooling import PlacePooling
from .prompts import fill_placeholders, find_placeholders, with_labels
from .video_tokens import (
    TokenPlaces,
    Videos,
    check_gaze,
    list_gazes,
    list_videos,
    load_time_embedding,
    order_tokens,
    save_time_embedding,
)
from .vision import GazeVisionModel
from .vision_cache import GazeVisionCache
from .wrapping import (
    ModelWrapper,
    load_gazing_parts,
    read_wrapper_file,
    save_gazing_parts,
    without_peft,
)


_CHUNK = 16  # frames, where the selector itself has no limit


class GazeVideoLM(ModelWrapper):
    """
    A video MLLM that sees the gazed patches only.

    It gazes at videos, encodes the kept patches with the MLLM's own vision tower, projects them with its own projector,
    puts one embedding per patch where the prompt names the video, and calls the MLLM. Parts and weights are the MLLM's,
    unchanged.

    Where an MLLM pools the patches of a frame to fewer places, it is these places that are kept: the tower encodes the
    patches that they are made of, and the MLLM's own pooling makes one embedding of them. At `scales` other than the
    tower's own, and where the pooling is no weighted mean, patches stay what is kept, and none are pooled.
    [`~GazeVideoLM.count_tokens`] tells what the language model reads, and what it would read of the whole video.

    `generate` answers, `forward` gives logits and, with labels, a loss to train with. What is said per frame counts frames
    that the selector gazes at.

    Args:
        mllm ([`~transformers.PreTrainedModel`]):
            A `LlavaForConditionalGeneration`, `LlavaNextVideoForConditionalGeneration`,
            `LlavaOnevisionForConditionalGeneration`, `VideoLlavaForConditionalGeneration` or
            `VipLlavaForConditionalGeneration`. The layers and, unless the MLLM always does the same with it, the CLS
            token of the features are those that its configuration names.
        gaze_model ([`GazeSelector`], *optional*):
            What chooses patches, such as [`GreedyGazeSelector`] or [`AutoGazeModel`]. May be left out where every call
            is given a `gaze`.
        processor (*optional*):
            The processor, video processor or image processor that normalised the frames for the MLLM, so that the
            selector can look at them as well, in its own normalisation. As with `gaze_model`.
        gaze_processor ([`AutoGazeVideoProcessor`], *optional*):
            Whose normalisation the selector needs. The published one by default.
        scales (`Sequence[int]`, *optional*):
            As in [`GazeVisionModel`]: by default the one scale that the tower was made for, pooled as the MLLM does, or,
            with a gaze model of fixed scales, these, matched to the tower.
        attention (`str`, *optional*):
            As in [`GazeVisionModel`]: by default `"canvas"` at one scale and `"block_causal"` at several.
        chunk_frames (`int`, *optional*):
            Frames that are gazed at and encoded at a time. `gaze_model.config.max_num_frames` by default, or 16. A gaze
            model without a longest clip and `"canvas"` attention see the whole video all the same; for others each
            chunk is a clip of its own.
        max_batch_size (`int`, *optional*, defaults to 16):
            Clips (a tile over a chunk) in the selector or the tower at a time. Bounds their memory; changes no result.
        order (`str`, *optional*, defaults to `"time"`):
            `"time"`: all tiles of a frame come before the next frame. `"tile"`: all frames of a tile, inside its
            chunk, come before the next tile. Inside a frame patches go from coarse to fine and row by row.
        separator (`int`, `Sequence[int]` or `"image_newline"`, *optional*):
            What to put between the chunks of a video, with `order="tile"` between its clips: ids of text tokens or the
            MLLM's own embedding of a new line. Nothing by default.
        thumbnail_interval (`int`, *optional*):
            Every how many frames to put in the whole frame as well, with all patches of the finest scale, before its
            tiles. None by default.
        time_embedding (`nn.Module`, *optional*):
            Makes of the frame number of every token, a `torch.LongTensor` of shape `(tokens,)`, what to add to its
            embedding: a [`SinusoidalTimeEmbedding`], or an `nn.Embedding` to be learned. None by default.

    Raises:
        ValueError: if the MLLM is of no such kind, or an argument is out of range or does not fit the MLLM.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    >>> from transformers_autogaze import AutoGazeVideoProcessor, GreedyGazeSelector
    >>> from transformers_autogaze.integrations.mllm import GazeVideoLM

    >>> tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> vision = CLIPVisionConfig(**tiny, image_size=32, patch_size=8)
    >>> text = LlamaConfig(**tiny, vocab_size=50)
    >>> config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
    >>> mllm = LlavaForConditionalGeneration(config).eval()
    >>> model = GazeVideoLM(mllm, GreedyGazeSelector(), processor=AutoGazeVideoProcessor())

    >>> prompt, video = torch.tensor([[1, 49, 5, 6]]), torch.randn(1, 4, 3, 32, 32)
    >>> model(prompt, video, gazing_ratio=0.25).logits.shape  # 3 words and 4 frames of 4 patches each
    torch.Size([1, 19, 50])
    >>> model(prompt, video, tokens_per_clip=20).logits.shape  # 3 words and 20 patches, where they gain most
    torch.Size([1, 23, 50])
    >>> model.generate(prompt, video, gazing_ratio=0.25, max_new_tokens=2, do_sample=False).shape
    torch.Size([1, 6])

    ```
    """

    wrapped_name = "mllm"

    def __init__(
        self,
        mllm: PreTrainedModel,
        gaze_model: GazeSelector | None = None,
        processor: Any = None,
        gaze_processor: AutoGazeVideoProcessor | None = None,
        scales: Sequence[int] | None = None,
        attention: str | None = None,
        chunk_frames: int | None = None,
        max_batch_size: int = 16,
        order: str = "time",
        separator: int | Sequence[int] | str | None = None,
        thumbnail_interval: int | None = None,
        time_embedding: nn.Module | None = None,
    ):
        super().__init__()
        self._given = {"scales": scales, "attention": attention, "order": order, "separator": separator}
        self._given |= {"chunk_frames": chunk_frames, "max_batch_size": max_batch_size}
        self._given |= {"thumbnail_interval": thumbnail_interval}
        adapter = adapt_mllm(without_peft(mllm))
        tower = adapter.tower
        if scales is None and gaze_model is not None and not gaze_model.takes_any_grid:
            scales = gaze_model.config.grid.for_encoder(tower.config.image_size, tower.config.patch_size).scales
        # The tower belongs to `mllm`. Registered here as well, its weights would be saved twice.
        self.__dict__["vision"] = GazeVisionModel(tower, scales=scales, attention=attention)
        self.mllm, self.gaze_model, self.time_embedding = mllm, gaze_model, time_embedding
        self._pooling = self._places = None
        weights = adapter.pooling_weights() if scales is None else None
        if weights is not None:
            self._pooling, (height, _) = PlacePooling(weights), self.vision.grid.sizes[-1]
            rows, cols = adapter.pool_grid(*self.vision.adapter.native_grid)
            self._places = GazeGrid([(rows * (height // rows), cols * (height // rows))], height // rows)

        if chunk_frames is None:
            chunk_frames = (None if gaze_model is None else gaze_model.config.max_num_frames) or _CHUNK
        self.layout = VideoLayout(chunk_frames, max_batch_size, order, thumbnail_interval)
        self.separator = check_separator(separator, adapter, mllm.get_input_embeddings())
        self.processor, self.gaze_processor = None, gaze_processor
        self._gazer = None
        if gaze_model is not None and processor is not None:
            self.processor = normalizing_part(processor)
            gaze_processor = AutoGazeVideoProcessor() if gaze_processor is None else gaze_processor
            self._gazer = EncoderFrameGazer(
                gaze_model, processor, gaze_processor, self.grid, chunk_frames, max_batch_size
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        gaze_model: GazeSelector | None = None,
        processor: Any = None,
        gaze_processor: AutoGazeVideoProcessor | None = None,
        time_embedding: nn.Module | None = None,
        **kwargs: Any,
    ) -> "GazeVideoLM":
        """
        Loads what [`~ModelWrapper.save_pretrained`] wrote, or wraps an MLLM from the Hub or a folder.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): as for the MLLM's own `from_pretrained`.
            gaze_model, processor, gaze_processor (*optional*): as in [`GazeVideoLM`]; those that were saved by default.
            time_embedding (`nn.Module`, *optional*):
                As in [`GazeVideoLM`]. Its saved weights are loaded into it; it may be left out where it was sinusoidal.
            kwargs: arguments of the MLLM's `from_pretrained`, such as `dtype` or `device_map`.

        Raises:
            ValueError: if the folder is of another wrapper, or a time embedding is missing.
        """
        name = pretrained_model_name_or_path
        facts = read_wrapper_file(name, cls, kwargs)
        parts = load_gazing_parts(name, facts, kwargs, gaze_model, processor, gaze_processor)
        embedding = load_time_embedding(name, facts, time_embedding, kwargs)
        return cls(cls._load_wrapped(name, facts, kwargs), **parts, time_embedding=embedding).eval()

    def _save_parts(self, folder: Path) -> dict[str, Any]:
        return {
            **save_gazing_parts(self, folder, self.processor, self.gaze_processor),
            "time_embedding": save_time_embedding(self.time_embedding, folder),
            "settings": self._given,
        }

    @property
    def adapter(self) -> MLLMAdapter:
        """What knows the MLLM's parts."""
        return adapt_mllm(without_peft(self.mllm))

    @property
    def grid(self) -> GazeGrid:
        """What gazes are made for: the patches of the tower, or the places that the MLLM pools them to."""
        return self.vision.grid if self._places is None else self._places

    @property
    def _encoder(self) -> ClipEncoder:
        return ClipEncoder(self.adapter, self.vision, self._pooling, self.time_embedding, self.layout.chunk_frames)

    @property
    def placeholder_id(self) -> int:
        """The token that stands for a video in a prompt."""
        return self.adapter.placeholder_id

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values_videos: Videos | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gaze: GazeOutput | Sequence[GazeOutput] | None = None,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        tiles: tuple[int, int] = (1, 1),
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Calls the MLLM on prompts whose videos are gazed at.

        Args:
            input_ids, pixel_values_videos, attention_mask, labels, gaze:
                As in [`~GazeVideoLM.prepare_inputs`]; without videos the MLLM is called as it is.
            gazing_ratio, task_loss_requirement, tiles, clip_ratio, tokens_per_clip: as in [`~GazeVideoLM.gaze`].
            kwargs: further arguments of the MLLM, such as `pixel_values` of pictures in the same prompts.

        Returns:
            The MLLM's own output. Its `logits` are those of the prompts as they become, see
            [`~GazeVideoLM.prepare_inputs`]; with `labels` it has the `loss`, and the
            `labels` that belong to these logits.

        Raises:
            ValueError: as [`~GazeVideoLM.prepare_inputs`].
        """
        self._check_names(kwargs)
        if not has_videos(self.adapter, input_ids, pixel_values_videos, kwargs):
            return self.mllm(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        starts_padded = attention_mask is not None and not bool(attention_mask[:, 0].all())
        inputs = self.prepare_inputs(
            input_ids,
            pixel_values_videos,
            attention_mask,
            labels,
            gaze,
            gazing_ratio,
            task_loss_requirement,
            tiles,
            padding_side="left" if starts_padded else "right",
            clip_ratio=clip_ratio,
            tokens_per_clip=tokens_per_clip,
        )
        del inputs["input_ids"]
        output = self.mllm(**inputs, **{name: value for name, value in kwargs.items() if value is not None})
        return with_labels(output, inputs.get("labels"))

    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values_videos: Videos | None = None,
        attention_mask: torch.Tensor | None = None,
        gaze: GazeOutput | Sequence[GazeOutput] | None = None,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        tiles: tuple[int, int] = (1, 1),
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Answers prompts whose videos are gazed at, by the MLLM's own `generate`.

        Args:
            input_ids, pixel_values_videos, attention_mask, gaze:
                As in [`~GazeVideoLM.prepare_inputs`]; without videos the MLLM is called as it is.
            gazing_ratio, task_loss_requirement, tiles, clip_ratio, tokens_per_clip: as in [`~GazeVideoLM.gaze`].
            kwargs:
                Arguments of the MLLM's `generate`, such as `max_new_tokens`. Lengths count from `input_ids` as they are given,
                and functions such as a `stopping_criteria` see them so. Options that are not known to give the MLLM's own
                answer on a pruned prompt are refused.

        Returns:
            What the MLLM's `generate` returns: sequences that start with `input_ids` as they were given, whatever length
            the prompts had inside, so that `[:, input_ids.shape[1] :]` are the answers.

        Raises:
            ValueError: as [`~GazeVideoLM.prepare_inputs`], and if an option is refused.
        """
        if not has_videos(self.adapter, input_ids, pixel_values_videos, kwargs):
            return self.mllm.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        check_generation_options(self.generation_config, kwargs, ("pixel_values", "image_sizes"))
        inputs = self.prepare_inputs(
            input_ids,
            pixel_values_videos,
            attention_mask,
            gaze=gaze,
            gazing_ratio=gazing_ratio,
            task_loss_requirement=task_loss_requirement,
            tiles=tiles,
            padding_side="left",
            clip_ratio=clip_ratio,
            tokens_per_clip=tokens_per_clip,
        )
        length = inputs["input_ids"].shape[1]
        options = fit_generation_options(self.generation_config, kwargs, input_ids, length)
        return sequences_as_given(self.mllm.generate(**inputs, **options), input_ids, length)

    def prepare_inputs(
        self,
        input_ids: torch.Tensor,
        pixel_values_videos: Videos,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gaze: GazeOutput | Sequence[GazeOutput] | None = None,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        tiles: tuple[int, int] = (1, 1),
        padding_side: str = "right",
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Puts the gazed patches of videos into prompts.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Prompts. A token `placeholder_id`, or any number of them in a row as the MLLM's processor writes, stands
                for one video; between two videos there is other text. A row may have none.
            pixel_values_videos (`torch.FloatTensor` of shape `(videos, frames, channels, height, width)`, or a sequence of `(frames, channels, height, width)`):
                The videos in the order in which the prompts name them, row by row, normalised for the MLLM. They may
                differ in length and size.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 where a prompt is padded.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to learn, -100 elsewhere.
            gaze ([`GazeOutput`] or a sequence of them, *optional*):
                What to keep, over all videos, or one gaze per video: made for the scales and patch size of
                [`~GazeVideoLM.grid`], or for whole tiles of it, which the frames are then cut into. Without it the
                gaze model chooses.
            gazing_ratio, task_loss_requirement, tiles, clip_ratio, tokens_per_clip: as in [`~GazeVideoLM.gaze`].
            padding_side (`str`, *optional*, defaults to `"right"`): where prompts of unequal length are padded.

        Returns:
            `dict` with `inputs_embeds` of shape `(batch, new length, hidden_size)`, `attention_mask`, `input_ids`, with a
            placeholder for every embedding of a video, and, if they were given, `labels`, which ignore those.

        Raises:
            ValueError: if no prompt has a placeholder, there are not as many as videos, or a gaze or frames do not fit.
        """
        videos = list_videos(pixel_values_videos)
        count = sum(map(len, find_placeholders(input_ids, self.placeholder_id, attention_mask)))
        if count != len(videos):
            raise ValueError(
                f"`input_ids` must name each of the {len(videos)} videos by the token {self.placeholder_id}, or by "
                f"several in a row, with other tokens between two videos; got {count or 'no'} video placeholders"
            )
        if gaze is None:
            gaze = self.gaze(videos, gazing_ratio, task_loss_requirement, tiles, clip_ratio, tokens_per_clip)
        # A placeholder need not be in the vocabulary, and is replaced anyway.
        words = input_ids.masked_fill(input_ids == self.placeholder_id, 0)
        return fill_placeholders(
            input_ids,
            self.mllm.get_input_embeddings()(words),
            self.placeholder_id,
            self.embed_videos(videos, gaze),
            attention_mask,
            labels,
            padding_side,
            getattr(self.mllm.config.get_text_config(), "pad_token_id", None) or 0,
        )

    def gaze(
        self,
        pixel_values_videos: Videos,
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        tiles: tuple[int, int] = (1, 1),
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
    ) -> list[GazeOutput]:
        """
        Gazes at videos. Where no ratio, threshold or budget is given, the gaze model's configuration decides.

        Args:
            pixel_values_videos: as in [`~GazeVideoLM.prepare_inputs`].
            gazing_ratio, task_loss_requirement (`float` or sequence of `float`, *optional*):
                As in [`~GazeSelector.generate`], for every frame or, with a gaze model of fixed scales, for every tile; a
                sequence names one value per frame of a chunk, and every chunk takes it from its start.
            tiles (`tuple[int, int]`, *optional*, defaults to `(1, 1)`):
                Rows and columns of tiles to cut every frame into; each is as large as the tower's finest scale.
            clip_ratio (`float`, *optional*):
                Share of the patches of the finest scale, over the whole of each video, to keep where they gain most,
                for gaze models that know gains.
            tokens_per_clip (`int`, *optional*): the same as a number of patches.

        Returns:
            `list[GazeOutput]`, one per video, a batch of one over whole frames; ids ascend inside a frame.

        Raises:
            ValueError: if there is no gaze model or processor, or an argument does not fit the frames.
        """
        if self._gazer is None:
            raise ValueError("`gaze` must be given where the model was made without `gaze_model` and `processor`")
        videos = list_videos(pixel_values_videos)
        if tuple(tiles) == (1, 1):
            videos = [self._encoder.crop(video) for video in videos]
        return self._gazer.gaze(
            videos, gazing_ratio, task_loss_requirement, tiles, clip_ratio=clip_ratio, tokens_per_clip=tokens_per_clip
        )

    def count_tokens(self, gaze: GazeOutput | Sequence[GazeOutput]) -> list[tuple[int, int]]:
        """
        Counts what the language model reads of videos, as it sees them.

        Args:
            gaze: as in [`~GazeVideoLM.prepare_inputs`].

        Returns:
            `list[tuple[int, int]]`, one per video: the tokens that the gaze makes of it, separators, thumbnails, CLS tokens
            and new lines included, and those that the MLLM itself makes of all its frames, after its own pooling.
        """
        return self.layout.count_tokens(list_gazes(gaze), self.grid, self.vision, self.adapter, self.separator)

    def embed_videos(self, pixel_values_videos: Videos, gaze: GazeOutput | Sequence[GazeOutput]) -> list[torch.Tensor]:
        """
        Encodes and projects the gazed patches of videos, chunk by chunk.

        Args:
            pixel_values_videos, gaze: as in [`~GazeVideoLM.prepare_inputs`].

        Returns:
            `list[torch.FloatTensor]`, one per video, of shape `(tokens, hidden_size)`: what the language model gets in
            its place. That is one token per kept patch, the CLS tokens if the MLLM uses them, what separates chunks,
            and the new line that ends every video of LLaVA-OneVision.

        Raises:
            ValueError: if a gaze is not for this tower or these frames.
        """
        videos = list_videos(pixel_values_videos)
        gazes = list_gazes(gaze)
        if len(gazes) != len(videos):
            raise ValueError(f"`gaze` must be one for each of the {len(videos)} videos, got {len(gazes)}")
        max_frames = getattr(self.time_embedding, "num_embeddings", None)
        for number, (video, one) in enumerate(zip(videos, gazes, strict=True)):
            check_gaze(number, video, one, self.grid, self.layout.chunk_frames, max_frames)
        encoder = self._encoder
        encoded = [
            encoder.encode(clips, cache)
            for batches in self.layout.cut(videos, gazes, self.grid, self.vision)
            for cache in [GazeVisionCache() if len(batches) > 1 else None]
            for clips in batches
        ]
        pieces: list[list[torch.Tensor]] = [[] for _ in videos]
        if encoded:
            places = TokenPlaces(*(torch.cat(keys) for keys in zip(*(places for _, places in encoded), strict=True)))
            order, parts = order_tokens(places, self.layout.order)
            tokens = torch.cat([tokens for tokens, _ in encoded])[order]
            between = embed_separator(self.separator, self.adapter, self.mllm.get_input_embeddings())
            for (number, _), part in zip(parts, tokens.split([count for _, count in parts]), strict=True):
                pieces[number] += [between.to(part), part] if pieces[number] and between is not None else [part]
        if self.adapter.ends_with_newline:
            for parts in pieces:
                parts.append(self.adapter.newline[None])
        nothing = torch.zeros(0, self.mllm.config.get_text_config().hidden_size)
        return [torch.cat([part.to(parts[0]) for part in parts]) if parts else nothing for parts in pieces]
