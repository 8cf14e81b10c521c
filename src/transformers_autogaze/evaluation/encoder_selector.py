"""
A reference selector that searches on the encoder's own features, as if a network predicted them perfectly.

It runs the whole encoder before it chooses, so it saves no computation.
"""

import torch

from ..feature_search_autogaze import FeatureSearch
from ..gazing_autogaze import GazeOutput
from ..integrations.vision import GazeVisionModel
from .feature_selectors import EVENLY, ClipSelector, EncodedClip, spread_evenly


class EncoderClipSelector(ClipSelector):
    """
    Keeps the patches whose features are farthest from those of the canvas at their places.

    The features of a patch are those of the whole frame, encoded at the scale of the patch.

    Args:
        tower ([`GazeVisionModel`]): the encoder, with the scales of the patches to choose from.
    """

    def __init__(self, tower: GazeVisionModel):
        super().__init__(tower.grid)
        self.tower = tower
        self._search = FeatureSearch(tower.grid)

    def prepare(self, clip: EncodedClip) -> torch.Tensor:
        frames, maps = clip.encoder_values, []
        for scale, (rows, cols) in enumerate(self.grid.grids):
            gaze = GazeOutput.full(self.grid, 1, len(frames), scale)
            features = self.tower(frames[None], gaze, attention="frame").last_hidden_state.float()
            features = features.view(len(frames), rows, cols, -1).permute(0, 3, 1, 2)
            for axis, count in ((2, rows), (3, cols)):
                features = features.repeat_interleave(self._search.cells[axis - 2] // count, dim=axis)
            maps.append(features)
        stacked = torch.stack(maps, dim=1)
        stacked = stacked - stacked[:, -1].mean((0, 2, 3))[:, None, None]
        return (stacked / (2 * stacked.abs().amax()).clamp(min=1e-12))[None]

    def gaze(self, prepared: torch.Tensor, num_tokens: int, allocation: str) -> GazeOutput:
        if allocation == EVENLY:
            counts = spread_evenly(num_tokens, prepared.shape[1], self.grid.num_patches)
            ids = self._search.search_frames(prepared, counts).ids
        else:
            ids = self._search.search_clip(prepared, torch.tensor([num_tokens])).ids
        padding_id = self.grid.num_patches
        kept = torch.zeros(*ids.shape[:2], padding_id + 1, dtype=torch.bool, device=ids.device)
        kept = kept.scatter_(2, ids.where(ids >= 0, padding_id), True)[..., :-1]
        return GazeOutput.from_masks(self.grid.split_by_scale(kept), self.grid)
