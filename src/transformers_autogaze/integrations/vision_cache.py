"""The cached keys and values of a vision tower with attention to the canvas, for streams of frames."""

import copy
import weakref

import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from .canvas import Canvas
from .vision_adapters import VisionAdapter


class GazeVisionCache:
    """
    The cache of a [`GazeVisionModel`] with `"canvas"` attention, for a stream of frames.

    It has, for every layer, the keys and values of the tokens that are visible to later frames: at most one for each place of
    the finest scale, however long the stream. The first call determines the tower, the grid and the number of clips. No
    gradients flow through the cache. A call that fails does not change it.

    Attributes:
        num_frames (`int`): number of frames of the gazes so far; the `first_frame` of a continued gaze is equal to it.
        num_times (`int`): number of frames so far, or of tubelets for a tower with tubelets.
        canvas ([`Canvas`]): the visible tokens and their places; `None` at first.
        key_values (`list[tuple[torch.Tensor, torch.Tensor]]` of shape `(1, heads, visible, head_dim)`):
            Keys and values of every layer, in the order of `canvas.tokens`.

    Example:

    ```python
    >>> from transformers import SiglipVisionConfig, SiglipVisionModel
    >>> from transformers_autogaze import GazeOutput
    >>> from transformers_autogaze.integrations import GazeVisionCache, GazeVisionModel

    >>> config = SiglipVisionConfig(
    ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16
    ... )
    >>> model = GazeVisionModel(SiglipVisionModel(config).eval())
    >>> cache = GazeVisionCache()
    >>> for share in (1.0, 0.2, 0.1):
    ...     gaze = GazeOutput.from_masks([torch.rand(1, 1, 16) < share], model.grid)
    ...     with torch.no_grad():
    ...         output = model(torch.randn(1, 1, 3, 64, 64), gaze, cache=cache)
    >>> cache.num_frames, cache.num_tokens
    (3, 16)

    ```
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Empties the cache, for a new stream of any tower, grid and batch size."""
        self.num_frames = 0
        self.num_times = 0
        self.canvas: Canvas | None = None
        self.key_values: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._new_key_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tower: weakref.ref | None = None
        self._grid: GazeGrid | None = None
        self._batch_size: int | None = None

    def __getstate__(self) -> dict[str, object]:
        # In another process the tower is another object.
        return {**self.__dict__, "_tower": None}

    def __deepcopy__(self, memo: dict[int, object]) -> "GazeVisionCache":
        other = type(self)()
        other.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        other._tower = self._tower
        return other

    @property
    def num_tokens(self) -> int:
        """Number of visible tokens of all clips, which is the number of cached keys of every layer."""
        return 0 if self.canvas is None else len(self.canvas.tokens)

    def check(self, adapter: VisionAdapter, grid: GazeGrid, gaze: GazeOutput, attention: str) -> None:
        """
        Checks that a call can use this cache, before any computation.

        Args:
            adapter ([`VisionAdapter`]): adapter of the tower.
            grid (`GazeGrid`): scales of the tower.
            gaze ([`GazeOutput`]): gaze of the next frames.
            attention (`str`): attention of the call.

        Raises:
            ValueError: if the attention is not `"canvas"`, the tower has positions for a fixed number of frames or is in
                training, the cache is of another tower, grid or number of clips, or the gaze does not follow its frames.
        """
        self._new_key_values = {}  # those of a call that failed
        if attention != "canvas":
            raise ValueError(f"`cache` holds a canvas: `attention` must be 'canvas' to use it, got {attention!r}")
        if adapter.num_frames is not None:
            raise ValueError(
                f"`cache` cannot continue a {adapter.model_type} tower, whose positions are for clips of "
                f"{adapter.num_frames} frames; leave it out and give whole clips"
            )
        if any(layer.training for layer in adapter.layers) and (
            torch.is_grad_enabled() or any(getattr(layer, "gradient_checkpointing", False) for layer in adapter.layers)
        ):
            raise ValueError(
                "`cache` carries no gradients and cannot be used in training; give whole clips without it, or put "
                "the tower into evaluation mode"
            )
        if self._tower is not None:
            if self._tower() is not adapter.tower:
                raise ValueError("`cache` is of another tower; call `cache.reset()` or use a new GazeVisionCache")
            if self._grid != grid:
                raise ValueError(
                    f"`cache` is of the scales {self._grid.scales}, but this tower's are {grid.scales}; call "
                    "`cache.reset()` or use a new GazeVisionCache"
                )
            if self._batch_size != gaze.batch_size:
                raise ValueError(
                    f"`cache` is of {self._batch_size} clips, but `gaze` is of {gaze.batch_size}; call `cache.reset()` "
                    "or use a new GazeVisionCache"
                )
        if gaze.first_frame not in (None, self.num_frames):
            raise ValueError(
                f"`gaze` must follow the {self.num_frames} frames that `cache` has seen, got `first_frame` "
                f"{gaze.first_frame}; give the frames between, or begin both streams anew (`cache.reset()`)"
            )

    def extend(
        self, layer: int, visible: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Prepends the cached keys and values of a layer to new ones, and stores those of the tokens that stay visible.

        Args:
            layer (`int`): index of the layer.
            visible (`torch.LongTensor` of shape `(visible,)`): indices of the tokens that stay visible: [`Canvas`]`.tokens`.
            key, value (`torch.Tensor` of shape `(1, heads, tokens, head_dim)`): keys and values of the new tokens.

        Returns:
            `tuple`: the cached and new keys and values, `(1, heads, cached + tokens, head_dim)`.
        """
        if self.key_values:
            old_key, old_value = self.key_values[layer]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        visible = visible.to(key.device)
        self._new_key_values[layer] = key[:, :, visible].detach(), value[:, :, visible].detach()
        return key, value

    def commit(self, adapter: VisionAdapter, grid: GazeGrid, gaze: GazeOutput, canvas: Canvas, num_times: int) -> None:
        """
        Updates the cache at the end of a call.

        Args:
            adapter, grid, gaze: as for [`~GazeVisionCache.check`].
            canvas ([`Canvas`]): the canvas after the last frame.
            num_times (`int`): number of frames or tubelets of the call.
        """
        self._tower, self._grid, self._batch_size = weakref.ref(adapter.tower), grid, gaze.batch_size
        if self._new_key_values:  # Without kept patches no layer was called.
            self.key_values = [self._new_key_values[layer] for layer in sorted(self._new_key_values)]
        self._new_key_values = {}
        self.canvas = canvas
        self.num_frames += gaze.num_frames
        self.num_times += num_times
