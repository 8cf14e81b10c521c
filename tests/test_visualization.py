import numpy as np
import pytest
import torch

from transformers_autogaze import GazeGrid, GazeOutput
from transformers_autogaze.demo import render_demo_clip
from transformers_autogaze.gaze_pictures_autogaze import SCALE_COLOURS
from transformers_autogaze.visualization import contact_sheet, paint_gaze, side_by_side, to_frames


GRID = GazeGrid([16, 32], 16)


@pytest.fixture
def gaze() -> GazeOutput:
    """Two clips of two frames: the second keeps all of frame 0, and the lower right quarter of frame 1 finely."""
    coarse = torch.tensor([[[False], [False]], [[True], [False]]])
    fine = torch.zeros(2, 2, 4, dtype=torch.bool)
    fine[1, 1, 3] = fine[0, 0, 0] = fine[0, 1, 0] = True
    return GazeOutput.from_masks([coarse, fine], GRID)


def test_kept_patches_are_tinted_by_scale_and_the_rest_is_dimmed(gaze):
    painted = paint_gaze(np.full((2, 40, 40, 3), 100, np.uint8), gaze, clip=1)
    for frame, scale, (y, x) in ((0, 0, (5, 5)), (0, 0, (30, 30)), (1, 1, (30, 30))):
        expected = np.round((166 * 100 + 90 * np.array(SCALE_COLOURS[scale])) / 256)
        assert np.abs(painted[frame, y, x] - expected).max() <= 1
    assert (painted[1, 5, 5] == 25).all()
    assert (painted[1, 20, 20:] == SCALE_COLOURS[1]).all()
    with pytest.raises(ValueError, match="`frames` must be 2 as the gaze's, got 3"):
        paint_gaze(np.zeros((3, 8, 8, 3), np.uint8), gaze)


def test_panels_stand_side_by_side():
    left, right = np.zeros((2, 4, 6, 3), np.uint8), np.full((2, 4, 5, 3), 9, np.uint8)
    both = side_by_side([left, right], gap=3)
    assert both.shape == (2, 4, 14, 3)
    assert (both[:, :, :6] == 0).all() and (both[:, :, 6:9] == 255).all() and (both[:, :, 9:] == 9).all()


def test_a_contact_sheet_holds_every_frame():
    colours = [(40, 200, 10), (80, 200, 10), (120, 200, 10)]  # none of them in text, legend or ground
    frames = np.stack([np.full((30, 50, 3), colour, np.uint8) for colour in colours])
    sheet = np.asarray(contact_sheet([("first", frames), ("second", frames[:2])], [16, 32]))
    assert [(sheet == colour).all(-1).sum() for colour in colours] == [2 * 1500, 2 * 1500, 1500]
    assert np.asarray(contact_sheet([("first", frames)], [16], max_width=100)).shape[1] <= 100


def test_pixels_become_frames():
    pixels = torch.tensor([0.0, 0.5, 1.2, -1.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert to_frames(pixels, (2, 2))[:, 0, 0, 0].tolist() == [0, 128, 255, 0]
    assert to_frames(pixels, (5, 3)).shape == (4, 5, 3, 3)


def test_the_demo_clip_moves_cuts_and_pans():
    clip = render_demo_clip(num_frames=16, height=48, width=64)
    assert clip.shape == (16, 48, 64, 3) and clip.dtype == np.uint8
    change = np.abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3))
    assert change.argmax() == 9  # frame 10 is the first after the cut
    assert (change > 0).all()
    assert np.array_equal(clip, render_demo_clip(num_frames=16, height=48, width=64))
    with pytest.raises(ValueError, match="`num_frames` must be at least 2, got 1"):
        render_demo_clip(num_frames=1)
