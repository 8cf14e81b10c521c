"""
Choosing patches by the very features that an encoder makes of them: what a selector could do that foresees features.

This module makes a canvas search of an encoder's features. As it runs the whole encoder first, it saves nothing; it is there
to be compared with.
"""

import torch

from ..feature_search_autogaze import FeatureSearch
from ..gazing_autogaze import GazeOutput
from ..integrations.vision import GazeVisionModel
from .feature_selectors import EVENLY, ClipSelector, EncodedClip, spread_evenly


class EncoderClipSelector(ClipSelector):
    """
    Keeps the patches whose features are farthest from what stands at their places.

    What a patch stands for is the feature that the encoder gives it when it sees the whole frame at the scale of the patch.

    Args:
        tower ([`GazeVisionModel`]): the encoder; its scales are those that patches are chosen at.
    """

    def __init__(self, tower: GazeVisionModel):
        super().__init__(tower.grid)
        self.tower = tower
        self._search = FeatureSearch(tower.grid)

    def prepare(self, clip: EncodedClip) -> torch.Tensor:
        frames, layers = clip.encoder_values, []
        for scale, (rows, cols) in enumerate(self.grid.grids):
            gaze = GazeOutput.full(self.grid, 1, len(frames), scale)
            features = self.tower(frames[None], gaze, attention="frame").last_hidden_state.float()
            features = features.view(len(frames), rows, cols, -1).permute(0, 3, 1, 2)
            for axis, count in ((2, rows), (3, cols)):
                features = features.repeat_interleave(self._search.cells[axis - 2] // count, dim=axis)
            layers.append(features)
        layers = torch.stack(layers, dim=1)
        layers = layers - layers[:, -1].mean((0, 2, 3))[:, None, None]
        return (layers / (2 * layers.abs().amax()).clamp(min=1e-12))[None]

    def gaze(self, prepared: torch.Tensor, num_tokens: int, spending: str) -> GazeOutput:
        if spending == EVENLY:
            counts = spread_evenly(num_tokens, prepared.shape[1], self.grid.num_patches)
            ids = self._search.search_frames(prepared, counts).ids
        else:
            ids = self._search.search_clip(prepared, torch.tensor([num_tokens])).ids
        last = self.grid.num_patches
        kept = torch.zeros(*ids.shape[:2], last + 1, dtype=torch.bool, device=ids.device)
        kept = kept.scatter_(2, ids.where(ids >= 0, last), True)[..., :-1]
        return GazeOutput.from_masks(self.grid.split_by_scale(kept), self.grid)
