import colorsys

import numpy as np
import pytest
import torch

from transformers_autogaze import GazeGrid, GazeOutput
from transformers_autogaze.gaze_pictures_autogaze import SCALE_COLOURS, draw_legend, draw_text, name_scales
from transformers_autogaze.pruning.scene_cuts import SceneCuts
from transformers_autogaze.video.demo import render_demo_clip
from transformers_autogaze.video.visualization import (
    FrameView,
    OverlayDrawer,
    contact_sheet,
    draw_timeline,
    paint_gaze,
    panel_size,
    side_by_side,
    to_frames,
)


GRID = GazeGrid([16, 32], 16)


@pytest.fixture
def gaze() -> GazeOutput:
    """Two clips of two frames: the second keeps all of frame 0, and the lower right quarter of frame 1 finely."""
    coarse = torch.tensor([[[False], [False]], [[True], [False]]])
    fine = torch.zeros(2, 2, 4, dtype=torch.bool)
    fine[1, 1, 3] = fine[0, 0, 0] = fine[0, 1, 0] = True
    return GazeOutput.from_masks([coarse, fine], GRID)


GROUNDS = {
    "black": (0, 0, 0),
    "dark": (40, 30, 20),
    "orange": (240, 130, 20),
    "blue": (20, 60, 230),
    "white": (255,) * 3,
}


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("scale", range(len(SCALE_COLOURS)))
def test_the_hue_of_a_fill_is_that_of_its_scale_on_any_background(ground, scale):
    grid = GazeGrid([16 * (1 + index) for index in range(len(SCALE_COLOURS))], 16)
    gaze = GazeOutput.full(grid, 1, 1, scale=scale)
    side = 20 * (1 + scale)
    painted = paint_gaze(np.full((1, side, side, 3), GROUNDS[ground], np.uint8), gaze)
    fill, own = painted[0, 10, 10] / 255, np.array(SCALE_COLOURS) / 255
    hues = [colorsys.rgb_to_hsv(*colour)[0] for colour in own]
    distances = [abs((colorsys.rgb_to_hsv(*fill)[0] - hue + 0.5) % 1 - 0.5) for hue in hues]
    assert np.argmin(distances) == scale and min(distances) < 0.02
    assert colorsys.rgb_to_hsv(*fill)[1] > 0.3
    with pytest.raises(ValueError, match="`frames` must be 1 as the gaze's, got 3"):
        paint_gaze(np.zeros((3, 8, 8, 3), np.uint8), gaze)


def test_dropped_patches_have_no_hue(gaze):
    painted = paint_gaze(np.full((2, 40, 40, 3), (200, 100, 0), np.uint8), gaze, clip=1)
    assert painted[1, 5, 5].tolist() == [35, 35, 35]
    assert (painted[0] != 35).any(-1).all()


def test_a_patch_stays_visible_under_finer_ones():
    covered = GazeOutput.full(GRID, 1, 1)
    painted = paint_gaze(np.full((1, 80, 80, 3), 128, np.uint8), covered)[0]
    is_coarse, is_fine = ((painted == colour).all(-1) for colour in SCALE_COLOURS[:2])
    outline = np.ones((80, 80), bool)
    outline[2:-2, 2:-2] = False
    assert (is_coarse == outline).all()
    assert is_fine[10, 39] and is_fine[40, 70] and not is_fine[10, 10]


def test_tiny_blocks_have_fills_alone():
    gaze = GazeOutput.full(GazeGrid([160], 16), 1, 1)
    painted = paint_gaze(np.full((1, 50, 50, 3), 128, np.uint8), gaze)
    assert (painted == painted[0, 0, 0]).all() and tuple(painted[0, 0, 0]) != SCALE_COLOURS[0]


def test_a_legend_continues_in_the_next_line():
    names = name_scales(GazeGrid([32, 64, 112, (224, 448)], 16), 448, 896)
    assert names[0] == "32, coarsest: blocks of 448x224 pixels" and names[1] == "64: blocks of 224x112 pixels"
    assert names[3] == "448x224, finest: blocks of 32x32 pixels"
    wide, narrow = draw_legend(names, 2000), draw_legend(names, 400)
    for picture in (wide, narrow):
        pixels = np.asarray(picture)
        for colour in SCALE_COLOURS[:4]:
            assert (pixels == colour).all(-1).sum() >= 18**2
        # No text is cut off at the right.
        assert (pixels[:, -2:] == 255).all()
    assert narrow.height > wide.height


@pytest.mark.parametrize("width", [60, 300, 1000])
def test_text_fits_whatever_the_width(width):
    pixels = np.asarray(draw_text("frame 12345   1234.56 s\n196 of 196 patches, 1234567 so far", width))
    assert pixels.shape[1] == width and pixels.min() < 128
    assert width < 200 or (pixels[:, -2:] == 255).all()


def test_a_timeline_shows_patches_scales_and_cuts():
    counts = np.array([[4, 16]] + [[1, 3]] * 9 + [[0, 20]] + [[0, 2]] * 9)
    pixels = np.asarray(draw_timeline(counts, [10], width=200, duration=2.0))[-80:]
    coarse, fine = ((pixels == colour).all(-1).sum(0) for colour in SCALE_COLOURS[:2])
    assert coarse[5] == 16 and fine[5] == 64 and coarse[50] == 4 and fine[50] == 12 and fine[105] == 80
    is_red = (pixels == (220, 0, 0)).all(-1).all(0)
    assert is_red[100] and is_red.sum() <= 4
    # A frame with many patches is visible even with more frames than pixels.
    many = np.ones((1000, 1), int)
    many[501] = 50
    assert (np.asarray(draw_timeline(many, [], width=100))[-80:] == SCALE_COLOURS[0]).all(-1).sum(0)[50] == 80


def test_an_overlay_has_the_numbers_of_a_frame():
    panel = np.zeros((30, 240, 3), np.uint8)
    views = [
        FrameView(frame, frame, frame / 10, kept, 5, kept, 4, ["16: blocks of 4x4"], [panel] * 3)
        for frame, kept in ((0, 3), (1, 0))
    ]
    assert views[0].status == "frame 0   0.00 s   3 of 5 patches   3 tokens so far, 1.3x fewer than a dense encoder's"
    assert views[1].caption == "frame 1   0.10 s\n0 of 5 patches, 0 so far"
    plain, timed = OverlayDrawer(2), OverlayDrawer(2, draw_timeline(np.ones((2, 1), int), [], 728))
    frames = [plain.draw(view) for view in views]
    assert frames[0].shape == frames[1].shape and not np.array_equal(*frames)
    assert np.array_equal(frames[0][-30:, :240], panel)
    nows = [np.flatnonzero((timed.draw(view)[-80:] == 0).all((0, 2))) for view in views]
    assert abs(nows[0].mean() - 182) <= 1 and abs(nows[1].mean() - 546) <= 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [((448, 800), (448, 800)), ((1080, 1920), (448, 796)), ((60, 100), (224, 373)), ((16, 1600), (13, 1344))],
)
def test_panels_are_neither_too_small_nor_too_large(size, expected):
    assert panel_size(*size) == expected


def test_panels_are_side_by_side():
    left, right = np.zeros((2, 4, 6, 3), np.uint8), np.full((2, 4, 5, 3), 9, np.uint8)
    both = side_by_side([left, right], gap=3)
    assert both.shape == (2, 4, 14, 3)
    assert (both[:, :, :6] == 0).all() and (both[:, :, 6:9] == 255).all() and (both[:, :, 9:] == 9).all()


def test_a_contact_sheet_has_every_frame():
    colours = [(40, 200, 10), (80, 200, 10), (120, 200, 10)]  # none of them in text, legend or background
    frames = np.stack([np.full((30, 50, 3), colour, np.uint8) for colour in colours])
    sheet = np.asarray(contact_sheet([("first", frames), ("second", frames[:2])], [16, 32]))
    assert [(sheet == colour).all(-1).sum() for colour in colours] == [2 * 1500, 2 * 1500, 1500]
    assert np.asarray(contact_sheet([("first", frames)], [16], max_width=100)).shape[1] <= 100


def test_pixels_are_converted_to_frames():
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


@pytest.mark.parametrize("part", [1, 5, 16])
def test_cuts_are_found_but_not_motion_and_flashes(part):
    clip = render_demo_clip(num_frames=32, height=96, width=128)
    clip[10] = 255 - clip[10]  # a flash
    found = SceneCuts()
    for first in range(0, 32, part):
        found.add(torch.from_numpy(clip[first : first + part]).permute(0, 3, 1, 2))
    assert found.cuts == [20]
