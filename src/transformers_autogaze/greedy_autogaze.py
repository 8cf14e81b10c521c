"""
The greedy selector: chooses patches on the measured error of the closed-form reconstruction, without any weights.

This module makes a selector of `composite_autogaze`'s search: normalised frames in, a [`GazeOutput`] out, streaming, and
a checkpoint that is a configuration alone.
"""

import math
import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .canvas_search_autogaze import Canvas
from .cells_autogaze import CellTables  # noqa: F401
from .composite_autogaze import CompositeReconstruction, mse_to_task_loss, task_loss_to_mse
from .configuration_autogaze import GazeSelectorConfig, have_equal_content
from .cuda_graphs_autogaze import ReplayedCall  # noqa: F401
from .gazing_autogaze import GazeOutput
from .grid_autogaze import GazeGrid  # noqa: F401 (see modeling_autogaze)
from .selection_autogaze import GazeSelector, frames_to_pixels, pixel_scale_and_offset
from .token_budgets_autogaze import ClipBudget, RateControl, StreamBudget


class GreedyGazeConfig(GazeSelectorConfig):
    """
    Configuration of a [`GreedyGazeSelector`].

    Args:
        scales (`Sequence[int | tuple[int, int]]`, *optional*, defaults to `[32, 64, 112, 224]`):
            Sizes in pixels at which patches are chosen, coarse to fine; frames are resized to the last.
        patch_size (`int`, *optional*, defaults to 16):
            Height and width of a patch in pixels, at every scale.
        gazing_ratio (`float`, *optional*, defaults to 0.75):
            Share of patches to keep at most, where `generate` is given neither a budget nor a threshold.
        task_loss_requirement (`float`, *optional*, defaults to 0.7):
            Loss at which a frame is good enough then: `(40 - PSNR) / 20`, so 0.7 is 26 dB.
        clip_ratio (`float`, *optional*):
            Share of a dense encoder's tokens to keep in a clip then, 0..1, instead of these two.
        kwargs: further arguments of [`GazeSelectorConfig`], such as `image_mean` and `image_std`.

    Raises:
        ValueError: if a ratio or a standard deviation is out of range.
    """

    model_type = "autogaze_greedy"
    num_channels = 3
    frame_sampling_rate = 1
    max_num_frames = None  # A stream of any length is one clip.
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
        if not 0 <= gazing_ratio <= 1:
            raise ValueError(f"`gazing_ratio` must lie in 0..1, got {gazing_ratio}")
        if clip_ratio is not None and not 0 < clip_ratio <= 1:
            raise ValueError(f"`clip_ratio` must be above 0 and at most 1, got {clip_ratio}")
        if math.isnan(task_loss_requirement):
            raise ValueError("`task_loss_requirement` must be a number, got NaN")
        self.gazing_ratio = gazing_ratio
        self.task_loss_requirement = task_loss_requirement
        self.clip_ratio = clip_ratio
        super().__init__(scales, patch_size, **kwargs)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that frames are resized to."""
        return self.grid.sizes[-1]


class GreedyGazeCache:
    """What the greedy selector remembers of a stream: the canvas, and the account of a budget over time."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets everything, to start with new clips."""
        self.canvas: Canvas | None = None
        """What was kept of the last frame and those before, pixels in 0..1; `None` before the first frame."""
        self.rate_control: RateControl | None = None
        """Follows `tokens_per_second`."""
        self.num_frames: int = 0
        """Frames of gaze seen so far."""

    @property
    def reconstruction(self) -> torch.Tensor | None:
        """`(batch, 3, height, width)`: the last frame as reconstructed; `None` before the first."""
        return None if self.canvas is None else self.canvas.image


class GreedyGazeSelector(GazeSelector, PreTrainedModel):
    """
    Keeps, one by one, the patch that lowers the reconstruction error of its frame most.

    It has the model's interface and needs no weights. Its threshold is measured, not predicted: every frame either
    meets it or has used its budget. `task_loss_prediction` of its gazes is the measured loss, `(40 - PSNR) / 20` of the
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

    config_class = GreedyGazeConfig
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    knows_gains = True
    takes_any_grid = True

    def __init__(self, config: GreedyGazeConfig | None = None):
        config = GreedyGazeConfig() if config is None else config
        super().__init__(config)
        scale, offset = pixel_scale_and_offset(config)
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_offset", offset, persistent=False)
        self.composite = CompositeReconstruction(config.grid)
        self._for_grid: dict[GazeGrid, GreedyGazeSelector] = {}

    @property
    def device(self) -> torch.device:
        """Where the selector works."""
        return self.pixel_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision it takes; it computes in float32 at least."""
        return self.pixel_scale.dtype

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args, config: GreedyGazeConfig | None = None, **kwargs
    ) -> "GreedyGazeSelector":
        """
        Loads a selector from its `config.json`; there are no weights.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a repository of the Hub.
            config (`GreedyGazeConfig`, *optional*): a configuration to use instead of the one that lies there.
            kwargs: the arguments of [`~transformers.PreTrainedModel.from_pretrained`]; those about weights have no
                effect.
        """
        if config is None:
            hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            config = cls.config_class.from_pretrained(
                pretrained_model_name_or_path, **{key: kwargs[key] for key in hub if key in kwargs}
            )
        return cls(config).eval()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Writes `config.json` and the code that loads it with `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to; made if it is missing.
            kwargs: the arguments of [`~transformers.PreTrainedConfig.save_pretrained`].
        """
        self.config.architectures = [type(self).__name__]
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(self, save_directory, config=self.config)
        self.config.save_pretrained(save_directory, **kwargs)

    def to_pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """Undoes the processor's normalisation of `(.., 3, height, width)`; gives pixels in 0..1."""
        return frames_to_pixels(frames, self.pixel_scale, self.pixel_offset)

    def for_grid(self, grid: GazeGrid) -> "GreedyGazeSelector":
        """
        Gives the same selector for another grid.

        Args:
            grid ([`GazeGrid`]): any scales and patch size; frames are resized to the finest scale.

        Returns:
            [`GreedyGazeSelector`] on this one's device.

        Raises:
            ValueError: if the blocks of the scales do not meet at whole pixels of the finest scale.

        Example:

        ```python
        >>> from transformers_autogaze import GazeGrid, GreedyGazeSelector

        >>> GreedyGazeSelector().for_grid(GazeGrid([(252, 448)], patch_size=28)).config.scales
        [(252, 448)]

        ```
        """
        if grid == self.config.grid:
            return self
        if grid not in self._for_grid:
            config = type(self.config)(
                **{**self.config.to_diff_dict(), "scales": grid.scales, "patch_size": grid.patch_size}
            )
            self._for_grid[grid] = type(self)(config).eval()
        return self._for_grid[grid].to(self.device)

    def _gaze(
        self,
        frames: torch.Tensor,
        budget: torch.Tensor,
        threshold: torch.Tensor | None,
        past_key_values: GreedyGazeCache | None,
        use_cache: bool,
        token_budget: ClipBudget | StreamBudget | None = None,
        tubelet_size: int = 1,
    ) -> GazeOutput:
        cache = GreedyGazeCache() if past_key_values is None else past_key_values
        pixels = self.to_pixels(frames)
        # The frames of a tubelet are kept or dropped together, as if they were channels of one.
        pixels = pixels.unflatten(1, (-1, tubelet_size)).flatten(2, 3)
        self._check_cache(cache, pixels)
        max_error = None if threshold is None else task_loss_to_mse(threshold)
        losses = None
        if token_budget is None:
            found = self.composite.search(pixels, budget, max_error, cache.reconstruction)
            ids, counts = found.ids, found.counts
            losses = mse_to_task_loss(found.mse)
            nowhere = torch.zeros(len(ids), *self.composite.cells, dtype=torch.bool, device=ids.device)
            cache.canvas = Canvas(found.reconstruction, nowhere)
        else:
            if max_error is not None:
                max_error = max_error.double() * pixels[0, 0].numel()
            if isinstance(token_budget, ClipBudget):
                num_tokens = torch.full((len(pixels),), token_budget.num_tokens)
                found = self.composite.search_clip(pixels, num_tokens, max_error, cache.canvas)
            else:
                if cache.rate_control is None or cache.rate_control.budget != token_budget:
                    cache.rate_control = RateControl(token_budget, len(pixels), pixels.device)
                found = self.composite.search_stream(pixels, cache.rate_control, max_error, cache.canvas)
            ids, counts, cache.canvas = found
        first_frame = cache.num_frames if past_key_values is not None or use_cache else None
        cache.num_frames += pixels.shape[1]

        grid, device = self.config.grid, frames.device
        num_slots = counts.amax(0)
        place = torch.arange(ids.shape[2], device=device)
        is_slot = place < num_slots[:, None]
        is_padding = place >= counts[..., None]
        first = torch.arange(pixels.shape[1], device=device)[:, None] * grid.num_patches
        ids = ids.masked_fill(is_padding, grid.num_patches) + first
        return GazeOutput.from_ids(
            ids[:, is_slot],
            is_padding[:, is_slot],
            num_slots,
            grid,
            tubelet_size,
            task_loss_prediction=None if losses is None else losses[:, is_slot],
            clip_num_gazing_each_frame=counts,
            first_frame=first_frame,
            cache=cache if use_cache else None,
        )

    def _check_cache(self, cache: GreedyGazeCache, pixels: torch.Tensor) -> None:
        if not isinstance(cache, GreedyGazeCache):
            raise ValueError(f"`past_key_values` must be a GreedyGazeCache, got {type(cache).__name__}")
        if cache.canvas is None:
            return
        if len(cache.canvas.image) != len(pixels):
            raise ValueError(
                f"`past_key_values` holds {len(cache.canvas.image)} clips, but {len(pixels)} are given now (tiles "
                "count); pass the frames of the same clips, or a new GreedyGazeCache"
            )
        if cache.canvas.image.shape != pixels[:, 0].shape:
            raise ValueError(
                f"`past_key_values` holds frames of shape {tuple(cache.canvas.image.shape[1:])}, but those given now have "
                f"{tuple(pixels.shape[2:])}; a stream keeps its grid and its `tubelet_size`"
            )

    def _draw_settings(self, num_frames: int, generator: torch.Generator | None) -> tuple[float, float]:
        return self.config.gazing_ratio, self.config.task_loss_requirement


GreedyGazeConfig.register_for_auto_class()
GreedyGazeSelector.register_for_auto_class("AutoModel")
