"""
The greedy selector: chooses patches by the measured error of the closed-form reconstruction (`composite_autogaze`).

It needs no weights, so its checkpoint consists of a configuration.
"""

import math
import os
from collections.abc import Sequence
from numbers import Real

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .canvas_measures_autogaze import MeasuringSearch  # noqa: F401
from .canvas_search_autogaze import Canvas, FrameSearchOutput
from .canvas_selection_autogaze import CanvasGazeCache, CanvasGazeSelector
from .cells_autogaze import CellTables  # noqa: F401
from .clip_schedule_autogaze import ClipSchedule  # noqa: F401
from .composite_autogaze import CompositeReconstruction, mse_to_task_loss, task_loss_to_mse
from .configuration_autogaze import GazeSelectorConfig, have_equal_content
from .cuda_graphs_autogaze import ReplayedCall  # noqa: F401
from .gaze_batches_autogaze import stack_gazes  # noqa: F401
from .gaze_files_autogaze import save_gaze  # noqa: F401
from .gaze_pictures_autogaze import paint_gaze  # noqa: F401
from .gazing_autogaze import GazeOutput  # noqa: F401 (see modeling_autogaze)
from .grid_autogaze import GazeGrid
from .selection_autogaze import GazeGenerationMixin, frames_to_pixels, pixel_scale_and_offset
from .token_budgets_autogaze import check_clip_ratio, read_number


class GreedyGazeConfig(GazeSelectorConfig):
    """
    Configuration of a [`GreedyGazeSelector`].

    Args:
        scales (`Sequence[int | tuple[int, int]]`, *optional*, defaults to `[32, 64, 112, 224]`):
            Sizes in pixels at which patches are chosen, coarse to fine; frames are resized to the last.
        patch_size (`int`, *optional*, defaults to 16):
            Height and width of a patch in pixels, at every scale.
        gazing_ratio (`float`, *optional*, defaults to 0.75):
            Maximum share of patches to keep if `generate` is given neither a budget nor a threshold.
        task_loss_requirement (`float`, *optional*, defaults to 0.7):
            Loss at which a frame is done in that case: `(40 - PSNR) / 20`, so 0.7 is 26 dB.
        clip_ratio (`float`, *optional*):
            Share of a dense encoder's tokens to keep in a clip in that case, 0..1; it replaces the two above.
        kwargs: further arguments of [`GazeSelectorConfig`], such as `image_mean` and `image_std`.

    Raises:
        ValueError: if a ratio or a standard deviation is out of range.
    """

    model_type = "autogaze_greedy"
    __eq__ = have_equal_content

    def __init__(
        self,
        scales: Sequence[int | tuple[int, int]] = (32, 64, 112, 224),
        patch_size: int = 16,
        gazing_ratio: float = 0.75,
        task_loss_requirement: float = 0.7,
        clip_ratio: float | None = None,
        **kwargs,
    ):
        if not 0 <= read_number("gazing_ratio", gazing_ratio) <= 1:
            raise ValueError(f"`gazing_ratio` must lie in 0..1, got {gazing_ratio}")
        check_clip_ratio(clip_ratio)
        if not isinstance(task_loss_requirement, Real) or math.isnan(task_loss_requirement):
            raise ValueError(f"`task_loss_requirement` must be a number, got {task_loss_requirement!r}")
        self.gazing_ratio = gazing_ratio
        self.task_loss_requirement = task_loss_requirement
        self.clip_ratio = clip_ratio
        super().__init__(scales, patch_size, **kwargs)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that frames are resized to."""
        return self.grid.sizes[-1]


class GreedyGazeCache(CanvasGazeCache):
    """State of a stream of the greedy selector: the canvas in pixels 0..1, and the rate control of a budget over time."""

    @property
    def reconstruction(self) -> torch.Tensor | None:
        """`(batch, 3, height, width)`: reconstruction of the last frame; `None` before the first."""
        return None if self.canvas is None else self.canvas.image


class GreedyGazeSelector(CanvasGazeSelector, GazeGenerationMixin, PreTrainedModel):
    """
    Keeps, one by one, the patch that decreases the reconstruction error of its frame most.

    It has the interface of [`AutoGazeModel`] and needs no weights. Losses are measured, not predicted, so every frame meets
    its threshold or uses its whole budget. `task_loss_prediction` of its gazes is the measured loss, `(40 - PSNR) / 20` of the
    closed-form reconstruction.

    Args:
        config (`GreedyGazeConfig`, *optional*): the configuration.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import GreedyGazeSelector

    >>> video = torch.linspace(-2, 2, 224).expand(1, 4, 3, 224, 224)  # four times the same smooth frame
    >>> gaze = GreedyGazeSelector().generate(video, gazing_ratio=0.5, task_loss_requirement=0.7)
    >>> gaze.num_real_each_frame.tolist()
    [[4, 1, 1, 1]]

    ```
    """

    config: GreedyGazeConfig
    search: CompositeReconstruction
    place: torch.Tensor
    config_class = GreedyGazeConfig
    main_input_name = "pixel_values_videos"
    input_modalities = ["video"]
    cache_class = GreedyGazeCache

    def __init__(self, config: GreedyGazeConfig | None = None):
        config = GreedyGazeConfig() if config is None else config
        super().__init__(config)
        # Carries the device and dtype of the selector, which has no weights.
        self.register_buffer("place", torch.empty(()), persistent=False)
        self.set_search(config.grid)
        self.post_init()

    @property
    def composite(self) -> CompositeReconstruction:
        """The closed-form reconstruction, which is also the search."""
        return self.search

    @property
    def device(self) -> torch.device:
        """Device of the selector."""
        return self.place.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its inputs; it computes in float32 at least."""
        return self.place.dtype

    @classmethod
    def from_pretrained(  # type: ignore[override]  # only this configuration
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        config: GreedyGazeConfig | None = None,
        **kwargs,
    ) -> "GreedyGazeSelector":
        """
        Loads a selector from its `config.json`; there are no weights.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder or a repository of the Hub; `None` to use `config` alone.
            config (`GreedyGazeConfig`, *optional*): a configuration that replaces the stored one.
            kwargs:
                Values that replace those of the configuration, such as `gazing_ratio`, and the arguments of
                [`~transformers.PreTrainedModel.from_pretrained`].

        Returns:
            [`GreedyGazeSelector`] in evaluation mode; with `output_loading_info` also a dictionary.

        Raises:
            TypeError: if an argument is neither.

        Example:

        ```python
        >>> from transformers_autogaze import GREEDY_SELECTOR, GreedyGazeSelector

        >>> GreedyGazeSelector.from_pretrained(GREEDY_SELECTOR, gazing_ratio=0.2).config.gazing_ratio
        0.2

        ```
        """
        # The configuration would take the dtype for its own.
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        kwargs.setdefault("state_dict", {})
        loaded = super().from_pretrained(None, *args, config=config, **dtype, **kwargs)
        selector = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            selector.name_or_path = selector.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded

    def save_pretrained(  # type: ignore[override]  # there are no weights
        self, save_directory: str | os.PathLike, **kwargs
    ) -> None:
        """
        Writes `config.json` and the code that loads it with `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to; created if missing.
            kwargs: the arguments of [`~transformers.PreTrainedConfig.save_pretrained`].
        """
        self.config.architectures = [type(self).__name__]
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(self, save_directory, config=self.config)  # type: ignore[arg-type]  # or a configuration
        self.config.save_pretrained(save_directory, **kwargs)

    def to_pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """Undoes the processor's normalisation of `(.., 3, height, width)`; returns pixels in 0..1."""
        return frames_to_pixels(frames, *pixel_scale_and_offset(self.config))

    def make_search(self, grid: GazeGrid) -> CompositeReconstruction:
        return CompositeReconstruction(grid)

    def look(self, frames: torch.Tensor, tubelet_size: int) -> torch.Tensor:
        # The frames of a tubelet are kept or dropped together, so they become channels of one frame.
        return self.to_pixels(frames).unflatten(1, (-1, tubelet_size)).flatten(2, 3)

    def loss_to_mse(self, loss: torch.Tensor) -> torch.Tensor:
        return task_loss_to_mse(loss)

    def mse_to_loss(self, mse: torch.Tensor) -> torch.Tensor:
        return mse_to_task_loss(mse)

    def _search_frames(
        self, values: torch.Tensor, budget: torch.Tensor, max_error: torch.Tensor | None, start: Canvas
    ) -> FrameSearchOutput:
        # Under budgets for each frame, mid-grey is an image like any other, not an empty place.
        start = start._replace(is_empty=torch.zeros_like(start.is_empty))
        return super()._search_frames(values, budget, max_error, start)


GreedyGazeConfig.register_for_auto_class()
GreedyGazeSelector.register_for_auto_class("AutoModel")
