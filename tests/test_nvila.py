import copy

import pytest
import torch

from transformers_autogaze import GazeGrid, GazeOutput, GreedyGazeSelector
from transformers_autogaze.integrations.nvila import attach, gaze_to_nvila, nvila_to_gaze


GRID = GazeGrid([56, 112, 196, 392], patch_size=14)
FIELDS = ("gazing_pos", "num_gazing_each_frame", "if_padded_gazing")


class StandInProcessor:
    """
    A stand-in for the processor of NVILA-HD-Video, which is published as remote code: its attributes with their published
    defaults, and how it calls the method that gazes.
    """

    def __init__(self, **settings):
        self._autogaze_model = object()
        self.gazing_ratio_tile = [0.2] + [0.06] * 15
        self.task_loss_requirement_tile = 0.6
        self.gazing_ratio_thumbnail = 1
        self.task_loss_requirement_thumbnail = None
        self.max_batch_size_autogaze = 16
        self.__dict__.update(settings)

    def _get_gazing_info_from_videos(self, videos_inputs):
        raise AssertionError("the selector inside is still in its place")

    def __call__(self, tiles: list[torch.Tensor], thumbnails: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        videos_inputs = {
            "pixel_values_videos_tiles_autogaze": tiles,
            "pixel_values_videos_thumbnails_autogaze": thumbnails,
        }
        return self._get_gazing_info_from_videos(videos_inputs)


class Counting(GreedyGazeSelector):
    """Records the sizes of its batches."""

    def generate(self, pixel_values_videos, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append(len(pixel_values_videos))
        return super().generate(pixel_values_videos, *args, **kwargs)


def make_videos(tiles: list[int], frames: int = 2, size: int = 392) -> list[torch.Tensor]:
    """Makes videos whose tiles change little and have different amounts of detail."""
    generator = torch.Generator().manual_seed(sum(tiles))
    videos = []
    for count in tiles:
        cells = (
            torch.rand(count, 1, 3, size // 4, size // 4, generator=generator).expand(-1, frames, -1, -1, -1).clone()
        )
        cells[:, 1:, :, :10, :10] += 0.3
        cells *= torch.linspace(0.1, 3, count).view(-1, 1, 1, 1, 1)
        videos.append(cells.repeat_interleave(4, -1).repeat_interleave(4, -2))
    return videos


def attached(selector=None, **settings) -> StandInProcessor:
    processor = StandInProcessor(**settings)
    attach(processor, GreedyGazeSelector() if selector is None else selector)
    return processor


def test_returns_have_the_published_keys_shapes_and_types():
    info = attached()(make_videos([3, 2]), make_videos([1, 1]))
    assert sorted(info) == sorted(f"{field}_{kind}" for field in FIELDS for kind in ("tiles", "thumbnails"))
    for kind, clips in {"tiles": [3, 2], "thumbnails": [1, 1]}.items():
        for video, count in enumerate(clips):
            ids, counts, is_padding = (info[f"{field}_{kind}"][video] for field in FIELDS)
            slots = int(counts[0].sum())
            assert ids.shape == is_padding.shape == (count, slots) and counts.shape == (count, 2)
            assert (ids.dtype, counts.dtype, is_padding.dtype) == (torch.long, torch.long, torch.bool)
            assert ids.min() >= 0 and ids.max() < 2 * GRID.num_patches
    # The counts are those of the whole batch, so unused slots of a clip are padding.
    assert torch.equal(info["num_gazing_each_frame_tiles"][0][0], info["num_gazing_each_frame_tiles"][1][0])
    assert info["if_padded_gazing_tiles"][0].any()


def test_every_tile_is_gazed_at_as_alone():
    selector, videos = GreedyGazeSelector(), make_videos([3, 2])
    info = attached(selector)(videos, make_videos([1, 1]))
    for video, tiles in enumerate(videos):
        of_video = {key: value[video] for key, value in info.items()}
        gaze, _ = nvila_to_gaze(of_video, GRID)
        for tile in range(len(tiles)):
            alone = selector.generate(
                tiles[tile : tile + 1],
                gazing_ratio=[0.2, 0.06],
                task_loss_requirement=0.6,
                target_scales=GRID.scales,
                target_patch_size=14,
            )
            for mask, expected in zip(gaze.gazing_mask, alone.gazing_mask, strict=True):
                assert torch.equal(mask[tile : tile + 1], expected)


def test_a_learned_selector_gazes_for_the_scales_of_the_processor(tiny_model):
    torch.manual_seed(0)
    tiles = [torch.rand(2, 3, 3, 112, 112, dtype=torch.float64) for _ in range(2)]
    settings = {"target_scales": [28, 56, 112], "target_patch_size": 14, "max_batch_size_autogaze": 3}
    processor = attached(tiny_model, gazing_ratio_tile=0.3, task_loss_requirement_tile=None, **settings)
    info = processor(tiles, [video[:, :1] for video in tiles])
    gaze = tiny_model.generate(
        torch.cat(tiles), gazing_ratio=0.3, target_scales=settings["target_scales"], target_patch_size=14
    )
    assert torch.equal(torch.cat(info["gazing_pos_tiles"]), gaze.gazing_pos)
    assert info["num_gazing_each_frame_tiles"][1].tolist() == [gaze.num_gazing_each_frame.tolist()] * 2
    assert info["gazing_pos_thumbnails"][0].tolist() == [list(range(4 + 16 + 64))] * 2


@pytest.mark.parametrize("ratio", [1, 1.0, [1] * 16])
def test_a_full_gaze_skips_the_selector(ratio):
    selector = Counting()
    processor = attached(selector, gazing_ratio_tile=ratio, task_loss_requirement_tile=None)
    info = processor(make_videos([2]), make_videos([1], frames=1))
    assert not hasattr(selector, "batches")
    assert info["gazing_pos_tiles"][0].tolist() == [list(range(2 * 1060))] * 2
    assert info["num_gazing_each_frame_tiles"][0].tolist() == [[1060, 1060]] * 2
    assert not info["if_padded_gazing_tiles"][0].any()
    # With a threshold fewer patches may be kept.
    processor.task_loss_requirement_tile = 0.6
    assert processor(make_videos([2]), make_videos([1]))["gazing_pos_tiles"][0].shape[1] < 2 * 1060
    assert selector.batches == [2]


def test_clips_are_gazed_at_in_batches_of_the_processors_size():
    selector, videos, thumbnails = Counting(), make_videos([3, 2]), make_videos([1, 1])
    info = attached(selector, max_batch_size_autogaze=2)(videos, thumbnails)
    assert selector.batches == [2, 2, 1]
    whole = attached()(videos, thumbnails)
    for key, values in whole.items():
        assert all(torch.equal(value, other) for value, other in zip(values, info[key], strict=True))


def test_videos_of_different_lengths_are_padded_separately():
    long, short = make_videos([2], frames=3), make_videos([2], frames=2)
    info = attached()(long + short, make_videos([1, 1]))
    alone = [attached()(videos, make_videos([1])) for videos in (long, short)]
    for field in FIELDS:
        for video in range(2):
            assert torch.equal(info[f"{field}_tiles"][video], alone[video][f"{field}_tiles"][0])


def test_without_videos_there_is_nothing_to_gaze_at():
    assert attached()._get_gazing_info_from_videos({}) is None


def test_a_copied_processor_gazes_by_its_own_settings():
    processor = attached()
    other = copy.deepcopy(processor)
    other.gazing_ratio_tile, other.task_loss_requirement_tile = 0.5, None
    assert other(make_videos([1]), make_videos([1]))["num_gazing_each_frame_tiles"][0].tolist() == [[530, 530]]
    assert processor.gazing_ratio_tile[0] == 0.2


def test_conversions_are_inverse():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(3, 2, count, generator=generator) < 0.1 for count in GRID.num_patches_each_scale]
    tiles = GazeOutput.from_masks(masks, GRID)
    assert tiles.if_padded_gazing.any()
    thumbnails = tiles.select(1)
    info = gaze_to_nvila(tiles, thumbnails)
    for gaze, back in zip((tiles, thumbnails), nvila_to_gaze(info, GRID), strict=True):
        assert back.scales == gaze.scales and torch.equal(back.num_gazing_each_frame, gaze.num_gazing_each_frame)
        assert torch.equal(back.if_padded_gazing, gaze.if_padded_gazing)
        assert torch.equal(back.gazing_pos[~back.if_padded_gazing], gaze.gazing_pos[~gaze.if_padded_gazing])
        assert all(torch.equal(*pair) for pair in zip(back.gazing_mask, gaze.gazing_mask, strict=True))
    again = gaze_to_nvila(*nvila_to_gaze(info, GRID))
    assert all(torch.equal(again[key], value) for key, value in info.items())


def test_errors_name_the_argument_that_does_not_fit():
    with pytest.raises(
        ValueError, match="`processor` must be NVILA-HD-Video's, got object without _autogaze_model, _get"
    ):
        attach(object(), GreedyGazeSelector())
    with pytest.raises(ValueError, match="`gaze_model` must be a GazeSelector, got object"):
        attach(StandInProcessor(), object())
    with pytest.raises(ValueError, match="cannot gaze for .*: `scales` must be 4"):
        attach(StandInProcessor(target_scales=[196, 392], target_patch_size=14), GreedyGazeSelector())
    with pytest.raises(ValueError, match=r"`pixel_values_videos` must be \(392, 392\) pixels.* got \(224, 224\)"):
        attached()(make_videos([1], size=224), make_videos([1]))
    gaze = GazeOutput.from_masks([torch.ones(2, 1, 4, dtype=torch.bool)], GazeGrid([28], 14))
    info = gaze_to_nvila(gaze, gaze)
    with pytest.raises(
        ValueError, match="`info` must have the keys of one video, got none of the name if_padded_gazing_"
    ):
        nvila_to_gaze({key: value for key, value in info.items() if key != "if_padded_gazing_tiles"}, gaze.grid)
    with pytest.raises(ValueError, match="must be the tensor of one video, got list"):
        nvila_to_gaze({key: [value] for key, value in info.items()}, gaze.grid)
    counts = torch.tensor([[4], [3]])
    with pytest.raises(ValueError, match=r"must be the same for every clip .* got \[\[4\], \[3\]\]"):
        nvila_to_gaze({**info, "num_gazing_each_frame_tiles": counts}, gaze.grid)
