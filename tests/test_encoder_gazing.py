import pytest
import torch
from transformers import CLIPImageProcessor, SiglipImageProcessor

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    AutoGazeVideoProcessor,
    GazeGrid,
    GreedyGazeConfig,
    GreedyGazeSelector,
)
from transformers_autogaze.integrations.encoder_gazing import EncoderFrameGazer


GRID = GazeGrid([16, 32], 8)


def gazer(selector=None, processor=None, grid: GazeGrid = GRID, chunk_frames: int = 16, max_batch_size: int = 16):
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=[16, 32], patch_size=8)) if selector is None else selector
    processor = AutoGazeVideoProcessor() if processor is None else processor
    return EncoderFrameGazer(selector, processor, AutoGazeVideoProcessor(), grid, chunk_frames, max_batch_size)


def autogaze() -> AutoGazeModel:
    torch.manual_seed(0)
    return AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64, max_num_frames=2)).eval()


def clip(num_frames: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("encoder", [SiglipImageProcessor, CLIPImageProcessor, AutoGazeVideoProcessor])
def test_the_selector_gets_the_pixels_in_its_own_normalisation(encoder):
    if getattr(encoder, "is_dummy", False):
        pytest.skip("this version's image processors need torchvision")
    levels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    square = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    expected = AutoGazeVideoProcessor(**square)(levels.numpy(), return_tensors="pt")["pixel_values_videos"][0]
    if encoder is AutoGazeVideoProcessor:
        processor, frames = AutoGazeVideoProcessor(**square), expected
    else:
        processor = encoder(**square)
        both = AutoGazeProcessor(AutoGazeVideoProcessor(**square), processor)(levels.numpy(), return_tensors="pt")
        frames = both["encoder_pixel_values"][0]
    torch.testing.assert_close(gazer(processor=processor).to_gaze_values(frames), expected, rtol=1e-5, atol=1e-5)


def test_chunks_are_one_clip_for_a_streaming_selector():
    video = clip(5)
    whole = gazer(chunk_frames=5).gaze([video], gazing_ratio=0.2)[0]
    chunked = gazer(chunk_frames=2).gaze([video], gazing_ratio=0.2)[0]
    assert torch.equal(chunked.gazing_pos, whole.gazing_pos)


def test_for_the_model_every_chunk_is_a_clip_of_its_own():
    own = gazer(autogaze(), chunk_frames=2)
    video = clip(5)
    whole = own.gaze([video], gazing_ratio=[0.5, 0.2])[0]
    assert whole.num_real_each_frame.tolist() == [[10, 4, 10, 4, 10]]
    middle = own.gaze([video[2:4]], gazing_ratio=[0.5, 0.2])[0]
    assert all(torch.equal(a[:, 2:4], b) for a, b in zip(whole.gazing_mask, middle.gazing_mask, strict=True))


@pytest.mark.parametrize("selector", [None, autogaze])
def test_each_video_is_gazed_at_separately(selector):
    def make(size: int) -> EncoderFrameGazer:
        return gazer(selector and selector(), chunk_frames=2, max_batch_size=size)

    videos = [clip(3, 64, 96, seed=1), clip(2, 64, 96, seed=2), clip(3, 64, 96, seed=3)]
    settings = {"gazing_ratio": 0.3, "tiles": (2, 3)}
    gazes = make(16).gaze(videos, **settings)
    assert [gaze.num_frames for gaze in gazes] == [3, 2, 3] and gazes[0].scales == [(32, 48), (64, 96)]
    for video, gaze, again in zip(videos, gazes, make(2).gaze(videos, **settings), strict=True):
        assert torch.equal(gaze.gazing_pos, again.gazing_pos)
        assert torch.equal(gaze.gazing_pos, make(1).gaze([video], **settings)[0].gazing_pos)


def test_the_model_gazes_at_each_tile_separately():
    own, video = gazer(autogaze(), chunk_frames=2), clip(3, 64, 96)
    gaze = own.gaze([video], gazing_ratio=0.3, tiles=(2, 3))[0]
    tiles = gaze.grid.split_tiles(gaze.gazing_mask, GRID)
    corner = own.gaze([video[..., 32:, 64:]], gazing_ratio=0.3)[0]
    assert all(torch.equal(tile[-1:], one) for tile, one in zip(tiles, corner.gazing_mask, strict=True))


@pytest.mark.parametrize("tiles", [(1, 1), (2, 2)])
def test_a_budget_for_the_clip_is_spent_over_all_chunks_and_tiles(tiles):
    still = clip(1).expand(6, -1, -1, -1).clone()
    budget = 40 * tiles[0] * tiles[1]
    still[4:] = clip(2, seed=1)  # only the last frames change
    gaze = gazer(chunk_frames=2, grid=GazeGrid([32], 8)).gaze([still], tiles=tiles, tokens_per_clip=budget)[0]
    counts = gaze.num_real_each_frame[0].tolist()
    again = gazer(chunk_frames=2, grid=GazeGrid([32], 8)).gaze(
        [still], tiles=tiles, tokens_per_clip=budget, task_loss_requirement=-1.0
    )[0]
    assert torch.equal(again.gazing_mask[0], gaze.gazing_mask[0])
    assert sum(counts) == budget and counts[1:4] == [0, 0, 0] and min(counts[0], counts[4]) > 5


def test_a_selector_that_takes_any_grid_gazes_on_it():
    video, grid = clip(3, 40, 48), GazeGrid([(24, 48)], 8)
    gaze = gazer(grid=grid).gaze([video], gazing_ratio=0.5)[0]
    assert gaze.grid == grid and gaze.num_real_each_frame.tolist() == [[9, 9, 9]]


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"cannot gaze for GazeGrid\(scales=\[32\], patch_size=8\)"):
        gazer(autogaze(), grid=GazeGrid([32], 8))
    with pytest.raises(ValueError, match="`processor` must be .* `image_mean`, .*, got dict"):
        gazer(processor={})
    with pytest.raises(
        ValueError, match=r"`tiles` must cut .*, got \(1, 3\) for frames of \(32, 32\) pixels in video 1"
    ):
        gazer().gaze([clip(2, 32, 48), clip(2)], gazing_ratio=0.1, tiles=(1, 3))
    with pytest.raises(ValueError, match=r"got \(0, 1\)"):
        gazer().gaze([clip(2)], gazing_ratio=0.1, tiles=(0, 1))
