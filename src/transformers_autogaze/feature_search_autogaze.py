"""The search on a canvas of feature vectors instead of pixels; `feature_gaze_autogaze` computes the vectors."""

import torch

from .canvas_measures_autogaze import MeasuringSearch
from .canvas_search_autogaze import Canvas


class FeatureSearch(MeasuringSearch):
    """
    Chooses patches by the squared distance of feature vectors, one for every place.

    Clips have the shape `(batch, frames, scales, channels, rows, columns)`: the vectors of every place as seen at each scale,
    coarse to fine, in rows and columns of the finest scale or of cells. Vectors must be centred, as the canvas is zero at
    first, and lie in -0.5..0.5.

    Args:
        grid ([`GazeGrid`]): scales and patches.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.feature_search_autogaze import FeatureSearch

    >>> vectors = torch.zeros(1, 2, 1, 4, 2, 2)
    >>> vectors[0, 1, 0, :, 1, 0] = 0.5  # the third place changes in the second frame
    >>> FeatureSearch(GazeGrid([32])).search_clip(vectors, torch.tensor([5])).ids.tolist()
    [[[0, 1, 3, 2], [2, -1, -1, -1]]]

    ```
    """

    def start_canvas(self, frames: torch.Tensor) -> Canvas:
        """Returns the initial canvas, which is zero, the mean of the vectors."""
        return Canvas(
            frames.new_zeros(len(frames), frames.shape[3], *self.cells),
            torch.ones(len(frames), *self.cells, dtype=torch.bool, device=frames.device),
        )

    def _render(self, frame: torch.Tensor) -> list[torch.Tensor]:
        """Expands vectors `(batch, scales, channels, rows, columns)` to cells, for each scale."""
        batch, scales, channels, rows, cols = frame.shape
        if (rows, cols) != self.cells:
            frame = frame[:, :, :, :, None, :, None].expand(
                -1, -1, -1, -1, self.cells[0] // rows, -1, self.cells[1] // cols
            )
            frame = frame.reshape(batch, scales, channels, *self.cells)
        return list(frame.unbind(1))
