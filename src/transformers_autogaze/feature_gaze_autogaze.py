"""
The selector that is distilled from an encoder: it keeps the patches whose features differ from those kept before.

It combines the network of `feature_network_autogaze` with the search of `feature_search_autogaze`.
"""

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .canvas_measures_autogaze import MeasuringSearch  # noqa: F401 (see modeling_autogaze)
from .canvas_search_autogaze import Canvas  # noqa: F401
from .canvas_selection_autogaze import CanvasGazeCache, CanvasGazeSelector
from .cells_autogaze import CellTables  # noqa: F401
from .clip_schedule_autogaze import ClipSchedule  # noqa: F401
from .configuration_autogaze import GazeSelectorConfig  # noqa: F401
from .cuda_graphs_autogaze import ReplayedCall  # noqa: F401
from .feature_network_autogaze import STRIDE, FeatureGazeConfig, FeatureGazeNetwork
from .feature_search_autogaze import FeatureSearch
from .gaze_batches_autogaze import stack_gazes  # noqa: F401
from .gaze_files_autogaze import save_gaze  # noqa: F401
from .gaze_pictures_autogaze import paint_gaze  # noqa: F401
from .gazing_autogaze import GazeOutput  # noqa: F401
from .grid_autogaze import GazeGrid
from .selection_autogaze import GazeGenerationMixin, frames_to_pixels, pixel_scale_and_offset
from .token_budgets_autogaze import ClipBudget  # noqa: F401


# The RMS length of vectors is 1 / 8, so that clamping to -0.5..0.5, the range of the search, changes few.
_SPREAD = 8.0
_GROUP_PLACES = 1568  # places in a batch of frames of the network; a batch has at least one frame


class FeatureGazeCache(CanvasGazeCache):
    """State of a stream of a [`FeatureGazeModel`]: the feature vector of every place, and the rate control of a budget."""


class FeatureGazeModel(CanvasGazeSelector, GazeGenerationMixin, PreTrainedModel):
    """
    Keeps the patches where an encoder's features change, as predicted by a small network that is distilled from the encoder.

    The network computes a vector for each place of the finest scale, as seen at each scale, once per frame. Patches are kept
    where the squared distance between these vectors and those kept before is largest. A loss, in `task_loss_requirement` and
    `task_loss_prediction`, is the predicted share of the encoder's feature variance that a frame loses, 0..1.

    It supports any grid whose scales are among `config.scale_factors`, square or not, and any patch size: frames are resized
    to 16 pixels per patch of the finest scale for the network.

    Args:
        config ([`FeatureGazeConfig`], *optional*): the configuration.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import FeatureGazeConfig, FeatureGazeModel

    >>> model = FeatureGazeModel(FeatureGazeConfig(hidden_sizes=[8, 16, 32], depths=[1, 1, 1], feature_size=8)).eval()
    >>> video = torch.randn(1, 1, 3, 224, 224).expand(1, 4, 3, 224, 224)  # four times the same frame
    >>> model.generate(video, clip_ratio=0.25).num_real_each_frame.tolist()
    [[196, 0, 0, 0]]

    ```
    """

    config: FeatureGazeConfig
    search: FeatureSearch
    config_class = FeatureGazeConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values_videos"
    input_modalities = ["video"]
    cache_class = FeatureGazeCache

    def __init__(self, config: FeatureGazeConfig | None = None):
        config = FeatureGazeConfig() if config is None else config
        super().__init__(config)
        self.network = FeatureGazeNetwork(config)
        self.set_search(config.grid)
        self.post_init()

    def make_search(self, grid: GazeGrid) -> FeatureSearch:
        return FeatureSearch(grid)

    @torch.no_grad()
    def look(self, frames: torch.Tensor, tubelet_size: int = 1) -> torch.Tensor:
        """
        Computes the feature vectors of frames.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`): normalised by the processor.
            tubelet_size (`int`, *optional*, defaults to 1): number of frames whose vectors are concatenated.

        Returns:
            `torch.FloatTensor` of shape `(batch, frames / tubelet_size, scales, tubelet_size * feature_size, rows, columns)`:
            vectors of the places of the finest scale, for each scale of the grid, clamped to -0.5..0.5. The mean squared
            length of a frame's vectors is 1/64 if the network predicts all of the variance.
        """
        rows, cols = self.config.grid.grids[-1]
        scales = self.config.known_scales(self.config.grid)
        group = max(1, _GROUP_PLACES // (rows * cols))
        with torch.autocast(frames.device.type, enabled=False):
            vectors = [self._look_at(part, (rows, cols), scales) for part in frames.flatten(0, 1).split(group)]
        vectors = torch.cat(vectors).unflatten(0, (len(frames), -1, tubelet_size))
        return vectors.transpose(2, 3).flatten(3, 4)

    def _look_at(self, frames: torch.Tensor, places: tuple[int, int], scales: list[int]) -> torch.Tensor:
        """Computes the vectors `(frames, scales, feature_size, *places)` of frames `(frames, 3, height, width)`."""
        pixels = frames_to_pixels(frames, *pixel_scale_and_offset(self.config))
        size = tuple(STRIDE * count for count in places)
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp_(0, 1)
        vectors = self.network(self.network.normalize(pixels).to(self.dtype), scales)
        scale = 1 / (_SPREAD * self.config.feature_variance**0.5)
        return (vectors.to(pixels.dtype) * scale).clamp_(-0.5, 0.5).contiguous()

    def mse_to_loss(self, mse: torch.Tensor) -> torch.Tensor:
        predicted, measured = zip(*self.config.loss_knots, strict=True)
        return _interpolate(mse * (self.config.feature_size * _SPREAD**2), predicted, measured)

    def loss_to_mse(self, loss: torch.Tensor) -> torch.Tensor:
        predicted, measured = zip(*self.config.loss_knots, strict=True)
        return _interpolate(loss, measured, predicted) / (self.config.feature_size * _SPREAD**2)

    def check_task_loss_requirement(self, threshold: torch.Tensor) -> None:
        if not ((threshold >= 0) & (threshold <= 1)).all():
            raise ValueError(
                "`task_loss_requirement` must lie in 0..1, the share of the encoder's feature variance that a frame may lose, "
                f"got {threshold.unique().tolist()}"
            )


def _interpolate(values: torch.Tensor, start: tuple[float, ...], stop: tuple[float, ...]) -> torch.Tensor:
    """Maps values by linear interpolation between the knots `start` and `stop`, clamped at both ends."""
    x, y = (torch.tensor(numbers, dtype=values.dtype, device=values.device) for numbers in (start, stop))
    values = values.clamp(x[0], x[-1])
    above = torch.searchsorted(x, values.contiguous()).clamp(min=1)
    share = (values - x[above - 1]) / (x[above] - x[above - 1])
    return torch.lerp(y[above - 1], y[above], share)


FeatureGazeConfig.register_for_auto_class()
FeatureGazeModel.register_for_auto_class("AutoModel")
