"""The settings that a visitor chooses on the page, and the arguments of [`prune_video`] for them."""

import math
from dataclasses import dataclass
from typing import Any

from transformers_autogaze_cli.prune import SELECTORS

from ..grid_autogaze import GazeGrid
from ..video.tiles import choose_tile_grid
from .limits import Limits
from .mllm_tokens import MLLMS, NVILA, QWEN, QWEN_UNIT, mllm_grid


BUDGETS = {
    "Share of the whole clip": "clip_ratio",
    "Share of every frame": "gazing_ratio",
    "None: threshold alone": None,
}
"""Labels of the kinds of budgets, and the argument of [`prune_video`] that each sets."""
PATCHES = OWN, FOUR_SCALES, OF_MLLM = ("The selector's own", "Four scales (32 to 224 pixels)", "The MLLM's own")
"""Labels of the grids of patches that a selector can choose from."""
TILES = {"Whole frames, resized": "whole", "Grid of tiles": "grid", "Frames as large as they are": "native"}
"""Labels of the ways to resize or tile frames, and the value of `tiles` of [`prune_video`] for each."""
_FOUR_SCALES = GazeGrid([32, 64, 112, 224], patch_size=16)


@dataclass(frozen=True)
class Choices:
    """
    The settings that a visitor chooses.

    Args:
        selectors (`tuple[str, ...]`): names of one or two selectors.
        budget (`str`): one of [`BUDGETS`].
        ratio (`float`): share of patches to keep, above 0 and up to 1; ignored if there is no budget.
        threshold (`float`, *optional*): loss at which no further patches of a frame are chosen.
        num_frames (`int`): maximum number of frames to take.
        patches (`str`): one of [`PATCHES`].
        tiles (`str`): one of [`TILES`]; ignored for the MLLM's own patches.
        max_tiles (`int`): maximum number of tiles of a frame, for a grid of tiles.
        mllm (`str`): one of [`MLLMS`], the model whose tokens are counted.

    Raises:
        ValueError: if a setting is out of range, or there is neither a budget nor a threshold.
    """

    selectors: tuple[str, ...]
    budget: str
    ratio: float
    threshold: float | None
    num_frames: int
    patches: str
    tiles: str
    max_tiles: int
    mllm: str

    def __post_init__(self):
        options = {
            "Budget": (self.budget, BUDGETS),
            "Patches": (self.patches, PATCHES),
            "Frames are seen as": (self.tiles, TILES),
            "MLLM": (self.mllm, MLLMS),
        } | {f"Selector {number}": (name, SELECTORS) for number, name in enumerate(self.selectors, 1)}
        for label, (choice, known) in options.items():
            if choice not in known:
                raise ValueError(f"{label} must be one of {', '.join(known)}, got {choice!r}.")
        if not _is_number(self.ratio) or not 0 < self.ratio <= 1:
            raise ValueError(f"The share must be a number above 0 and up to 1, got {self.ratio!r}.")
        if self.threshold is not None and not _is_number(self.threshold):
            raise ValueError(f"The threshold must be a number, or empty, got {self.threshold!r}.")
        for label, value in (("Frames", self.num_frames), ("Tiles", self.max_tiles)):
            if not _is_number(value) or value != int(value) or value < 1:
                raise ValueError(f"{label} must be a whole number of at least 1, got {value!r}.")
        if BUDGETS[self.budget] is None and self.threshold is None:
            raise ValueError("Without a budget there must be a threshold.")

    @property
    def frames_of_token(self) -> int:
        """Number of consecutive frames that each token covers."""
        return QWEN_UNIT.frames if self.patches == OF_MLLM and self.mllm == QWEN else 1

    def settings(self) -> dict[str, Any]:
        """Returns budget and threshold as arguments of [`prune_video`]."""
        budget = BUDGETS[self.budget]
        settings: dict[str, Any] = {} if budget is None else {budget: float(self.ratio)}
        return settings if self.threshold is None else settings | {"task_loss_requirement": float(self.threshold)}

    def layout(self) -> dict[str, Any]:
        """Returns `tiles` and `max_tiles` as arguments of [`prune_video`]."""
        if self.patches == OF_MLLM:
            tiles = "grid" if self.mllm == NVILA else "whole"
        else:
            tiles = TILES[self.tiles]
        return {"tiles": tiles} | ({"max_tiles": int(self.max_tiles)} if tiles == "grid" else {})

    def grid(self, height: int, width: int) -> GazeGrid | None:
        """Returns the grid of patches to choose from in frames of this size; `None` for the selector's own grid."""
        if self.patches == OWN:
            return None
        return _FOUR_SCALES if self.patches == FOUR_SCALES else mllm_grid(self.mllm, height, width)

    def count_frames(self, total: int, limits: Limits) -> int:
        """
        Returns the number of frames to take from a video that has `total` frames.

        Raises:
            ValueError: if the setting is above the limit, or there are fewer frames than a token covers.
        """
        if self.num_frames > limits.frames:
            raise ValueError(f"Frames must be {limits.frames} at most, got {self.num_frames}.")
        count = min(int(self.num_frames), total)
        count -= count % self.frames_of_token
        if count == 0:
            raise ValueError(
                f"{self.mllm} sees pairs of frames: the video and the choice must be of 2 frames at least."
            )
        return count

    def count_pixels(self, tile_size: tuple[int, int], height: int, width: int) -> int:
        """Returns how many pixels the selector processes for a frame of this size."""
        layout = self.layout()
        if layout["tiles"] == "native":
            return height * width
        rows = cols = 1
        if layout["tiles"] == "grid":
            rows, cols = choose_tile_grid(height * tile_size[1], width * tile_size[0], layout["max_tiles"])
        return rows * cols * tile_size[0] * tile_size[1]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
