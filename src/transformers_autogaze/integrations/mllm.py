"""
[`GazeVideoLM`]: video MLLMs of the LLaVA family on the kept patches of videos.

It turns frames into the embeddings of a prompt. A selector chooses the patches, [`GazeVisionModel`] encodes them,
`mllm_adapters` finds the modules of each MLLM, and the MLLM itself generates.
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
from ..video.tiles import Setting
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .encoder_gazing import EncoderFrameGazer
from .generation_options import check_generation_options, generate_on_pruned_prompts
from .mllm_adapters import MLLMAdapter, adapt_mllm
from .mllm_encoding import ClipEncoder
from .mllm_layout import VideoLayout, check_separator, embed_separator, has_videos
from .normalization import normalizing_part
from .place_pooling import PlacePooling
from .prompts import fill_placeholders, find_placeholders, padding_side_of, with_labels
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


_CHUNK_FRAMES = 16  # for selectors without a maximum


class GazeVideoLM(ModelWrapper):
    """
    Wraps a video MLLM of the LLaVA family, which then reads only the kept patches of videos.

    It gazes at videos, encodes the kept patches with the MLLM's own vision tower, projects them with its own projector,
    replaces the placeholders in the prompt by one embedding per patch, and calls the MLLM. Modules and weights are the
    MLLM's, unchanged.

    If the MLLM pools the patches of a frame to fewer places, the selector chooses among these places: the tower encodes the
    patches of the kept ones, and the MLLM's own pooling makes one embedding of each. At `scales` other than the tower's own,
    or if the pooling is not a weighted mean, the selector chooses among patches, and none are pooled.
    [`~GazeVideoLM.count_tokens`] counts the tokens that the language model reads, and those of the whole video.

    `generate` answers prompts; `forward` returns logits and, with labels, the training loss. Values per frame are for the
    frames that the selector gazes at.

    Args:
        mllm ([`~transformers.PreTrainedModel`]):
            A `LlavaForConditionalGeneration`, `LlavaNextVideoForConditionalGeneration`,
            `LlavaOnevisionForConditionalGeneration`, `VideoLlavaForConditionalGeneration` or
            `VipLlavaForConditionalGeneration`. Its configuration determines the layers of the features and, unless the MLLM
            ignores that setting, whether the CLS token is used.
        gaze_model ([`GazeSelector`], *optional*):
            The selector, such as [`GreedyGazeSelector`] or [`AutoGazeModel`]. Not needed if every call is given a `gaze`.
        processor (*optional*):
            The processor, video processor or image processor that normalised the frames for the MLLM, needed to convert
            them for the selector. Not needed if every call is given a `gaze`.
        gaze_processor ([`AutoGazeVideoProcessor`], *optional*):
            Normalises the selector's frames; by default with the published settings.
        scales (`Sequence[int | tuple[int, int]]`, *optional*):
            As in [`GazeVisionModel`]: by default the tower's own scale, pooled as the MLLM does, or, with a gaze model of
            fixed scales, these, matched to the tower.
        attention (`str`, *optional*):
            As in [`GazeVisionModel`]: by default `"canvas"` at one scale and `"block_causal"` at several.
        chunk_frames (`int`, *optional*):
            Frames that are gazed at and encoded together; by default `gaze_model.config.max_num_frames`, or 16. A gaze
            model without a maximum, and `"canvas"` attention, carry a state from chunk to chunk; for others each chunk is a
            clip of its own.
        max_batch_size (`int`, *optional*, defaults to 16):
            Clips (a tile over a chunk) in a batch of the selector or the tower. It limits memory and changes no result.
        order (`str`, *optional*, defaults to `"time"`):
            `"time"`: all tiles of a frame come before the next frame. `"tile"`: all frames of a tile, inside its
            chunk, come before the next tile. Inside a frame, patches are sorted from coarse to fine and row by row.
        separator (`int`, `Sequence[int]` or `"image_newline"`, *optional*):
            Inserted between the chunks of a video, with `order="tile"` between its clips: ids of text tokens, or the MLLM's
            own embedding of a new line. Nothing by default.
        thumbnail_interval (`int`, *optional*):
            Interval, in frames, at which the whole frame is added before its tiles, with all patches of the finest scale.
            No frame by default.
        time_embedding (`nn.Module`, *optional*):
            Maps the frame numbers of tokens, a `torch.LongTensor` of shape `(tokens,)`, to vectors that are added to their
            embeddings: a [`SinusoidalTimeEmbedding`], or an `nn.Embedding` to be trained. None by default.

    Raises:
        ValueError: if the MLLM is of another type, or an argument is out of range or does not fit the MLLM.

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
    mllm: Any  # an MLLM with `generate`, or its `PeftModel`

    def __init__(
        self,
        mllm: PreTrainedModel,
        gaze_model: GazeSelector | None = None,
        processor: Any = None,
        gaze_processor: AutoGazeVideoProcessor | None = None,
        scales: Sequence[int | tuple[int, int]] | None = None,
        attention: str | None = None,
        chunk_frames: int | None = None,
        max_batch_size: int = 16,
        order: str = "time",
        separator: int | Sequence[int] | str | None = None,
        thumbnail_interval: int | None = None,
        time_embedding: nn.Module | None = None,
    ):
        super().__init__()
        self._settings = {
            "scales": scales,
            "attention": attention,
            "order": order,
            "separator": separator,
            "chunk_frames": chunk_frames,
            "max_batch_size": max_batch_size,
            "thumbnail_interval": thumbnail_interval,
        }
        adapter = adapt_mllm(without_peft(mllm))
        tower = adapter.tower
        if scales is None and gaze_model is not None and not gaze_model.takes_any_grid:
            scales = gaze_model.config.grid.for_encoder(tower.config.image_size, tower.config.patch_size).scales
        # The tower is a submodule of `mllm`. If it were registered here as well, its weights would be saved twice.
        self.__dict__["vision"] = GazeVisionModel(tower, scales=scales, attention=attention)
        self.mllm, self.gaze_model, self.time_embedding = mllm, gaze_model, time_embedding
        self._pooling = self._pooled_grid = None
        weights = adapter.pooling_weights() if scales is None else None
        if weights is not None:
            self._pooling, (height, _) = PlacePooling(weights), self.vision.grid.sizes[-1]
            rows, cols = adapter.pool_grid(*self.vision.adapter.native_grid)
            self._pooled_grid = GazeGrid([(rows * (height // rows), cols * (height // rows))], height // rows)

        if chunk_frames is None:
            chunk_frames = (None if gaze_model is None else gaze_model.config.max_num_frames) or _CHUNK_FRAMES
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
        Loads what [`~ModelWrapper.save_pretrained`] saved, or wraps an MLLM from the Hub or a folder.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): as for the MLLM's own `from_pretrained`.
            gaze_model, processor, gaze_processor (*optional*): as in [`GazeVideoLM`]; by default those that were saved.
            time_embedding (`nn.Module`, *optional*):
                As in [`GazeVideoLM`]. The saved weights are loaded into it. Not needed if it was sinusoidal.
            kwargs: arguments of the MLLM's `from_pretrained`, such as `dtype` or `device_map`.

        Raises:
            ValueError: if another wrapper was saved, or a time embedding is missing.
        """
        name = pretrained_model_name_or_path
        wrapper_config = read_wrapper_file(name, cls, kwargs)
        parts = load_gazing_parts(name, wrapper_config, kwargs, gaze_model, processor, gaze_processor)
        time_embedding = load_time_embedding(name, wrapper_config, time_embedding, kwargs)
        return cls(cls._load_wrapped(name, wrapper_config, kwargs), **parts, time_embedding=time_embedding).eval()

    def _save_parts(self, folder: Path) -> dict[str, Any]:
        return {
            **save_gazing_parts(self, folder, self.processor, self.gaze_processor),
            "time_embedding": save_time_embedding(self.time_embedding, folder),
            "settings": self._settings,
        }

    @property
    def adapter(self) -> MLLMAdapter:
        """The adapter that finds the MLLM's modules."""
        return adapt_mllm(without_peft(self.mllm))

    @property
    def grid(self) -> GazeGrid:
        """The grid of gazes: the patches of the tower, or the places that the MLLM pools them to."""
        return self.vision.grid if self._pooled_grid is None else self._pooled_grid

    @property
    def _encoder(self) -> ClipEncoder:
        return ClipEncoder(self.adapter, self.vision, self._pooling, self.time_embedding, self.layout.chunk_frames)

    @property
    def placeholder_id(self) -> int:
        """The placeholder token of a video in a prompt."""
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
        Calls the MLLM on prompts with the kept patches of their videos.

        Args:
            input_ids, pixel_values_videos, attention_mask, labels, gaze:
                As in [`~GazeVideoLM.prepare_inputs`]; without videos the MLLM is called with unchanged inputs.
            gazing_ratio, task_loss_requirement, tiles, clip_ratio, tokens_per_clip: as in [`~GazeVideoLM.gaze`].
            kwargs: further arguments of the MLLM, such as `pixel_values` of images in the same prompts.

        Returns:
            The MLLM's own output. Its `logits` are those of the new prompts, see [`~GazeVideoLM.prepare_inputs`]; with
            `labels` it has the `loss`, and the `labels` of these logits.

        Raises:
            ValueError: as [`~GazeVideoLM.prepare_inputs`].
        """
        self._check_names(kwargs)
        if not has_videos(self.adapter, input_ids, pixel_values_videos, kwargs):
            return self.mllm(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        inputs = self.prepare_inputs(
            input_ids,
            pixel_values_videos,
            attention_mask,
            labels,
            gaze,
            gazing_ratio,
            task_loss_requirement,
            tiles,
            padding_side=padding_side_of(attention_mask),
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
        Answers prompts with the MLLM's own `generate` on the kept patches of their videos.

        Args:
            input_ids, pixel_values_videos, attention_mask, gaze:
                As in [`~GazeVideoLM.prepare_inputs`]; without videos the MLLM is called with unchanged inputs.
            gazing_ratio, task_loss_requirement, tiles, clip_ratio, tokens_per_clip: as in [`~GazeVideoLM.gaze`].
            kwargs:
                Arguments of the MLLM's `generate`, such as `max_new_tokens`. Lengths, and callbacks such as
                `stopping_criteria`, refer to `input_ids`. Options that are not known to give the MLLM's own answer on a
                pruned prompt are refused.

        Returns:
            What the MLLM's `generate` returns. Its sequences start with `input_ids`, whatever the lengths of the pruned
            prompts, so that `[:, input_ids.shape[1] :]` are the answers.

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
        return generate_on_pruned_prompts(self.mllm, inputs, kwargs, input_ids)

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
        Replaces the placeholders of videos in prompts by the embeddings of the kept patches.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Prompts. One token `placeholder_id`, or several in a row as the MLLM's processor returns them, is the
                placeholder of one video; there is other text between two videos. A prompt may have none.
            pixel_values_videos (`torch.FloatTensor` of shape `(videos, frames, channels, height, width)`, or a sequence of `(frames, channels, height, width)`):
                The videos in the order of their placeholders, prompt by prompt, normalised for the MLLM. Their lengths and
                sizes may differ.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 where a prompt is padded.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to learn, -100 elsewhere.
            gaze ([`GazeOutput`] or a sequence of them, *optional*):
                The kept patches: one batch for all videos, or one gaze per video, on [`~GazeVideoLM.grid`], or on whole
                tiles of it, which the frames are then cut into. By default the gaze model chooses them.
            gazing_ratio, task_loss_requirement, tiles, clip_ratio, tokens_per_clip: as in [`~GazeVideoLM.gaze`].
            padding_side (`str`, *optional*, defaults to `"right"`): where prompts of unequal length are padded.

        Returns:
            `dict` with `inputs_embeds` of shape `(batch, new length, hidden_size)`, `attention_mask`, `input_ids`, with a
            placeholder for every embedding of a video, and, if labels are given, `labels`, which are -100 for these.

        Raises:
            ValueError: if the numbers of placeholders and videos differ, or a gaze or frames do not fit.
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
        # A placeholder may lie outside the vocabulary; its embedding is replaced anyway.
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
        Gazes at videos. Without a ratio, threshold or budget, those of the gaze model's configuration are used.

        Args:
            pixel_values_videos: as in [`~GazeVideoLM.prepare_inputs`].
            gazing_ratio, task_loss_requirement (`float` or sequence of `float`, *optional*):
                As in [`~GazeSelector.generate`], for every frame or, with a gaze model of fixed scales, for every tile. A
                sequence has one value for each frame of a chunk, and applies to every chunk from its start.
            tiles (`tuple[int, int]`, *optional*, defaults to `(1, 1)`):
                Rows and columns of tiles to cut every frame into; each is resized to the tower's finest scale.
            clip_ratio (`float`, *optional*):
                Share of the patches of the finest scale of each whole video to keep: those with the largest gains. Only for
                gaze models that compute gains.
            tokens_per_clip (`int`, *optional*): the same as a number of patches.

        Returns:
            `list[GazeOutput]`, one per video, a batch of one over whole frames, with ascending ids inside a frame.

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
        Counts the tokens of videos that the language model reads.

        Args:
            gaze: as in [`~GazeVideoLM.prepare_inputs`].

        Returns:
            `list[tuple[int, int]]`: for each video, the number of tokens with this gaze, including separators, thumbnails, CLS
            tokens and new lines, and the number of tokens that the MLLM itself makes of all frames, after its own pooling.
        """
        return self.layout.count_tokens(list_gazes(gaze), self.grid, self.vision, self.adapter, self.separator)

    def embed_videos(self, pixel_values_videos: Videos, gaze: GazeOutput | Sequence[GazeOutput]) -> list[torch.Tensor]:
        """
        Encodes and projects the kept patches of videos, chunk by chunk.

        Args:
            pixel_values_videos, gaze: as in [`~GazeVideoLM.prepare_inputs`].

        Returns:
            `list[torch.FloatTensor]`, one per video, of shape `(tokens, hidden_size)`: its embeddings for the language model.
            These are one token per kept patch, the CLS tokens if the MLLM uses them, the separators between chunks, and the
            new line that ends every video of LLaVA-OneVision.

        Raises:
            ValueError: if a gaze does not fit the tower or the frames.
        """
        videos = list_videos(pixel_values_videos)
        gazes = list_gazes(gaze)
        if len(gazes) != len(videos):
            raise ValueError(f"`gaze` must be one for each of the {len(videos)} videos, got {len(gazes)}")
        max_frames = getattr(self.time_embedding, "num_embeddings", None)
        for index, (video, video_gaze) in enumerate(zip(videos, gazes, strict=True)):
            check_gaze(index, video, video_gaze, self.grid, self.layout.chunk_frames, max_frames)
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
            order, counts = order_tokens(places, self.layout.order)
            tokens = torch.cat([tokens for tokens, _ in encoded])[order]
            separator = embed_separator(self.separator, self.adapter, self.mllm.get_input_embeddings())
            for (index, _), part in zip(counts, tokens.split([count for _, count in counts]), strict=True):
                pieces[index] += [separator.to(part), part] if pieces[index] and separator is not None else [part]
        if self.adapter.ends_with_newline:
            for parts in pieces:
                parts.append(self.adapter.newline[None])
        empty = torch.zeros(0, self.mllm.config.get_text_config().hidden_size)
        return [torch.cat([part.to(parts[0]) for part in parts]) if parts else empty for parts in pieces]
