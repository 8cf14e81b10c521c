"""
The selector that was taught by an encoder: keeps the patches whose features differ from what was kept before.

This module makes a selector of `feature_network_autogaze`'s network and `feature_search_autogaze`'s search: normalised frames in, a
[`GazeOutput`] out, streaming, and what a distance of vectors means as a loss.
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


_SPREAD = 8.0  # the search takes vectors in -0.5..0.5, so these are a sixteenth of what a vector may be long
_GROUP_PLACES = 1568  # places of the frames that the network looks at together, one frame at least


class FeatureGazeCache(CanvasGazeCache):
    """What a [`FeatureGazeModel`] remembers of a stream: a vector for every place, and the account of a budget over time."""


class FeatureGazeModel(CanvasGazeSelector, GazeGenerationMixin, PreTrainedModel):
    """
    Keeps the patches whose features an encoder would see change, as foreseen by a small network taught by that encoder.

    The network looks at every frame once and gives a vector for each place of the finest scale, seen at each scale. Patches are
    kept where the squared distance of these vectors to those that stand there from what was kept before is largest. A loss is
    the share of the encoder's feature variance that a frame loses, 0..1, as the network foresees it: that is what
    `task_loss_requirement` bounds and `task_loss_prediction` tells.

    It takes any grid whose scales are among `config.scale_factors`, square or not, and any patch size: the network sees a
    frame with 16 pixels for every patch of the finest scale.

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

    config_class = FeatureGazeConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
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
        Looks at frames.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`): normalised by the processor.
            tubelet_size (`int`, *optional*, defaults to 1): frames whose vectors are put side by side.

        Returns:
            `torch.FloatTensor` of shape `(batch, frames / tubelet_size, scales, tubelet_size * feature_size, rows, columns)`:
            vectors of the places of the finest scale, for each scale of the grid, whose mean squared length is 1/64 for each
            of the frames side by side where the network foresees all, cut to -0.5..0.5.
        """
        rows, cols = self.config.grid.grids[-1]
        scales = self.config.known_scales(self.config.grid)
        group = max(1, _GROUP_PLACES // (rows * cols))
        with torch.autocast(frames.device.type, enabled=False):
            vectors = [self._look_at(part, (rows, cols), scales) for part in frames.flatten(0, 1).split(group)]
        vectors = torch.cat(vectors).unflatten(0, (len(frames), -1, tubelet_size))
        return vectors.transpose(2, 3).flatten(3, 4)

    def _look_at(self, frames: torch.Tensor, places: tuple[int, int], scales: list[int]) -> torch.Tensor:
        """Looks at some frames `(frames, 3, height, width)`; gives `(frames, scales, feature_size, *places)`."""
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
    """Maps values linearly from ascending numbers to others, as many; beyond the ends to the last of these."""
    start, stop = (torch.tensor(numbers, dtype=values.dtype, device=values.device) for numbers in (start, stop))
    values = values.clamp(start[0], start[-1])
    above = torch.searchsorted(start, values.contiguous()).clamp(min=1)
    share = (values - start[above - 1]) / (start[above] - start[above - 1])
    return torch.lerp(stop[above - 1], stop[above], share)


FeatureGazeConfig.register_for_auto_class()
FeatureGazeModel.register_for_auto_class("AutoModel")
