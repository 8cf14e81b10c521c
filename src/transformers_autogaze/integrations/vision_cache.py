"""
The state of a stream of frames in a vision tower whose tokens see the canvas.

This module keeps, layer by layer, the keys and values of the tokens that later frames can still see, and no others. Which
those are is `canvas`' matter, running a tower that of `vision`.
"""

import copy
import weakref

import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from .canvas import Canvas
from .vision_adapters import VisionAdapter


class GazeVisionCache:
    """
    What the frames of a stream leave behind in a [`GazeVisionModel`] for the frames that follow, with `"canvas"` attention.

    For every layer it holds the keys and values of the tokens that are visible: at most one for each place of the finest
    scale, however long the stream. It belongs to one tower, one grid and one batch of clips, those of the first call; no
    gradients flow through it. A call that fails leaves it as it was.

    Attributes:
        num_frames (`int`): frames of the gazes seen so far; a gaze that is continued (`first_frame`) begins there.
        num_times (`int`): frames seen so far as the tower counts them, tubelets where it has those.
        canvas ([`Canvas`]): the visible tokens and the places where they lie; `None` at first.
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

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the next frames begin a stream, of any tower, grid and batch."""
        self.num_frames = 0
        self.num_times = 0
        self.canvas: Canvas | None = None
        self.key_values: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._fresh: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tower: weakref.ref | None = None
        self._grid: GazeGrid | None = None
        self._batch_size: int | None = None

    def __getstate__(self) -> dict[str, object]:
        # Elsewhere the tower is another object.
        return {**self.__dict__, "_tower": None}

    def __deepcopy__(self, memo: dict[int, object]) -> "GazeVisionCache":
        other = type(self)()
        other.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        other._tower = self._tower
        return other

    @property
    def num_tokens(self) -> int:
        """Visible tokens of all clips: keys held in every layer."""
        return 0 if self.canvas is None else len(self.canvas.tokens)

    def check(self, adapter: VisionAdapter, grid: GazeGrid, gaze: GazeOutput, attention: str) -> None:
        """
        Checks that a call may go on with this cache, before any work.

        Args:
            adapter ([`VisionAdapter`]): that of the tower.
            grid (`GazeGrid`): the scales of the tower.
            gaze ([`GazeOutput`]): what is kept of the frames that follow.
            attention (`str`): that of the call.

        Raises:
            ValueError: if the attention is not `"canvas"`, the tower has positions for one number of frames, it trains,
                the cache is of another tower, grid or number of clips, or the gaze does not begin where the cache ends.
        """
        self._fresh = {}  # of a call that failed
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
        Puts the keys and values held for a layer before new ones, and takes along what will be visible.

        Args:
            layer (`int`): number of the layer.
            visible (`torch.LongTensor` of shape `(visible,)`): which of all these tokens will be: `tokens` of the canvas.
            key, value (`torch.Tensor` of shape `(1, heads, tokens, head_dim)`): of the new tokens.

        Returns:
            `tuple`: keys and values of all, `(1, heads, visible before + tokens, head_dim)`.
        """
        if self.key_values:
            old_key, old_value = self.key_values[layer]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        visible = visible.to(key.device)
        self._fresh[layer] = key[:, :, visible].detach(), value[:, :, visible].detach()
        return key, value

    def commit(self, adapter: VisionAdapter, grid: GazeGrid, gaze: GazeOutput, canvas: Canvas, num_times: int) -> None:
        """
        Ends a call: what its layers took along becomes the state.

        Args:
            adapter, grid, gaze: as for [`~GazeVisionCache.check`].
            canvas ([`Canvas`]): the canvas after the last frame.
            num_times (`int`): frames or tubelets of the call.
        """
        self._tower, self._grid, self._batch_size = weakref.ref(adapter.tower), grid, gaze.batch_size
        if self._fresh:  # Where nothing was kept, no layer ran and nothing changed.
            self.key_values = [self._fresh[layer] for layer in sorted(self._fresh)]
        self._fresh = {}
        self.canvas = canvas
        self.num_frames += gaze.num_frames
        self.num_times += num_times
