import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from transformers_autogaze import GazeGrid, GazeOutput
from transformers_autogaze.cells_autogaze import PatchSearch, _resize_matrix
from transformers_autogaze.composite_autogaze import (
    CompositeReconstruction,
    mse_to_task_loss,
    task_loss_to_mse,
)


EXAMPLE = Path(__file__).parents[2] / "shared" / "videos" / "example_input.mp4"
NESTED = GazeGrid([16, 32, 64], 16)
CROSSING = GazeGrid([16, 32, 48], 16)  # blocks of 24 and of 16 pixels cut across each other
RECTANGULAR = GazeGrid([(16, 32), (32, 64)], 16)
FLAT = GazeGrid([(16, 32), (16, 64), (48, 64)], 16)
PUBLISHED = GazeGrid([32, 64, 112, 224], 16)
GRIDS = [NESTED, CROSSING, RECTANGULAR, FLAT]


def make_clips(grid, batch=2, num_frames=3, dtype=torch.float64, seed=0):
    """Coarse blobs that change from frame to frame, with fine texture here and there and some clipping."""
    generator = torch.Generator().manual_seed(seed)
    height, width = grid.sizes[-1]

    def noise(rows, cols):
        coarse = torch.randn(batch * num_frames, 3, rows, cols, generator=generator, dtype=torch.float64)
        return F.interpolate(coarse, size=(height, width), mode="bilinear").view(batch, num_frames, 3, height, width)

    scene = noise(4, 4)[:, :1] + 0.3 * noise(4, 4) + noise(height, width) * (noise(8, 8) > 0.7)
    return (0.5 + 0.4 * scene).clamp(0, 1).to(dtype)


def random_masks(grid, batch, num_frames, seed=0, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, num_frames, n, generator=generator) < share for n in grid.num_patches_each_scale]


def masks_of(grid, found):
    """The masks of what a search chose."""
    batch, num_frames, _ = found.ids.shape
    mask = torch.zeros(batch, num_frames, grid.num_patches + 1, dtype=torch.bool)
    mask.scatter_(2, found.ids.where(found.ids >= 0, grid.num_patches), True)
    return grid.split_by_scale(mask[..., :-1])


def draw_patches(grid, frame):
    """Every patch of a frame `(3, H, W)` by the book, one at a time: its box and its pixels there."""
    height, width = grid.sizes[-1]
    boxes = grid.boxes(torch.arange(grid.num_patches), height, width).long().tolist()
    scale, row, col = (index.tolist() for index in grid.locate(torch.arange(grid.num_patches)))
    smalls = [
        F.interpolate(frame[None], size=size, mode="bicubic", antialias=True, align_corners=False)
        for size in grid.sizes
    ]
    size, drawn = grid.patch_size, []
    for index, (left, top, right, bottom) in enumerate(boxes):
        small = smalls[scale[index]]
        patch = small[..., row[index] * size : (row[index] + 1) * size, col[index] * size : (col[index] + 1) * size]
        block = F.interpolate(patch, size=(bottom - top, right - left), mode="bicubic", align_corners=False)
        drawn.append(((slice(None), slice(top, bottom), slice(left, right)), block[0].clamp(0, 1)))
    return drawn


def paste(previous, drawn, ids):
    image = previous.clone()
    for index in sorted(ids):  # coarse to fine
        box, block = drawn[index]
        image[box] = block
    return image


def greedy_by_hand(grid, clip, budgets, max_error=None):
    """Greedy search that pastes the pixels of every candidate at every step, for one clip `(T, 3, H, W)`."""
    current = torch.full_like(clip[0], 0.5)
    ids, errors = [], []
    for t, frame in enumerate(clip):
        drawn, chosen, measured = draw_patches(grid, frame), [], []
        while len(chosen) < budgets[t] and not (measured and max_error is not None and measured[-1] <= max_error[t]):
            candidates = [index for index in range(grid.num_patches) if index not in chosen]
            mse = [float((paste(current, drawn, [*chosen, index]) - frame).square().mean()) for index in candidates]
            least = min(mse)
            # Lowest id among what is equal but for rounding.
            chosen.append(next(i for i, error in zip(candidates, mse, strict=True) if error <= least + 1e-12))
            measured.append(least)
        current = paste(current, drawn, chosen)
        ids.append(chosen)
        errors.append(measured)
    return ids, errors


@pytest.mark.parametrize("old, new, antialias", [(224, 112, True), (224, 64, True), (48, 16, True), (16, 112, False)])
def test_resize_matrices_equal_torch(old, new, antialias):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, old, 40, generator=generator)
    expected = F.interpolate(image, size=(new, 40), mode="bicubic", antialias=antialias, align_corners=False)
    torch.testing.assert_close(_resize_matrix(old, new, antialias).float() @ image, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("grid", [*GRIDS, PUBLISHED], ids=str)
def test_reconstruction_equals_pasting_patch_by_patch(grid, dtype, tolerance):
    clips = make_clips(grid, batch=2, num_frames=2)
    masks = random_masks(grid, 2, 2)
    got = CompositeReconstruction(grid).reconstruct(clips.to(dtype), masks)
    assert got.dtype == dtype and got.shape == clips.shape
    for b in range(2):
        image = torch.full_like(clips[0, 0], 0.5)
        for t in range(2):
            ids = torch.cat([mask[b, t] for mask in masks]).nonzero()[:, 0].tolist()
            image = paste(image, draw_patches(grid, clips[b, t]), ids)
            torch.testing.assert_close(got[b, t].double(), image, atol=tolerance, rtol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_reconstruction_is_exact_when_every_finest_patch_is_kept(grid):
    clips = make_clips(grid, dtype=torch.float32)
    masks = random_masks(grid, 2, 3)
    masks[-1] = torch.ones_like(masks[-1])
    assert torch.equal(CompositeReconstruction(grid).reconstruct(clips, masks), clips)


def test_uncovered_pixels_keep_the_previous_frame_and_grey_before_the_first():
    composite = CompositeReconstruction(NESTED)
    clips = make_clips(NESTED, num_frames=4)
    masks = random_masks(NESTED, 2, 4, share=0.15)
    masks[0][:] = False  # the coarsest patch covers everything
    covered = GazeOutput.from_masks(masks, NESTED).coverage(64, 64)[:, :, None].expand_as(clips)
    got = composite.reconstruct(clips, masks)
    before = torch.cat([torch.full_like(clips[:, :1], 0.5), got[:, :-1]], dim=1)
    assert not covered.all() and torch.equal(got[~covered], before[~covered])
    assert (got[covered] != before[covered]).double().mean() > 0.9


def test_reconstruction_takes_a_gaze_and_refuses_one_of_another_grid():
    composite = CompositeReconstruction(NESTED)
    clips = make_clips(NESTED)
    gaze = GazeOutput.from_masks(random_masks(NESTED, 2, 3), NESTED)
    assert torch.equal(composite.reconstruct(clips, gaze), composite.reconstruct(clips, gaze.gazing_mask))
    other = GazeOutput.from_masks(random_masks(CROSSING, 2, 3), CROSSING)
    with pytest.raises(ValueError, match=r"`gaze` must be one of GazeGrid\(scales=\[16, 32, 64\]"):
        composite.reconstruct(clips, other)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_equals_greedy_search_on_pixels(grid):
    clips = make_clips(grid)
    budgets = [grid.num_patches, 3, grid.num_patches // 2]
    found = CompositeReconstruction(grid).search(clips, budgets)
    assert found.ids.shape == found.mse.shape == (2, 3, grid.num_patches)
    for b in range(2):
        ids, errors = greedy_by_hand(grid, clips[b], budgets)
        for t, budget in enumerate(budgets):
            assert found.ids[b, t].tolist() == ids[t] + [-1] * (grid.num_patches - budget)
            expected = torch.tensor(errors[t] + errors[t][-1:] * (grid.num_patches - budget), dtype=torch.float64)
            torch.testing.assert_close(found.mse[b, t], expected, atol=1e-10, rtol=0)


def test_search_with_thresholds_equals_greedy_search_on_pixels():
    clips = make_clips(CROSSING)
    max_error = torch.tensor([[0.01, 0.05, 0.002], [0.03, 0.0, 1.0]], dtype=torch.float64)
    found = CompositeReconstruction(CROSSING).search(clips, [9, 9, 9], max_error)
    for b in range(2):
        ids, _ = greedy_by_hand(CROSSING, clips[b], [9, 9, 9], max_error[b].tolist())
        assert found.counts[b].tolist() == [len(frame) for frame in ids]
        assert [frame[frame >= 0].tolist() for frame in found.ids[b]] == ids


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_measured_errors_are_those_of_the_reconstructed_pixels(grid, dtype, tolerance):
    composite = CompositeReconstruction(grid)
    clips = make_clips(grid, dtype=dtype)
    max_error = torch.full((2, 3), 0.01, dtype=dtype)
    found = composite.search(clips, [7, 2, 5], max_error)
    rebuilt = composite.reconstruct(clips, masks_of(grid, found))
    mse = (rebuilt - clips).square().mean((2, 3, 4))
    torch.testing.assert_close(found.mse[..., -1], mse, atol=tolerance, rtol=1e-5)
    assert torch.equal(found.reconstruction, rebuilt[:, -1])
    assert found.mse.dtype == found.reconstruction.dtype == dtype


def test_a_frame_ends_with_the_first_choice_that_meets_the_threshold():
    composite = CompositeReconstruction(NESTED)
    clips = make_clips(NESTED, batch=4, dtype=torch.float32)
    max_error = torch.tensor([0.02, 0.004, 0.0005, -torch.inf])[:, None].expand(4, 3)
    found = composite.search(clips, [12, 12, 12], max_error)
    assert len(set(found.counts[:, 0].tolist())) >= 3 and (found.counts[3] == 12).all()
    met = found.mse <= max_error[..., None]
    assert (met[..., -1] | (found.counts == 12)).all()
    first = torch.where(met.any(-1), met.int().argmax(-1) + 1, 12)
    assert torch.equal(found.counts, first)
    assert torch.equal((found.ids >= 0).sum(-1), found.counts)
    last = found.mse.gather(-1, found.counts[..., None] - 1)
    ended = torch.arange(12) >= found.counts[..., None]
    assert torch.equal(found.mse[ended], last.expand_as(found.mse)[ended])


def test_at_least_one_patch_is_chosen_however_loose_the_threshold():
    found = CompositeReconstruction(NESTED).search(make_clips(NESTED), [5, 5, 5], torch.full((2, 3), torch.inf))
    assert (found.counts == 1).all() and (found.ids[..., 0] >= 0).all() and (found.ids[..., 1:] == -1).all()
    still = make_clips(NESTED, num_frames=1)
    found = CompositeReconstruction(NESTED).search(still, [5], torch.zeros(2, 1), previous=still[:, 0])
    assert (found.counts == 1).all() and (found.mse == 0).all()


@pytest.mark.parametrize("with_threshold", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_clip_gets_in_a_batch_what_it_gets_alone(grid, with_threshold):
    composite = CompositeReconstruction(grid)
    clips = make_clips(grid, batch=5, dtype=torch.float32)
    max_error = torch.logspace(-1, -5, 5)[:, None].expand(5, 3) if with_threshold else None
    together = composite.search(clips, [8, 3, 5], max_error)
    for b in range(5):
        alone = composite.search(clips[b : b + 1], [8, 3, 5], None if max_error is None else max_error[b : b + 1])
        for got, expected in zip(alone, together, strict=True):
            assert torch.equal(got[0], expected[b])


@pytest.mark.parametrize(
    "limits", [None, torch.logspace(-1, -5, 5), torch.full((5,), torch.inf), torch.full((5,), -torch.inf)]
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_steps_on_fixed_memory_find_the_same(grid, limits, monkeypatch):
    composite = CompositeReconstruction(grid)
    clips = make_clips(grid, batch=5, dtype=torch.float32)
    max_error = None if limits is None else limits[:, None].expand(5, 3)
    expected = composite.search(clips, [10, 3, 5], max_error)
    monkeypatch.setattr(PatchSearch, "_replays_steps", staticmethod(lambda device: True))
    for _ in range(2):  # the second uses the memory of the first
        for got, wanted in zip(composite.search(clips, [10, 3, 5], max_error), expected, strict=True):
            assert torch.equal(got, wanted)
    assert len(composite._search.replayed) == 1
    twin = copy.deepcopy(composite)
    assert not twin._search.replayed and torch.equal(twin.search(clips, [10, 3, 5], max_error).ids, expected.ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_finds_what_the_cpu_finds():
    composite = CompositeReconstruction(GRIDS[0])
    clips = make_clips(GRIDS[0], batch=3, dtype=torch.float32)
    expected = composite.search(clips, [10, 3, 5])
    for _ in range(3):  # as it is, captured, replayed
        found = composite.search(clips.cuda(), [10, 3, 5])
        assert (found.ids.cpu() == expected.ids).float().mean() >= 0.99
        torch.testing.assert_close(found.mse.cpu(), expected.mse, rtol=1e-3, atol=1e-7)


def test_every_frame_uses_up_its_own_budget_without_a_threshold():
    clips = make_clips(NESTED)
    found = CompositeReconstruction(NESTED).search(clips, torch.tensor([1, 21, 4]))
    assert found.counts.tolist() == [[1, 21, 4]] * 2
    assert torch.equal((found.ids >= 0).sum(-1), found.counts)
    assert found.ids[:, 1].sort(-1).values.tolist() == [list(range(21))] * 2
    assert (found.mse[:, 1, -1] == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_error_of_a_frame_never_rises(grid):
    found = CompositeReconstruction(grid).search(make_clips(grid, dtype=torch.float32), [grid.num_patches] * 3)
    assert (found.mse.diff(dim=-1) <= 0).all()


def test_equal_gains_go_to_the_lowest_id():
    grey = torch.full((1, 2, 3, 64, 64), 0.5)
    found = CompositeReconstruction(NESTED).search(grey, [21, 4])
    assert found.ids[0, 0].tolist() == list(range(21)) and found.ids[0, 1, :4].tolist() == [0, 1, 2, 3]
    # Coarse patches would blur a frame that is there already; the finest cost nothing.
    still = make_clips(NESTED, num_frames=1)
    found = CompositeReconstruction(NESTED).search(still, [6], previous=still[:, 0])
    assert found.ids[:, 0].tolist() == [[*range(5, 11)]] * 2 and (found.mse == 0).all()


def test_streaming_frame_by_frame_equals_the_whole_clip():
    composite = CompositeReconstruction(CROSSING)
    clips = make_clips(CROSSING, num_frames=4, dtype=torch.float32)
    budgets, max_error = [5, 2, 7, 3], torch.full((2, 4), 0.01)
    whole = composite.search(clips, budgets, max_error)
    rebuilt = composite.reconstruct(clips, masks_of(CROSSING, whole))
    previous = None
    for t, budget in enumerate(budgets):
        frame = clips[:, t : t + 1]
        found = composite.search(frame, [budget], max_error[:, t : t + 1], previous)
        assert torch.equal(found.ids[:, 0], whole.ids[:, t, :budget])
        assert torch.equal(found.counts[:, 0], whole.counts[:, t])
        image = composite.reconstruct(frame, masks_of(CROSSING, found), previous)
        assert torch.equal(image[:, 0], rebuilt[:, t]) and torch.equal(found.reconstruction, image[:, 0])
        previous = found.reconstruction


def test_a_call_gives_the_frames_asked_for_and_their_task_losses():
    composite = CompositeReconstruction(NESTED)
    clips = make_clips(NESTED, num_frames=4)
    gaze = GazeOutput.from_masks(random_masks(NESTED, 2, 4), NESTED)
    rebuilt = composite.reconstruct(clips, gaze)
    loss = 2 + (rebuilt - clips).square().mean((2, 3, 4)).log10() / 2
    every = composite(clips, gaze)
    assert torch.equal(every.reconstruction, rebuilt)
    torch.testing.assert_close(every.loss, loss)
    some = composite(clips, gaze, frames=[2, 0])
    assert torch.equal(some.reconstruction, rebuilt[:, [2, 0]])
    torch.testing.assert_close(some.loss, loss[:, [2, 0]])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_error_after_each_choice_is_that_of_the_patches_so_far(grid):
    composite = CompositeReconstruction(grid)
    clips = make_clips(grid)
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([4, 6, 3])
    order = torch.stack([torch.randperm(grid.num_patches, generator=generator) for _ in range(6)]).view(2, 3, -1)
    ids = torch.cat([order[:, t, :count] + t * grid.num_patches for t, count in enumerate(counts.tolist())], dim=1)
    is_padding = torch.zeros(2, 13, dtype=torch.bool)
    is_padding[0, [2, 12]] = is_padding[1, 9] = True
    gaze = GazeOutput.from_ids(ids, is_padding, counts, grid)
    mse = composite.measure(clips, gaze)
    for slot, frame in enumerate(gaze.frame_of_slot.tolist()):
        later = is_padding | (torch.arange(13) > slot)
        so_far = GazeOutput.from_ids(ids, later, counts, grid)
        expected = (composite.reconstruct(clips, so_far) - clips).square().mean((2, 3, 4))[:, frame]
        torch.testing.assert_close(mse[:, slot], expected, atol=1e-9, rtol=0)


def test_the_search_knows_the_error_after_each_choice():
    composite = CompositeReconstruction(CROSSING)
    clips = make_clips(CROSSING, dtype=torch.float32)
    found = composite.search(clips, [7, 7, 7])
    ids = found.ids + torch.arange(3)[:, None] * CROSSING.num_patches
    gaze = GazeOutput.from_ids(ids.flatten(1), torch.zeros(2, 21, dtype=torch.bool), torch.tensor([7] * 3), CROSSING)
    assert torch.equal(composite.measure(clips, gaze), found.mse.flatten(1))


def gaze_of(grid, ids):
    """A gaze of ids `(batch, frames, patches)`, counted from their frame."""
    num_frames, count = ids.shape[1:]
    first = torch.arange(num_frames)[:, None] * grid.num_patches
    ids = (ids + first).flatten(1)
    return GazeOutput.from_ids(ids, torch.zeros_like(ids, dtype=torch.bool), torch.full((num_frames,), count), grid)


@pytest.mark.parametrize("step_size", [1, 3, 20])
def test_the_search_goes_on_from_its_own_choices_as_it_did(step_size):
    clip, composite = make_clips(CROSSING), CompositeReconstruction(CROSSING)
    found = composite.search(clip, [8] * clip.shape[1])
    following = composite.continuations(clip, gaze_of(CROSSING, found.ids), step_size)
    assert torch.equal(following, found.ids.flatten(1))


@pytest.mark.parametrize("grid", GRIDS)
def test_each_step_goes_on_from_what_others_chose_with_the_best_patch(grid):
    clip, composite = make_clips(grid, num_frames=2), CompositeReconstruction(grid)
    generator = torch.Generator().manual_seed(0)
    count = min(4, grid.num_patches - 1)
    ids = torch.stack([torch.randperm(grid.num_patches, generator=generator)[:count] for _ in range(4)]).view(2, 2, -1)
    gaze = gaze_of(grid, ids)
    following = composite.continuations(clip, gaze, step_size=2).view(2, 2, -1)
    rebuilt = composite.reconstruct(clip, gaze)
    for b, t, slot in itertools.product(range(2), range(2), range(count)):
        previous = rebuilt[b, t - 1] if t else torch.full_like(clip[b, 0], 0.5)
        # In the step's second slot, its first choice is taken as well.
        kept = ids[b, t, : slot - slot % 2].tolist() + following[b, t, slot - slot % 2 : slot].tolist()
        drawn = draw_patches(grid, clip[b, t])
        left = [patch for patch in range(grid.num_patches) if patch not in kept]
        errors = {
            patch: float((paste(previous, drawn, [*kept, patch]) - clip[b, t]).square().mean()) for patch in left
        }
        assert errors[int(following[b, t, slot])] == pytest.approx(min(errors.values()), abs=1e-9)


def test_a_step_of_no_patches_is_refused():
    clip, composite = make_clips(CROSSING), CompositeReconstruction(CROSSING)
    gaze = gaze_of(CROSSING, torch.zeros(2, 3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="`step_size` must be at least 1, got 0"):
        composite.continuations(clip, gaze, 0)


def test_cell_errors_are_those_of_the_previous_frame_and_of_each_scale():
    composite = CompositeReconstruction(CROSSING)
    clips = make_clips(CROSSING, num_frames=2)
    frame, previous = clips[:, 1], clips[:, 0]
    errors = composite.cell_errors(frame, previous)
    assert errors.shape == (2, 4, 6, 6)
    pictures = [previous]
    for scale in range(3):
        masks = [torch.full((2, 1, n), s == scale) for s, n in enumerate(CROSSING.num_patches_each_scale)]
        pictures.append(composite.reconstruct(frame[:, None], masks)[:, 0])
    for got, picture in zip(errors.unbind(1), pictures, strict=True):
        expected = F.avg_pool2d((picture - frame).square(), 8, divisor_override=1).sum(1)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frames": []}, r"`frames` must name at least one frame, each in 0..2, got \[\]"),
        ({"frames": [0, 3]}, r"`frames` must name .* got \[0, 3\]"),
        (
            {"pixels": make_clips(NESTED)[:, :2]},
            r"`pixels` must be of shape \(2, 3, 3, 64, 64\), .* got \(2, 2, 3, 64",
        ),
        ({"gaze": GazeOutput.from_masks(random_masks(CROSSING, 2, 3), CROSSING)}, r"`gaze` must be one of GazeGrid"),
    ],
)
def test_bad_arguments_of_a_call_are_refused(options, message):
    gaze = GazeOutput.from_masks(random_masks(NESTED, 2, 3), NESTED)
    with pytest.raises(ValueError, match=message):
        CompositeReconstruction(NESTED)(**{"pixels": make_clips(NESTED), "gaze": gaze, **options})


def test_autocast_changes_nothing():
    composite = CompositeReconstruction(NESTED)
    clips = make_clips(NESTED, dtype=torch.float32)
    masks = random_masks(NESTED, 2, 3)
    found, rebuilt = composite.search(clips, [6, 6, 6]), composite.reconstruct(clips, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(composite.search(clips, [6, 6, 6]), found, strict=True))
        assert torch.equal(composite.reconstruct(clips, masks), rebuilt)


def test_task_loss_is_psnr_on_the_scale_of_thresholds():
    mse = 10 ** -torch.tensor([2.0, 2.6, 4.0, 5.0], dtype=torch.float64)
    loss = torch.tensor([1.0, 0.7, 0.0, -0.5], dtype=torch.float64)
    torch.testing.assert_close(mse_to_task_loss(mse), loss)
    torch.testing.assert_close(task_loss_to_mse(loss), mse)
    assert mse_to_task_loss(torch.zeros(2)).tolist() == [-3.0, -3.0]


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the example clip is not there")
def test_psnr_and_threshold_on_the_example_clip():
    av = pytest.importorskip("av")
    image = pytest.importorskip("PIL.Image")
    with av.open(str(EXAMPLE)) as container:
        frames = [frame.to_image() for _, frame in zip(range(32), container.decode(video=0), strict=False)]
    frames = np.stack([frame.resize((224, 224), image.Resampling.BILINEAR) for frame in frames])
    clips = torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(255).view(2, 16, 3, 224, 224)
    composite = CompositeReconstruction(PUBLISHED)
    for budget, least in ((26, [32.5, 30.8]), (66, [39.5, 38.0])):
        found = composite.search(clips, [budget] * 16)
        psnr = -10 * found.mse[..., -1].mean(-1).log10()
        assert (psnr >= torch.tensor(least)).all(), (budget, psnr)

    max_error = task_loss_to_mse(torch.full((2, 16), 0.7))
    found = composite.search(clips, [66] * 16, max_error)
    mse = (composite.reconstruct(clips, masks_of(PUBLISHED, found)) - clips).square().mean((2, 3, 4))
    below = found.counts < 66
    assert below.all() and (mse[below] <= 10**-2.6 * (1 + 1e-5)).all()
    assert torch.equal(composite.search(clips[1:], [66] * 16, max_error[1:]).ids[0], found.ids[1])


def test_cells_that_are_no_whole_pixels_are_refused():
    with pytest.raises(ValueError, match=r"`grid` .* 15x15 cells.* got \(80, 80\) pixels"):
        CompositeReconstruction(GazeGrid([48, 80], 16))


CLIPS = make_clips(NESTED)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (CLIPS[0], r"`pixels` must be of shape \(batch, frames, 3, 64, 64\).* got \(3, 3, 64, 64\)"),
        (CLIPS[..., :48], r"`pixels` must be of shape .* got \(2, 3, 3, 64, 48\)"),
        (CLIPS[:, :, :1], r"`pixels` must be of shape .* got \(2, 3, 1, 64, 64\)"),
        (CLIPS[:, :0], r"`pixels` must be of shape .* got \(2, 0, 3, 64, 64\)"),
        ((CLIPS * 255).byte(), r"`pixels` must be float32 or float64, got torch.uint8"),
        (CLIPS * 2 - 1, r"`pixels` must lie in 0..1, got -1..1: undo the normalisation"),
        (CLIPS * torch.nan, r"`pixels` must lie in 0..1, got nan..nan"),
    ],
)
def test_bad_pixels_are_refused(pixels, message):
    composite = CompositeReconstruction(NESTED)
    with pytest.raises(ValueError, match=message):
        composite.search(pixels, [1, 1, 1])
    with pytest.raises(ValueError, match=message):
        composite.reconstruct(pixels, random_masks(NESTED, 2, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budgets": [1, 1]}, r"`budgets` must be 3 whole numbers, one per frame, got \[1, 1\]"),
        (
            {"budgets": torch.full((3,), 0.5)},
            r"`budgets` must be 3 whole numbers, one per frame, got \[0.5, 0.5, 0.5\]",
        ),
        ({"budgets": [1, 0, 1]}, r"`budgets` must lie in 1..21, got \[1, 0, 1\]"),
        ({"budgets": [1, 22, 1]}, r"`budgets` must lie in 1..21, got \[1, 22, 1\]"),
        ({"max_error": torch.zeros(3)}, r"`max_error` must be of shape \(2, 3\), got \(3,\)"),
        ({"max_error": torch.full((2, 3), torch.nan)}, r"`max_error` must be numbers, .* got \[\[nan"),
        ({"previous": CLIPS[:1, 0]}, r"`previous` must be of shape \(2, 3, 64, 64\), got \(1, 3, 64, 64\)"),
    ],
)
def test_bad_search_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CompositeReconstruction(NESTED).search(CLIPS, **{"budgets": [1, 1, 1], **options})


def test_bad_masks_are_refused():
    composite = CompositeReconstruction(NESTED)
    masks = random_masks(NESTED, 2, 3)
    for bad in (masks[1:], [mask[:, :2] for mask in masks], [mask.float() for mask in masks]):
        with pytest.raises(ValueError, match=r"`gaze` must hold one mask per scale, of .*\(2, 3, 16\), torch.bool"):
            composite.reconstruct(CLIPS, bad)


def test_rebuilding_many_tiles_needs_no_table_of_all_patches_and_cells():
    """The table of which cells every patch covers takes 3 GB for 45 tiles; only the search on patches needs it."""
    grid = GazeGrid([(5 * side, 9 * side) for side in (32, 64, 112, 224)], patch_size=16)
    composite = CompositeReconstruction(grid)
    masks = [torch.ones(1, 1, patches, dtype=torch.bool) for patches in grid.num_patches_each_scale]
    pixels = torch.rand(1, 1, 3, *grid.sizes[-1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(composite.reconstruct(pixels, masks), pixels)
    assert composite._cached_scales is None
