"""The tower, pooling and projector of an MLLM of the LLaVA family, on the kept patches of clips."""

import torch
from torch import nn

from ..gazing_autogaze import GazeOutput
from .mllm_adapters import MLLMAdapter
from .place_pooling import PlacePooling
from .video_tokens import TokenPlaces, VideoClip
from .vision import GazeVisionModel
from .vision_cache import GazeVisionCache


class ClipEncoder:
    """
    Encodes and projects the kept patches of clips.

    Args:
        adapter ([`MLLMAdapter`]): finds the MLLM's modules.
        vision ([`GazeVisionModel`]): its tower.
        pooling ([`PlacePooling`], *optional*): if masks are of pooled places, pools their patches.
        time_embedding (`nn.Module`, *optional*): maps frame numbers to vectors that are added to tokens.
        chunk_frames (`int`): frames of a chunk.
    """

    def __init__(
        self,
        adapter: MLLMAdapter,
        vision: GazeVisionModel,
        pooling: PlacePooling | None,
        time_embedding: nn.Module | None,
        chunk_frames: int,
    ):
        self.adapter, self.vision, self.pooling = adapter, vision, pooling
        self.time_embedding, self.chunk_frames = time_embedding, chunk_frames

    def crop(self, frames: torch.Tensor) -> torch.Tensor:
        """Crops frames `(.., height, width)` of the tower's image size to whole patches, as the tower itself does."""
        tower, (height, width) = self.vision.adapter, self.vision.grid.sizes[-1]
        size = (tower.image_size,) * 2 if isinstance(tower.image_size, int) else tuple(tower.image_size)
        is_native = self.vision.grid.grids[-1] == tower.native_grid and tuple(frames.shape[-2:]) == size
        return frames[..., :height, :width] if is_native else frames

    def encode(self, clips: list[VideoClip], cache: GazeVisionCache | None) -> tuple[torch.Tensor, TokenPlaces]:
        """
        Encodes clips of one shape.

        Args:
            clips (`list[VideoClip]`): the clips.
            cache ([`GazeVisionCache`], *optional*): the cache of earlier chunks of the same tiles.

        Returns:
            `tuple`: tokens `(tokens, hidden_size)`, unordered, and their [`TokenPlaces`].
        """
        adapter, device = self.adapter, self.adapter.mllm.device
        frames = self.crop(torch.stack([clip.frames for clip in clips]))
        if device.type != "meta":  # if accelerate has offloaded the weights
            frames = frames.to(device)
        masks = [torch.stack(parts).to(frames.device) for parts in zip(*(clip.masks for clip in clips), strict=True)]
        patch_masks = masks if self.pooling is None else [self.pooling.patches_of(masks[0])]
        gaze = GazeOutput.from_masks(patch_masks, self.vision.grid)
        output = self.vision(frames, gaze, output_hidden_states=True, cache=cache)
        clip = torch.arange(len(clips), device=frames.device).repeat_interleave(output.lengths)
        features = torch.cat([output.hidden_states[layer] for layer in adapter.feature_layers], dim=-1)
        # Frames are counted over all clips.
        tokens, frame, ids = self._project(features, clip * frames.shape[1] + output.frame, output.ids, masks)

        if output.prefix_hidden_states is not None:
            prefix = torch.cat([output.prefix_hidden_states[layer] for layer in adapter.feature_layers], dim=-1)
            prefix = prefix[:, :, 0 if adapter.keeps_cls else 1 :].flatten(0, 1)
            kept_frames, count = torch.cat(masks, dim=-1).any(-1).flatten().nonzero().flatten(), prefix.shape[1]
            tokens = torch.cat([tokens, adapter.projector(prefix[kept_frames].flatten(0, 1)).to(tokens)])
            frame = torch.cat([frame, kept_frames.repeat_interleave(count)])
            ids = torch.cat([ids, torch.arange(-count, 0, device=ids.device).repeat(len(kept_frames))])
        frame_numbers = torch.cat([clip.frame_numbers for clip in clips]).to(frames.device)[frame]
        if self.time_embedding is not None:
            tokens = tokens + self.time_embedding(frame_numbers).to(tokens)
        places = torch.tensor([(clip.video, clip.tile) for clip in clips], device=frames.device)
        video, tile = places[frame // frames.shape[1]].unbind(1)
        return tokens, TokenPlaces(video, frame_numbers // self.chunk_frames, tile, frame_numbers, ids)

    def _project(
        self, features: torch.Tensor, frame: torch.Tensor, ids: torch.Tensor, masks: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pools features, if the MLLM does, and projects them; returns the tokens, their frames and their ids."""
        if self.pooling is None:
            return self.adapter.projector(features).to(frame.device), frame, ids
        is_kept = masks[0].flatten(0, 1)
        if self.adapter.pools_features:
            features, frame, ids = self.pooling.pool(features, frame, ids, is_kept)
            return self.adapter.projector(features).to(frame.device), frame, ids
        return self.pooling.pool(self.adapter.projector(features).to(frame.device), frame, ids, is_kept)
