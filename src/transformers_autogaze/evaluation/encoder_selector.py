"""
Choosing patches by the very features that an encoder makes of them: what a selector could do that foresees features.

This module makes a canvas search of an encoder's features. As it runs the whole encoder first, it saves nothing; it is there
to be compared with.
"""

from collections.abc import Sequence

import torch

from ..canvas_search_autogaze import Canvas, CanvasSearch
from ..gazing_autogaze import GazeOutput
from ..integrations.vision import GazeVisionModel
from .feature_selectors import EVENLY, ClipSelector, EncodedClip, spread_evenly


class FeatureSearch(CanvasSearch):
    """
    The search on a canvas of features: clips are `(batch, frames, scales, channels, *cells)`, features by cell.

    Features are to have their mean removed, which is what the canvas shows at first, and to lie in -0.5..0.5.
    """

    def start_canvas(self, frames: torch.Tensor) -> Canvas:
        """Gives a canvas that shows the mean feature, on which nothing was kept yet."""
        return Canvas(
            torch.zeros_like(frames[:, 0, 0]),
            torch.ones(len(frames), *self.cells, dtype=torch.bool, device=frames.device),
        )

    def _render(self, frame: torch.Tensor) -> list[torch.Tensor]:
        return list(frame.unbind(1))

    def search_evenly(self, frames: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """
        Chooses a number of patches of every frame.

        Args:
            frames (`torch.FloatTensor` of shape `(1, frames, scales, channels, *cells)`): a clip.
            counts (`Sequence[int]`): patches of each frame.

        Returns:
            `torch.BoolTensor` of shape `(1, frames, patches)`: true where a patch is kept.
        """
        canvas, kept = self.start_canvas(frames), []
        # Each frame has its own budget, so a place where nothing was kept counts with its distance to the mean.
        canvas = canvas._replace(is_empty=torch.zeros_like(canvas.is_empty))
        for frame, count in zip(frames.split(1, dim=1), counts, strict=True):
            kept.append(torch.zeros(1, 1, self.grid.num_patches + 1, dtype=torch.bool, device=frames.device))
            if count:
                ids, _, canvas = self.search_clip(frame, torch.tensor([count]), canvas=canvas)
                kept[-1].scatter_(2, ids.where(ids >= 0, self.grid.num_patches), True)
        return torch.cat(kept, dim=1)[..., :-1]

    def search_over_time(self, frames: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Chooses patches of a whole clip, where they gain most; takes and gives what `search_evenly` does."""
        ids = self.search_clip(frames, torch.tensor([num_tokens])).ids
        last = self.grid.num_patches
        kept = torch.zeros(*ids.shape[:2], last + 1, dtype=torch.bool, device=ids.device)
        return kept.scatter_(2, ids.where(ids >= 0, last), True)[..., :-1]


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
            kept = self._search.search_evenly(prepared, counts)
        else:
            kept = self._search.search_over_time(prepared, num_tokens)
        return GazeOutput.from_masks(self.grid.split_by_scale(kept), self.grid)
