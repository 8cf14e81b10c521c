"""Frames that cannot be pictures are refused on every path, and boxes of all others lie inside them."""

import numpy as np
import pytest
import torch
from test_modeling import scored, small_config
from test_video_mae import GRID, SMALL

from transformers_autogaze import (
    AutoGazeModel,
    AutoGazeProcessor,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeCache,
    GazeGrid,
    GazeOutput,
    GreedyGazeConfig,
    GreedyGazeSelector,
)
from transformers_autogaze.composite_autogaze import CompositeReconstruction
from transformers_autogaze.reconstruction import GazeVideoMAE, GazeVideoMAEConfig


BAD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e6]
SELECTORS = {
    "autogaze": lambda: AutoGazeModel(small_config()).eval(),
    "greedy": lambda: GreedyGazeSelector(GreedyGazeConfig(scales=[16, 32])),
    "finest": lambda: GreedyGazeSelector(GreedyGazeConfig(scales=[32], clip_ratio=0.25)),
    "features": lambda: FeatureGazeModel(
        FeatureGazeConfig(scales=[32], hidden_sizes=[8, 16, 32], depths=[1, 1, 1], feature_size=8)
    ).eval(),
}


@pytest.fixture(params=SELECTORS, scope="module")
def selector(request):
    torch.manual_seed(0)
    return SELECTORS[request.param]()


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("size", [32, 24])  # 24: the frames are resized first
def test_frames_that_cannot_be_are_refused(selector, video, bad, size):
    video = video[..., :size, :size].clone()
    video[1, 2, 0, 5, 7] = bad
    for settings in ({"gazing_ratio": 0.5}, {"gazing_ratio": 0.5, "task_loss_requirement": 0.2}, {}):
        with pytest.raises(ValueError, match="`pixel_values_videos` must not hold NaN or numbers.*first in frame 2"):
            selector.generate(video, **settings)


def test_a_stream_goes_on_after_a_frame_that_was_refused(selector, video):
    cache = selector.generate(video[:, :2], gazing_ratio=0.5, use_cache=True).cache
    expected = selector.generate(video, gazing_ratio=0.5).gazing_mask[-1][:, 2:]
    with pytest.raises(ValueError, match="`pixel_values_videos` must not hold NaN"):
        selector.generate(
            video[:, 2:3].masked_fill(video[:, 2:3] > 2, torch.nan), gazing_ratio=0.5, past_key_values=cache
        )
    gaze = selector.generate(video[:, 2:], gazing_ratio=0.5, past_key_values=cache)
    assert torch.equal(gaze.gazing_mask[-1], expected)


def test_a_refused_first_frame_leaves_a_cache_empty(video):
    cache = GazeCache()
    with pytest.raises(ValueError, match="`pixel_values_videos` must not hold NaN"):
        SELECTORS["autogaze"]().generate(video * torch.nan, gazing_ratio=0.5, past_key_values=cache)
    assert cache.batch_size is None and cache.num_frames == 0


@pytest.mark.parametrize("bad", BAD)
def test_tiles_and_scoring_and_reconstructions_refuse_them_too(video, bad):
    model = SELECTORS["autogaze"]()
    gaze = model.generate(video, gazing_ratio=0.5)
    tiles = torch.zeros(1, 2, 3, 64, 64)
    tiles[0, 1, 0, 63, 63] = bad
    with pytest.raises(ValueError, match="`pixel_values_videos` must not hold NaN"):
        model.generate(tiles, gazing_ratio=0.5, target_scales=[32, 64], target_patch_size=16)
    video = video.clone()
    video[1, 2, 0, 5, 7] = bad
    with pytest.raises(ValueError, match="`pixel_values_videos` must not hold NaN"):
        scored(model, video, gaze)
    pixels = torch.where(video.abs() < 10, video.clamp(0, 1), video)
    for reconstruction in (CompositeReconstruction(GRID), GazeVideoMAE(GazeVideoMAEConfig(**SMALL))):
        with pytest.raises(ValueError, match="`pixels` must lie in 0..1"):
            reconstruction(pixels, GazeOutput.full(GRID, 2, 4))


@pytest.mark.parametrize("bad", BAD)
def test_the_processor_refuses_them_too(bad):
    frames = np.full((3, 16, 16, 3), 0.5)
    frames[1, 2, 3, 0] = bad
    with pytest.raises(ValueError, match=r"`videos\[0\]` must hold integers in 0..255, or floats"):
        AutoGazeProcessor()(videos=frames)


def test_boxes_end_where_the_frame_ends_and_neighbours_share_their_edges():
    for grid in (GazeGrid([32, 64, 112, 224], 16), GazeGrid([(48, 112)], 16), GazeGrid([14 * 29], 14)):
        ids = torch.arange(grid.num_patches)
        for height, width in ((96, 96), (1, 1), (97, 31), (2161, 3839), (7, 100_003)):
            boxes = grid.boxes(ids, height, width)
            assert boxes.dtype == torch.float32
            assert boxes[:, 2].max() == width and boxes[:, 3].max() == height and boxes.min() == 0
            for part, (rows, cols) in zip(boxes.split(grid.num_patches_each_scale), grid.grids, strict=True):
                part = part.view(rows, cols, 4)
                assert torch.equal(part[:, 1:, 0], part[:, :-1, 2]) and torch.equal(part[1:, :, 1], part[:-1, :, 3])
