"""Base class of all selectors: `generate` with its checks, resizing and tiling. A selector adds the choice of patches."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .configuration_autogaze import GazeSelectorConfig
from .gazing_autogaze import GazeOutput
from .grid_autogaze import GazeGrid
from .token_budgets_autogaze import (
    ClipBudget,
    Number,
    StreamBudget,
    budget_each_frame,
    read_token_budget,
    threshold_each_frame,
)


_MAX_ABS_PIXEL = 100.0  # far beyond normalised pixels, but not beyond frames of 0..255


class GazeGenerationMixin:
    """
    Marks a model whose `generate` is not that of transformers. It must be a direct base class.

    For remote code without a direct base of this name, `AutoModel` creates a derived class that is in no module, so it cannot
    be pickled.
    """

    @classmethod
    def can_generate(cls) -> bool:
        """Returns `False`: the model does not generate text tokens."""
        return False


class GazeSelector:
    """
    Base class of all selectors, with `generate`.

    A selector has a `config` with `grid`, `image_size`, `num_channels` and `frame_sampling_rate`, and implements `_gaze`,
    which chooses patches of clips of its own size, and `_draw_settings`.
    """

    config: GazeSelectorConfig
    knows_gains: bool = False
    """Whether the gain of each patch is known, which budgets over time need; `_gaze` then takes a `token_budget`."""
    takes_any_grid: bool = False
    """Whether patches of any grid can be chosen; `for_grid` then takes any grid, and `_gaze` a `tubelet_size`."""

    if TYPE_CHECKING:  # defined by the selectors, most of which are a `PreTrainedModel`

        @property
        def device(self) -> torch.device: ...

    def for_grid(self, grid: GazeGrid) -> "GazeSelector":
        """
        Returns the same selector for another grid.

        Args:
            grid ([`GazeGrid`]): the patches to choose from; frames are resized to its finest scale.

        Raises:
            ValueError: if this selector supports only its own grid.
        """
        if grid == self.config.grid:
            return self
        raise ValueError(f"`grid` must be {self.config.grid}, which {type(self).__name__} was made for, got {grid}")

    @torch.no_grad()
    def generate(
        self,
        pixel_values_videos: torch.Tensor,
        gazing_ratio: Number | Sequence[Number] | torch.Tensor | None = None,
        task_loss_requirement: Number | Sequence[Number] | torch.Tensor | None = None,
        target_scales: Sequence[int | tuple[int, int]] | None = None,
        target_patch_size: int | None = None,
        past_key_values: object | None = None,
        use_cache: bool = False,
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
        tokens_per_second: float | None = None,
        frame_rate: float | None = None,
        tubelet_size: int = 1,
        **options,
    ) -> GazeOutput:
        """
        Chooses the patches to keep of every frame.

        At most one budget can be given: per frame (`gazing_ratio`), per clip (`clip_ratio` or `tokens_per_clip`) or per second
        of a stream (`tokens_per_second`). Under a budget over time, the patches that gain most are kept: the first frame as
        a whole, as far as the budget allows, and later what changes.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`):
                Normalised frames of any size; they are resized to that of the selector (bicubic, no antialiasing).
            gazing_ratio (`float`, sequence of `float` or `torch.Tensor` of shape `(frames,)`, *optional*):
                Share of patches to keep of a frame, 0..1, one number or one per frame; at least one patch is kept. Without
                `task_loss_requirement`, exactly that many are kept.
            task_loss_requirement (`float`, sequence of `float` or `torch.Tensor`, *optional*):
                Loss at which a frame is done: one number, one per frame `(frames,)`, one per clip `(batch,)`, or
                `(batch, frames)`. Without `gazing_ratio`, a frame may keep all patches. Without both, the configuration
                applies. For [`GreedyGazeSelector`] and [`AutoGazeModel`] the loss is `(40 - PSNR) / 20` of pixels, for
                [`FeatureGazeModel`] the predicted share of the encoder's feature variance that the frame loses, 0..1.
            target_scales (`Sequence[int]`, *optional*):
                Scales of the encoder that the gaze is for; frames must have the size of the last one. A selector that takes
                any grid chooses among their patches. Others need as many scales as their own, and choose patches in tiles of
                the frames.
            target_patch_size (`int`, *optional*):
                Patch size of that encoder; given with `target_scales`.
            past_key_values (*optional*):
                State returned by an earlier call, to continue its clips. Ids count from the first frame of this call. In
                float32 and float64, a stream gets the patches of the whole clip, however it is split, and a clip those that
                it gets alone. In lower precision, networks round a clip differently from single frames, so one of two nearly
                equal patches may be replaced by the other; [`GreedyGazeSelector`] computes in float32 at least.
            use_cache (`bool`, *optional*, defaults to `False`):
                Whether to return the state to continue with, as `cache`.
            clip_ratio (`float`, *optional*):
                Share of the tokens of a dense encoder, all patches of the finest scale in all frames, to keep in the
                clip, above 0 and at most 1; exactly that many are kept. For selectors that know gains.
            tokens_per_clip (`int`, *optional*): the same as a number.
            tokens_per_second (`float`, *optional*):
                Tokens to keep per second of a stream. Every window of ten seconds stays within a tenth of its budget; pass
                `past_key_values` to continue a stream. For selectors that know gains.
            frame_rate (`float`, *optional*): frames per second of the stream; given with `tokens_per_second`.
            tubelet_size (`int`, *optional*, defaults to 1):
                Number of frames that a token of the encoder covers, which are kept or dropped together: 2 for Qwen's merge
                units. The gaze has one frame for each tubelet, and this as its `frame_sampling_rate`. For selectors that
                take any grid.
            options: further options of the selector. [`AutoGazeModel`] takes `do_sample` (`bool`), `temperature`
                (`float`, above 0) and `generator` (`torch.Generator`) for sampling, and `output_scores` (`bool`) to fill
                `log_action_probs` and `task_loss_prediction`.

        Returns:
            [`GazeOutput`]

        Raises:
            ValueError: if an argument is out of range or does not fit the frames; the message names it.
        """
        settings: dict[str, Any] = {
            "gazing_ratio": gazing_ratio,
            "task_loss_requirement": task_loss_requirement,
            "clip_ratio": clip_ratio,
            "tokens_per_clip": tokens_per_clip,
            "tokens_per_second": tokens_per_second,
            "frame_rate": frame_rate,
        }
        self._check_video(pixel_values_videos)
        self._check_options(options)
        if (target_scales is None) != (target_patch_size is None):
            raise ValueError(
                "`target_scales` and `target_patch_size` must be given together, got "
                f"target_scales={target_scales}, target_patch_size={target_patch_size}"
            )
        if target_scales is None:
            return self._gaze_at(pixel_values_videos, settings, past_key_values, use_cache, tubelet_size, options)
        height, width = pixel_values_videos.shape[-2:]
        whole = self._target_grid(target_scales, target_patch_size, (height, width))
        if self.takes_any_grid:
            selector = self.for_grid(whole)
            return selector._gaze_at(pixel_values_videos, settings, past_key_values, use_cache, tubelet_size, options)
        if options.get("output_scores"):
            raise ValueError(
                "`output_scores` must be False with `target_scales`: stitched tiles have no order to score"
            )
        tiles = whole.cut_tiles(pixel_values_videos, self.config.grid)
        count = len(tiles) // len(pixel_values_videos)
        gaze = self._gaze_at(tiles, settings, past_key_values, use_cache, tubelet_size, options, count)
        # The order of choice is lost, as in the published code: tiles have no common order.
        stitched = GazeOutput.from_masks(
            whole.stitch_tiles(gaze.gazing_mask, self.config.grid),
            whole,
            self.config.frame_sampling_rate,
            first_frame=gaze.first_frame,
            cache=gaze.cache,
        )
        threshold = gaze.task_loss_requirement
        return stitched.replace(task_loss_requirement=None if threshold is None else threshold[::count])

    def _gaze_at(
        self,
        video: torch.Tensor,
        settings: dict[str, Any],
        past_key_values: object | None,
        use_cache: bool,
        tubelet_size: int,
        options: dict[str, Any],
        tiles: int = 1,
    ) -> GazeOutput:
        """Chooses patches on the selector's own grid; `tiles` consecutive entries belong to one clip. See `generate`."""
        own, options = self.config.grid, dict(options)
        num_frames = self._num_gaze_frames(video, tubelet_size)
        if tubelet_size != 1:
            options["tubelet_size"] = tubelet_size
        rate = settings["frame_rate"]
        token_budget = read_token_budget(
            own,
            num_frames,
            settings["gazing_ratio"],
            settings["clip_ratio"],
            settings["tokens_per_clip"],
            settings["tokens_per_second"],
            rate,
            tubelet_size,
        )
        gazing_ratio, task_loss_requirement = settings["gazing_ratio"], settings["task_loss_requirement"]
        if token_budget is None and gazing_ratio is None and task_loss_requirement is None:
            if getattr(self.config, "clip_ratio", None) is not None:
                token_budget = read_token_budget(own, num_frames, clip_ratio=self.config.clip_ratio)
            else:
                gazing_ratio, task_loss_requirement = self._draw_settings(num_frames, options.get("generator"))
        if token_budget is not None:
            self.check_token_budget(token_budget)
            options["token_budget"] = token_budget
        budget = budget_each_frame(1 if gazing_ratio is None else gazing_ratio, num_frames, own.num_patches)
        threshold = None
        if task_loss_requirement is not None:
            threshold = threshold_each_frame(task_loss_requirement, len(video) // tiles, num_frames)
            self.check_task_loss_requirement(threshold)
            precise = torch.promote_types(video.dtype, torch.float32)
            threshold = threshold.repeat_interleave(tiles, dim=0).to(video.device, precise)
        frames = resize_frames(video, self.config.image_size)
        check_pixels(frames)
        gaze = self._gaze(frames, budget, threshold, past_key_values, use_cache, **options)
        return gaze.replace(task_loss_requirement=threshold)

    def _check_options(self, options: dict[str, object]) -> None:
        """Raises a `ValueError` for options of `generate` that this selector does not have."""
        parameters = inspect.signature(self._gaze).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        # The first five are set by `generate`, as are these two.
        known = [name for name in list(parameters)[5:] if name not in ("token_budget", "tubelet_size")]
        for name, value in options.items():
            if name not in known:
                also = ", ".join(f"`{option}`" for option in known) or "none"
                raise ValueError(
                    f"`{name}` must be an argument of `{type(self).__name__}.generate`, got {name}={value!r}; beside those of "
                    f"every selector it takes {also}"
                )

    def check_token_budget(self, token_budget: ClipBudget | StreamBudget | None) -> None:
        """
        Checks that this selector supports a budget over time.

        Raises:
            ValueError: if there is one and the selector does not know gains.
        """
        if token_budget is not None and not self.knows_gains:
            raise ValueError(
                "`clip_ratio`, `tokens_per_clip` and `tokens_per_second` need a selector that knows what patches gain, such "
                f"as the default; {type(self).__name__} takes `gazing_ratio`, as one number or one per frame"
            )

    def check_task_loss_requirement(self, threshold: torch.Tensor) -> None:
        """
        Checks thresholds of any shape against the range of this selector's losses; by default, any number is allowed.

        Raises:
            ValueError: if one is out of range.
        """

    def _gaze(
        self,
        frames: torch.Tensor,
        budget: torch.Tensor,
        threshold: torch.Tensor | None,
        past_key_values: Any,
        use_cache: bool,
        *args: Any,
        **options: Any,
    ) -> GazeOutput:
        """Chooses patches of clips `(batch, frames, channels, image_size, image_size)`; see `generate`."""
        raise NotImplementedError

    def _draw_settings(
        self, num_frames: int, generator: torch.Generator | None
    ) -> tuple[Number | torch.Tensor, Number | None]:
        """Returns the ratio and threshold to use if the caller gives neither."""
        raise NotImplementedError

    def _target_grid(
        self, scales: Sequence[int | tuple[int, int]], patch_size: int, size: tuple[int, int]
    ) -> GazeGrid:
        try:
            grid = GazeGrid(scales, patch_size)
            if self.takes_any_grid:
                self.for_grid(grid)
            else:
                grid.tile_layout(self.config.grid)
        except ValueError as error:
            raise ValueError(f"`target_scales`={scales} with `target_patch_size`={patch_size}: {error}") from error
        if size != grid.sizes[-1]:
            raise ValueError(
                f"`pixel_values_videos` must be {grid.sizes[-1]} pixels, the last of `target_scales`, got {size}"
            )
        return grid

    def _check_video(self, video: torch.Tensor) -> None:
        if not isinstance(video, torch.Tensor) or video.ndim != 5:
            got = tuple(video.shape) if isinstance(video, torch.Tensor) else type(video).__name__
            raise ValueError(
                f"`pixel_values_videos` must be a tensor (batch, frames, channels, height, width), got {got}"
            )
        if not video.is_floating_point():
            raise ValueError(
                f"`pixel_values_videos` must hold normalised floats, got {video.dtype}; use the processor on raw frames"
            )
        if 0 in video.shape:
            raise ValueError(f"`pixel_values_videos` must not be empty, got the shape {tuple(video.shape)}")
        if video.shape[2] != self.config.num_channels:
            raise ValueError(
                f"`pixel_values_videos` must have {self.config.num_channels} channels in its third dimension, got "
                f"{video.shape[2]} in the shape {tuple(video.shape)}"
            )
        self._num_gaze_frames(video)

    def _num_gaze_frames(self, video: torch.Tensor, tubelet_size: int = 1) -> int:
        if isinstance(tubelet_size, bool) or not isinstance(tubelet_size, Integral) or tubelet_size < 1:
            raise ValueError(f"`tubelet_size` must be a whole number of at least 1, got {tubelet_size!r}")
        if tubelet_size != 1 and not self.takes_any_grid:
            raise ValueError(
                f"`tubelet_size` must be 1 for {type(self).__name__}, which chooses patches of single frames, got "
                f"{tubelet_size}"
            )
        rate = self.config.frame_sampling_rate * tubelet_size
        if video.shape[1] % rate:
            raise ValueError(f"`pixel_values_videos` must hold a multiple of {rate} frames, got {video.shape[1]}")
        return video.shape[1] // rate


def check_names(
    owner: str, given: Iterable[str], functions: Iterable[Callable[..., object]], others: Iterable[str] = ()
) -> None:
    """
    Checks the names of keyword arguments of a function with `**kwargs`.

    Args:
        owner (`str`): name of the function or class, for the message.
        given (`Iterable[str]`): names of the given arguments.
        functions (`Iterable[Callable]`): functions whose named parameters are allowed.
        others (`Iterable[str]`, *optional*): further allowed names.

    Raises:
        TypeError: if a name is not allowed.
    """
    known = [
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    known = list(dict.fromkeys([*known, *others]))
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"{owner} knows no argument {', '.join(unknown)}; it takes {', '.join(known)}")


def check_cache(cache: Any, cache_class: type[Any], batch_size: int) -> None:
    """
    Checks the state of a stream.

    Args:
        cache: the argument `past_key_values`.
        cache_class (`type`): class of the selector's states, with `batch_size`.
        batch_size (`int`): number of clips of the call.

    Raises:
        ValueError: if it has another class or another number of clips.
    """
    name = cache_class.__name__
    if not isinstance(cache, cache_class):
        raise ValueError(f"`past_key_values` must be a {name}, got {type(cache).__name__}")
    if cache.batch_size not in (None, batch_size):
        raise ValueError(
            f"`past_key_values` holds {cache.batch_size} clips, but {batch_size} are given now (tiles count); pass the frames "
            f"of the same clips, or a new {name}"
        )


def check_pixels(frames: torch.Tensor) -> None:
    """
    Checks the range of normalised frames, in one pass over them.

    Args:
        frames (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`): normalised frames.

    Raises:
        ValueError: if a pixel is NaN, infinite or beyond -100..100.
    """
    lowest, highest = torch.stack(frames.detach().aminmax()).tolist()
    if not (lowest >= -_MAX_ABS_PIXEL and highest <= _MAX_ABS_PIXEL):
        bad = ~(frames.detach().abs() <= _MAX_ABS_PIXEL)
        frame = int(bad.flatten(2).any(2).any(0).nonzero()[0])
        raise ValueError(
            f"`pixel_values_videos` must not hold NaN or numbers beyond -{_MAX_ABS_PIXEL:g}..{_MAX_ABS_PIXEL:g}, got "
            f"{lowest:g}..{highest:g}, first in frame {frame}; normalise frames as the processor does, by a standard deviation "
            "above 0"
        )


def resize_frames(video: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """
    Resizes frames without keeping their aspect ratio, bicubic without antialiasing (docs/specification.md, section 2.1).

    Args:
        video (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`): frames.
        size (`int` or `tuple[int, int]`): height and width in pixels; one number for a square.

    Returns:
        `torch.FloatTensor` of shape `(batch, frames, channels, *size)`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if tuple(video.shape[-2:]) == (height, width):
        return video
    frames = F.interpolate(video.flatten(0, 1), size=(height, width), mode="bicubic", align_corners=False)
    return frames.view(*video.shape[:3], height, width)


def pixel_scale_and_offset(config) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and offset of [`frames_to_pixels`] for a `GazeSelectorConfig`, both of shape `(3, 1, 1)`."""
    mean, std = torch.tensor(config.image_mean)[:, None, None], torch.tensor(config.image_std)[:, None, None]
    scale = 1 / (config.rescale_factor * 255)
    return std * scale, (mean + config.offset) * scale


def frames_to_pixels(frames: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Undoes the processor's normalisation of `(.., 3, height, width)`; returns pixels in 0..1, in float32 at least."""
    precise = torch.promote_types(frames.dtype, torch.float32)
    scale, offset = scale.to(frames.device, precise), offset.to(frames.device, precise)
    # In place, as allocating memory for a whole clip takes longer than the arithmetic.
    return (frames.to(precise) * scale).add_(offset).clamp_(0, 1)


def draw_settings(
    config, num_frames: int, is_training: bool, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, float | None]:
    """
    Draws a ratio for every frame, and a threshold, by the configured strategies (docs/specification.md, section 4.2).

    Args:
        config (`AutoGazeConfig`): the strategies and their parameters.
        num_frames (`int`): number of frames of the clip.
        is_training (`bool`): whether to use the strategies for training or those for inference.
        generator (`torch.Generator`, *optional*): source of random numbers.

    Returns:
        `tuple`: ratios, a `torch.FloatTensor` of shape `(frames,)`, and a threshold or `None`.
    """
    mode = "training" if is_training else "inference"

    def strategy(section: dict) -> tuple[str, dict]:
        name = section[f"sample_strategy_during_{mode}"]
        return name, section[name]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    name, numbers = strategy(config.gazing_ratio_config)
    if name == "fixed":
        mean = numbers["gazing_ratio"]
    else:
        low, high = numbers["gazing_ratio_min"], numbers["gazing_ratio_max"]
        if name == "uniform":
            mean = uniform(low, high)
        else:
            # An exponential distribution truncated to low..high, by inverse transform sampling.
            rate = numbers["lambda"]
            share = uniform(0, -math.expm1(-rate * (high - low)))
            mean = low - math.log1p(-share) / rate

    spread, numbers = strategy(config.gazing_ratio_each_frame_config)
    ratio = torch.full((num_frames,), float(mean))
    if spread == "dirichlet":
        alpha = numbers["alpha"]
        alpha = [float(part) for part in alpha.split(",")] if isinstance(alpha, str) else alpha
        alpha = torch.as_tensor(alpha, dtype=torch.float32)
        if alpha.ndim and len(alpha) != num_frames:
            raise ValueError(
                f"`gazing_ratio_each_frame_config['dirichlet']['alpha']` must be one number or one for each of the "
                f"{num_frames} frames, got {numbers['alpha']!r}"
            )
        alpha = alpha.expand(num_frames)
        weights = torch._standard_gamma(alpha, generator=generator)
        ratio = (weights / weights.sum() * mean * num_frames).clamp(max=1)

    threshold = None
    has_threshold = getattr(config, f"has_task_loss_requirement_during_{mode}")
    if has_threshold or spread == "self":
        name, numbers = strategy(config.task_loss_requirement_config)
        if name == "fixed":
            threshold = numbers["task_loss_requirement"]
        else:
            threshold = uniform(numbers["task_loss_requirement_min"], numbers["task_loss_requirement_max"])
    return ratio, threshold
