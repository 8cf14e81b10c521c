import json

import pytest
import torch
from published import SHARED
from safetensors.torch import load_file

from transformers_autogaze import GazeGrid, GazeOutput


PUBLISHED = GazeGrid([32, 64, 112, 224], 16)
RECTANGULAR = GazeGrid([(16, 32), (48, 64)], 16)


def random_gaze(grid: GazeGrid = PUBLISHED, batch: int = 2, frames: int = 3, seed: int = 0) -> GazeOutput:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(batch, frames, n, generator=generator) < 0.3 for n in grid.num_patches_each_scale]
    masks[0][:, :, 0] = True
    return GazeOutput.from_masks(masks, grid)


def test_published_ids_run_over_scales_then_rows():
    scale, row, col = PUBLISHED.locate(torch.tensor([0, 3, 4, 19, 20, 68, 69, 264]))
    assert scale.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert row.tolist() == [0, 1, 0, 3, 0, 6, 0, 13]
    assert col.tolist() == [0, 1, 0, 3, 0, 6, 0, 13]


@pytest.mark.parametrize("grid", [PUBLISHED, RECTANGULAR])
def test_ids_and_places_are_inverse(grid):
    ids = torch.arange(grid.num_patches)
    assert torch.equal(grid.ids(*grid.locate(ids)), ids)


@pytest.mark.parametrize("size", [(0, 8), (8, -1)])
def test_boxes_need_a_frame_with_pixels(size):
    with pytest.raises(ValueError, match="`height` and `width` must be at least 1, got "):
        GazeGrid([16, 32], 8).boxes(torch.arange(3), *size)


@pytest.mark.parametrize("size", [(100, 100), (37, 53)])
@pytest.mark.parametrize("grid", [PUBLISHED, RECTANGULAR])
def test_boxes_of_every_scale_tile_the_frame(grid, size):
    boxes = grid.boxes(torch.arange(grid.num_patches), *size)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for part, box in zip(
        areas.split(grid.num_patches_each_scale), boxes.split(grid.num_patches_each_scale), strict=True
    ):
        assert part.sum().item() == pytest.approx(size[0] * size[1], rel=1e-5)
        assert box[0, :2].tolist() == [0, 0]
        assert box[-1, 2:].tolist() == pytest.approx([size[1], size[0]])


def test_boxes_of_a_rectangular_grid_follow_its_rows_and_columns():
    assert RECTANGULAR.grids == ((1, 2), (3, 4))
    last_of_first_row = RECTANGULAR.ids(torch.tensor(1), torch.tensor(0), torch.tensor(3))
    assert RECTANGULAR.boxes(last_of_first_row, height=30, width=40).tolist() == [30, 0, 40, 10]


@pytest.mark.parametrize("grid", [PUBLISHED, RECTANGULAR])
def test_masks_and_ids_are_inverse(grid):
    gaze = random_gaze(grid)
    masks = grid.masks_from_ids(gaze.gazing_pos, ~gaze.if_padded_gazing, gaze.num_frames)
    for given, read in zip(gaze.gazing_mask, masks, strict=True):
        assert torch.equal(given, read)


def test_ids_from_masks_ascend_and_pad_to_the_longest_count_of_a_frame():
    grid = GazeGrid([16, 32], 16)
    masks = [
        torch.tensor([[[True], [False]], [[False], [False]]]),
        torch.tensor([[[False, True, False, False], [True] * 4], [[False] * 4, [False, False, True, False]]]),
    ]
    ids, is_padding, counts = grid.ids_from_masks(masks)
    assert counts.tolist() == [2, 4]
    assert ids.tolist() == [[0, 2, 6, 7, 8, 9], [-1, -1, 8, 4, 4, 4]]
    assert is_padding.tolist() == [[False] * 6, [True, True, False, True, True, True]]


def test_tiles_and_whole_frame_are_inverse():
    whole = GazeGrid([(48, 64), (96, 128)], 16)
    tile = GazeGrid([16, 32], 16)
    assert whole.tile_layout(tile) == (3, 4)
    masks = random_gaze(whole).gazing_mask
    back = whole.stitch_tiles(whole.split_tiles(masks, tile), tile)
    assert all(torch.equal(a, b) for a, b in zip(masks, back, strict=True))


def test_tiles_beyond_the_frame_are_cropped_and_padded():
    whole, tile = GazeGrid([28, 56, 98], 14), GazeGrid([16, 32, 64], 16)
    assert whole.tile_layout(tile) == (2, 2)
    video = torch.rand(1, 2, 3, 98, 98)
    tiles = whole.cut_tiles(video, tile)
    assert tiles.shape == (4, 2, 3, 56, 56)
    assert torch.equal(tiles[0], video[0, ..., :56, :56])
    assert torch.equal(tiles[3, ..., :42, :42], video[0, ..., 56:, 56:])
    assert not tiles[3, ..., 42:, :].any() and not tiles[3, ..., 42:].any()
    full = [torch.ones(4, 2, n, dtype=torch.bool) for n in tile.num_patches_each_scale]
    assert [mask.shape[-1] for mask in whole.stitch_tiles(full, tile)] == list(whole.num_patches_each_scale)
    assert all(mask.all() for mask in whole.stitch_tiles(full, tile))


def test_counts_and_ratios_ignore_padding():
    gaze = random_gaze()
    kept = torch.cat(gaze.gazing_mask, dim=-1)
    assert torch.equal(gaze.num_real_each_frame, kept.sum(-1))
    assert torch.equal(gaze.num_real, kept.sum((1, 2)))
    assert gaze.kept_ratio.tolist() == pytest.approx((kept.sum((1, 2)) / (3 * 265)).tolist())
    assert gaze.reduction_factor.tolist() == pytest.approx((3 * 196 / kept.sum((1, 2))).tolist())


def test_statistics_are_plain_numbers():
    gaze = random_gaze(RECTANGULAR)
    statistics = json.loads(json.dumps(gaze.statistics(1)))
    assert statistics["num_frames"] == 3 and statistics["num_patches"] == int(gaze.num_real[1])
    assert statistics["patches_each_frame"] == gaze.num_real_each_frame[1].tolist()
    assert list(statistics["patches_each_scale"]) == ["16x32", "48x64"]
    assert sum(statistics["patches_each_scale"].values()) == statistics["num_patches"]


def test_ids_each_frame_count_from_their_frame():
    gaze = random_gaze()
    for clip in range(2):
        for frame, ids in enumerate(gaze.ids_each_frame(clip)):
            kept = torch.cat(gaze.gazing_mask, dim=-1)[clip, frame].nonzero().flatten()
            assert torch.equal(ids, kept)


def test_boxes_of_padding_are_empty():
    gaze = random_gaze()
    boxes = gaze.boxes(224, 448)
    assert gaze.if_padded_gazing.any()
    assert not boxes[gaze.if_padded_gazing].any()
    assert (boxes[~gaze.if_padded_gazing][:, 2:] > boxes[~gaze.if_padded_gazing][:, :2]).all()


@pytest.mark.parametrize("size", [(224, 224), (50, 33)])
def test_coverage_marks_the_pixels_whose_centre_lies_in_a_box(size):
    gaze = random_gaze()
    covered = gaze.coverage(*size)
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    for clip in range(2):
        expected = torch.zeros(3, *size, dtype=torch.bool)
        for slot in range(gaze.gazing_pos.shape[1]):
            left, top, right, bottom = gaze.boxes(*size)[clip, slot]
            expected[gaze.frame_of_slot[slot]] |= (x >= left) & (x < right) & (y >= top) & (y < bottom)
        assert torch.equal(covered[clip], expected)


def test_the_finest_kept_patch_of_a_pixel_is_told():
    grid = GazeGrid([16, 32], 16)
    masks = [torch.tensor([[[True], [False]]]), torch.tensor([[[False, True, False, False], [False] * 4]])]
    finest = GazeOutput.from_masks(masks, grid).finest_patches(4, 2)
    assert finest[0, 0].tolist() == [[0, 2], [0, 2], [0, 0], [0, 0]]
    assert (finest[0, 1] == -1).all()


@pytest.mark.parametrize("grid", [PUBLISHED, RECTANGULAR])
def test_kept_patches_are_cut_from_the_resized_frames(grid):
    gaze = random_gaze(grid)
    video = torch.rand(2, 3, 3, *grid.sizes[-1])
    patches = gaze.gather_patches(video)
    assert not patches[gaze.if_padded_gazing].any()
    for clip, slot in [(0, 0), (1, 5), (0, gaze.gazing_pos.shape[1] - 2), (1, gaze.gazing_pos.shape[1] // 2)]:
        if gaze.if_padded_gazing[clip, slot]:
            continue
        frame = int(gaze.frame_of_slot[slot])
        scale, row, col = (int(n) for n in grid.locate(gaze.gazing_pos[clip, slot] - frame * grid.num_patches))
        resized = torch.nn.functional.interpolate(video[clip, frame][None], grid.sizes[scale], mode="bicubic")[0]
        expected = resized[:, row * 16 : row * 16 + 16, col * 16 : col * 16 + 16]
        torch.testing.assert_close(patches[clip, slot], expected)
    with pytest.raises(ValueError, match=r"`video` must have the shape \(2, 3\)"):
        gaze.gather_patches(video[:, :2])


def test_select_gives_the_clip_as_it_is_alone():
    gaze = random_gaze()
    alone = GazeOutput.from_masks([mask[1:] for mask in gaze.gazing_mask], gaze.grid)
    for picked in (gaze.select(1), gaze.select(-1)):
        assert picked.keys() == alone.keys()
        for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame", "clip_num_gazing_each_frame"):
            assert torch.equal(picked[key], alone[key]), key
    with pytest.raises(ValueError, match="`clip` must lie in 0..1, got 2"):
        gaze.select(2)


def test_concatenate_joins_in_time():
    first, second = random_gaze(seed=1), random_gaze(seed=2, frames=2)
    joined = GazeOutput.concatenate([first, second])
    masks = [torch.cat(parts, dim=1) for parts in zip(first.gazing_mask, second.gazing_mask, strict=True)]
    assert torch.equal(joined.gazing_pos, GazeOutput.from_masks(masks, PUBLISHED).gazing_pos)
    assert joined.num_frames == 5
    assert torch.equal(joined.num_real_each_frame, torch.cat([g.num_real_each_frame for g in (first, second)], 1))
    with pytest.raises(ValueError, match=r"`gazes\[1\].batch_size` is 1, but that of the first is 2"):
        GazeOutput.concatenate([first, second.select(0)])
    with pytest.raises(ValueError, match="at least one"):
        GazeOutput.concatenate([])


def test_the_output_has_the_published_keys_and_works_as_a_dictionary():
    gaze = random_gaze()
    for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame", "gazing_mask", "scales"):
        assert gaze[key] is getattr(gaze, key)
    assert gaze["frame_sampling_rate"] == 1 and gaze["num_vision_tokens_each_frame"] == 265


@pytest.mark.parametrize(
    ("scales", "patch_size", "message"),
    [
        ([], 16, "`scales` must be a list"),
        ("32+64", 16, "`scales` must be a list"),
        ([32, 60], 16, r"`scales\[1\]` must be a positive multiple of the patch size 16, got 60"),
        ([0, 32], 16, r"`scales\[0\]`"),
        ([64, 32], 16, "must ascend"),
        ([32, 32], 16, "must ascend"),
        ([(32, 64, 3)], 16, r"`scales\[0\]`"),
        ([32], 0, "`patch_size` must be a positive"),
    ],
)
def test_bad_scales_are_named(scales, patch_size, message):
    with pytest.raises(ValueError, match=message):
        GazeGrid(scales, patch_size)


def test_bad_ids_and_grids_are_named():
    with pytest.raises(ValueError, match="`ids` must lie in 0..264, got 3..265"):
        PUBLISHED.locate(torch.tensor([3, 265]))
    with pytest.raises(ValueError, match="`scale`, `row` and `col`"):
        PUBLISHED.ids(torch.tensor(0), torch.tensor(0), torch.tensor(2))
    with pytest.raises(ValueError, match="`gazing_pos` must lie in 0..529"):
        PUBLISHED.masks_from_ids(torch.tensor([[530]]), torch.tensor([[True]]), 2)
    with pytest.raises(ValueError, match="`scales` must be 4"):
        GazeGrid([64, 128], 16).tile_layout(PUBLISHED)
    with pytest.raises(ValueError, match="give only 4x4 there"):
        GazeGrid([112, 128, 224, 448], 16).tile_layout(PUBLISHED)
    with pytest.raises(ValueError, match="`video` must be .448, 448. pixels"):
        GazeGrid([64, 128, 224, 448], 16).cut_tiles(torch.zeros(1, 1, 3, 448, 224), PUBLISHED)


@pytest.mark.skipif(not (SHARED / "fixtures" / "birds").exists(), reason="the published gaze is not here")
@pytest.mark.parametrize("name", ["official", "official_seed_clip"])
def test_masks_of_the_published_ids_equal_the_published_masks(name):
    published = load_file(SHARED / "fixtures" / "birds" / f"{name}.safetensors")
    counts, is_padding = published["num_gazing_each_frame"], published["if_padded_gazing"].bool()
    gaze = GazeOutput.from_ids(published["gazing_pos"], is_padding, counts, PUBLISHED)
    for index, mask in enumerate(gaze.gazing_mask):
        assert torch.equal(mask, published[f"gazing_mask_{index}"].bool())
    assert gaze.num_real.tolist() == [int((~is_padding).sum())]


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 3), (14, 14), (20, 31)])
def test_covered_cells_are_those_that_share_an_area_with_a_kept_patch(rows, cols):
    gaze = random_gaze(frames=2, seed=3)
    # In frames of this size every edge is a whole number: the cells' and those of grids of 2, 4, 7 and 14 rows.
    height, width = 28 * rows, 28 * cols
    expected = torch.zeros(gaze.batch_size, gaze.num_frames, rows, cols, dtype=torch.bool)
    boxes, frame_of_slot = gaze.boxes(height, width).round().long(), gaze.frame_of_slot
    for clip in range(gaze.batch_size):
        for slot in (~gaze.if_padded_gazing[clip]).nonzero().flatten().tolist():
            left, top, right, bottom = boxes[clip, slot].tolist()
            cells = expected[clip, frame_of_slot[slot]]
            cells[top // 28 : -(-bottom // 28), left // 28 : -(-right // 28)] = True
    assert torch.equal(gaze.covered_cells(rows, cols), expected)


def test_full_gaze_keeps_every_patch_of_the_scales_named():
    grid = GazeGrid([16, 32], patch_size=16)
    assert GazeOutput.full(grid, batch_size=2, num_frames=3).kept_ratio.tolist() == [1, 1]
    coarse = GazeOutput.full(grid, batch_size=1, num_frames=2, scale=0)
    assert coarse.gazing_pos.tolist() == [[0, 5]] and not coarse.if_padded_gazing.any()
    with pytest.raises(IndexError):
        GazeOutput.full(grid, batch_size=1, num_frames=2, scale=2)


@pytest.mark.parametrize(
    "image_size, patch_size, scales",
    [
        (224, 16, [32, 64, 112, 224]),
        (384, 14, [56, 112, 196, 392]),  # the published example
        (336, 14, [56, 112, 196, 392]),
        (224, 14, [28, 56, 98, 196]),
        (384, 16, [64, 128, 224, 448]),
        (224, 32, [64, 128, 224, 448]),
        ((224, 448), 16, [(32, 64), (64, 128), (112, 224), (224, 448)]),
    ],
)
def test_grid_for_an_encoder_is_whole_tiles_of_its_patches(image_size, patch_size, scales):
    tile = GazeGrid([32, 64, 112, 224], patch_size=16)
    grid = tile.for_encoder(image_size, patch_size)
    assert grid == GazeGrid(scales, patch_size)
    rows, cols = grid.tile_layout(tile)
    for whole, part in zip(grid.grids, tile.grids, strict=True):
        assert whole == (rows * part[0], cols * part[1])


def test_grid_for_an_encoder_names_what_does_not_fit():
    grid = GazeGrid([32, 64], patch_size=16)
    with pytest.raises(ValueError, match=r"`patch_size` must be that of square patches, got \(16, 8\)"):
        grid.for_encoder(224, (16, 8))
    with pytest.raises(ValueError, match="`image_size` must be at least the patch size 16, got 8"):
        grid.for_encoder(8, 16)


@pytest.mark.parametrize("scale, beyond", [(0, 0), (1, 0), (2, 1), (3, 0)])
def test_a_cut_patch_reads_its_own_pixels_and_at_half_size_one_beyond(scale, beyond):
    frames = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = PUBLISHED.ids(torch.tensor([scale]), torch.tensor([1]), torch.tensor([0]))
    left, top, right, bottom = (int(side) for side in PUBLISHED.boxes(ids, 224, 224)[0])
    read = torch.full_like(frames, torch.nan)
    box = (1, slice(None), slice(max(0, top - beyond), bottom + beyond), slice(max(0, left - beyond), right + beyond))
    read[box] = frames[box]
    patch = PUBLISHED.cut_patches(read, torch.tensor([1]), ids)
    assert torch.equal(patch, PUBLISHED.cut_patches(frames, torch.tensor([1]), ids))
    if beyond:
        read[1, :, top - beyond] = torch.nan
        assert PUBLISHED.cut_patches(read, torch.tensor([1]), ids).isnan().any()
