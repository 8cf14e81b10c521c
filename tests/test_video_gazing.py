import numpy as np
import pytest
import torch

from transformers_autogaze import (
    AutoGazeVideoProcessor,
    GazeGrid,
    GazeOutput,
    GreedyGazeConfig,
    GreedyGazeSelector,
    VideoTokenPruningPipeline,
    gaze_video,
    stream_gaze,
    write_video,
)
from transformers_autogaze.frame_decoding_autogaze import read_video
from transformers_autogaze.video.streaming import _prefetch
from transformers_autogaze.video.tiles import choose_tile_grid


SCALES, PATCH, SIDE = [16, 32], 8, 32
TILE = GazeGrid(SCALES, PATCH)


class Clips(GreedyGazeSelector):
    """The greedy selector on chunks that are clips of their own, like those of the learned model."""

    def generate(self, pixel_values_videos, past_key_values=None, **settings):
        assert past_key_values is None
        return super().generate(pixel_values_videos, **settings)


@pytest.fixture(scope="module")
def clips():
    config = GreedyGazeConfig(SCALES, PATCH)
    config.max_num_frames = 4
    return Clips(config)


@pytest.fixture(scope="module")
def stream():
    return GreedyGazeSelector(GreedyGazeConfig(SCALES, PATCH))


def moving(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks that move to the right over frames `(count, height, width, 3)`."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 5), -(-width // 5), 3), np.uint8)
    still = blocks.repeat(5, 0).repeat(5, 1)[:height, :width]
    return np.stack([np.roll(still, 2 * index, axis=1) for index in range(count)])


def values(frames: np.ndarray, size: tuple[int, int] | None = None) -> torch.Tensor:
    size = size and {"height": size[0], "width": size[1]}
    processor = AutoGazeVideoProcessor(do_resize=size is not None)
    return processor(frames, size=size, input_data_format="channels_last", return_tensors="pt")["pixel_values_videos"]


def published(frames: np.ndarray) -> torch.Tensor:
    """The processor's, and so the pipeline's, pixel values of whole frames."""
    return AutoGazeVideoProcessor()(frames, input_data_format="channels_last", return_tensors="pt")[
        "pixel_values_videos"
    ]


def same(one: GazeOutput, other: GazeOutput) -> bool:
    keys = ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame", "clip_num_gazing_each_frame")
    return (
        one.scales == other.scales
        and all(torch.equal(one[key], other[key]) for key in keys)
        and all(map(torch.equal, one.gazing_mask, other.gazing_mask))
    )


SETTINGS = {"gazing_ratio": 0.4, "task_loss_requirement": 0.5}


@pytest.mark.parametrize("sampling", [{}, {"num_frames": 6}, {"fps": 5}])
def test_chunks_of_a_file_are_the_gazes_of_their_frames(clips, tmp_path, sampling):
    path = write_video(tmp_path / "clip.mp4", moving(11, 36, 64), fps=10)
    frames, metadata = read_video(path, **sampling)
    chunks = list(stream_gaze(clips, path, **sampling, **SETTINGS))
    assert [chunk.start for chunk in chunks] == list(range(0, len(frames), 4))
    for chunk in chunks:
        own = frames[chunk.start : chunk.stop]
        assert np.array_equal(chunk.frames, own) and chunk.extent == (36, 64)
        assert chunk.frame_indices == metadata.frames_indices[chunk.start : chunk.stop]
        expected = clips.generate(published(own), **SETTINGS)
        assert same(chunk.gaze, expected) and torch.equal(
            chunk.gaze.task_loss_prediction, expected.task_loss_prediction
        )
        assert torch.equal(AutoGazeVideoProcessor().to_pixel_values(chunk.levels)[None], published(own))
    assert chunks[-1].stop == len(frames)
    whole = gaze_video(clips, path, **sampling, **SETTINGS)
    assert same(whole, GazeOutput.concatenate([chunk.gaze for chunk in chunks]))


def test_the_learned_model_gazes_chunk_by_chunk(tiny_model):
    frames = moving(tiny_model.config.max_num_frames + 1, 30, 50)
    ratio = [0.5] + [0.2] * (tiny_model.config.max_num_frames - 1)
    gaze = gaze_video(tiny_model, frames, gazing_ratio=ratio)
    video = published(frames).double()
    expected = [tiny_model.generate(video[:, :-1], gazing_ratio=ratio), tiny_model.generate(video[:, -1:], 0.5)]
    assert same(gaze, GazeOutput.concatenate(expected))


def test_whole_frames_give_the_gaze_of_the_pipeline(tiny_model):
    frames = moving(tiny_model.config.max_num_frames + 3, 36, 64)
    result = VideoTokenPruningPipeline(tiny_model, device="cpu")(frames, gazing_ratio=0.3)
    assert same(gaze_video(tiny_model, frames, gazing_ratio=0.3), result["gaze"])


def test_a_streaming_selector_continues_over_chunks(stream):
    frames = moving(7, 40, 64)
    expected = stream.generate(published(frames), **SETTINGS)
    assert same(gaze_video(stream, frames, chunk_frames=3, **SETTINGS), expected)
    tiled = [gaze_video(stream, frames, tiles="native", chunk_frames=n, **SETTINGS) for n in (2, 7)]
    assert same(*tiled)


@pytest.mark.parametrize(
    "height, width, max_tiles, layout", [(36, 64, 8, (2, 4)), (70, 33, 7, (2, 1)), (5, 7, 1, (1, 1))]
)
def test_a_grid_of_tiles_is_gazed_at_tile_by_tile(clips, height, width, max_tiles, layout):
    frames, (rows, cols) = moving(3, height, width), layout
    gaze = gaze_video(clips, frames, tiles="grid", max_tiles=max_tiles, **SETTINGS)
    video = values(frames, (rows * SIDE, cols * SIDE))
    assert gaze.grid.sizes == tuple((rows * scale, cols * scale) for scale in SCALES)
    for index, (mask, side) in enumerate(zip(gaze.gazing_mask, (2, 4), strict=True)):
        mask = mask.view(3, rows * side, cols * side)
        for row in range(rows):
            for col in range(cols):
                tile = video[..., row * SIDE : (row + 1) * SIDE, col * SIDE : (col + 1) * SIDE]
                alone = clips.generate(tile, **SETTINGS).gazing_mask[index].view(3, side, side)
                assert torch.equal(mask[:, row * side : (row + 1) * side, col * side : (col + 1) * side], alone)


@pytest.mark.parametrize("height, width", [(64, 96), (50, 41), (33, 32), (13, 20), (1, 1)])
def test_native_tiles_are_padded_and_patches_outside_the_frame_are_dropped(clips, height, width):
    frames = moving(3, height, width)
    (chunk,) = stream_gaze(clips, frames, tiles="native", **SETTINGS)
    rows, cols = -(-height // SIDE), -(-width // SIDE)
    grid = GazeGrid([(rows * scale, cols * scale) for scale in SCALES], PATCH)
    assert chunk.gaze.grid == grid and chunk.extent == (rows * SIDE, cols * SIDE)
    padded = torch.nn.functional.pad(values(frames), (0, cols * SIDE - width, 0, rows * SIDE - height))
    own = clips.config.grid
    tiles = clips.generate(grid.cut_tiles(padded, own), **SETTINGS)
    expected = grid.stitch_tiles(tiles.gazing_mask, own)
    for mask, everywhere, (high, wide) in zip(chunk.gaze.gazing_mask, expected, grid.grids, strict=True):
        inside = (torch.arange(high) * chunk.extent[0] // high < height)[:, None]
        inside = inside & (torch.arange(wide) * chunk.extent[1] // wide < width)
        assert torch.equal(mask, everywhere & inside.flatten())
    boxes = chunk.gaze.boxes(*chunk.extent)[~chunk.gaze.if_padded_gazing]
    assert (boxes[:, 0] < width).all() and (boxes[:, 1] < height).all() and len(boxes) == chunk.gaze.num_real


def test_a_single_tile_keeps_the_order_of_choice(clips):
    frames = moving(2, 20, 27)
    gaze = gaze_video(clips, frames, tiles="native", gazing_ratio=1)
    padded = torch.nn.functional.pad(values(frames), (0, SIDE - 27, 0, SIDE - 20))
    alone = clips.generate(padded, gazing_ratio=1)
    real = ~gaze.if_padded_gazing
    assert torch.equal(gaze.num_gazing_each_frame, alone.num_gazing_each_frame) and not real.all()
    assert torch.equal(gaze.gazing_pos[real], alone.gazing_pos[real])
    ids = gaze.ids_each_frame()
    assert any(frame.tolist() != sorted(frame.tolist()) for frame in ids)
    assert sorted(ids[0].tolist()) == torch.cat(gaze.gazing_mask, -1)[0, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("tiles", ["grid", "native"])
@pytest.mark.parametrize("name", ["clips", "stream"])
def test_the_batch_size_changes_nothing(request, name, tiles):
    selector, frames = request.getfixturevalue(name), moving(6, 70, 100)
    gazes = [
        gaze_video(
            selector, frames, tiles=tiles, max_tiles=6 if tiles == "grid" else None, max_batch_size=n, **SETTINGS
        )
        for n in (1, 4, 99)
    ]
    assert same(gazes[0], gazes[1]) and same(gazes[0], gazes[2])


@pytest.mark.parametrize("tiles", ["whole", "grid"])
def test_a_stream_continues_at_the_stop_of_a_chunk(clips, tmp_path, tiles):
    frames = moving(14, 32, 48)
    path = write_video(tmp_path / "clip.mp4", frames, fps=10)
    for source, sampling in ((path, {}), (path, {"num_frames": 9}), (frames, {"num_frames": 9}), (list(frames), {})):
        settings = {
            "tiles": tiles,
            "max_tiles": 6 if tiles == "grid" else None,
            "gazing_ratio": [0.9, 0.5, 0.1, 0.3],
            **sampling,
        }
        chunks = list(stream_gaze(clips, source, **settings))
        for done, chunk in enumerate(chunks[:-1]):
            rest = list(stream_gaze(clips, source, start_frame=chunk.stop, **settings))
            assert len(rest) == len(chunks) - done - 1
            for one, other in zip(rest, chunks[done + 1 :], strict=True):
                assert same(one.gaze, other.gaze) and np.array_equal(one.frames, other.frames)
                assert (one.start, one.stop, one.frame_indices) == (other.start, other.stop, other.frame_indices)
    expected = [chunk.start for chunk in stream_gaze(clips, frames, start_frame=5)]
    assert [chunk.start for chunk in stream_gaze(clips, iter(frames), start_frame=5)] == expected == [5, 9, 13]


def test_frames_are_read_chunk_by_chunk(clips):
    taken = []
    chunks = stream_gaze(clips, (taken.append(i) or frame for i, frame in enumerate(moving(20, 32, 32))))
    assert not taken
    for count in (4, 8, 12):
        assert next(chunks).stop == count == len(taken)


def test_prefetched_chunks_are_in_order_one_at_a_time():
    taken = []
    parts = _prefetch(taken.append(i) or np.full(2, i) for i in range(5))
    assert not taken
    for number, part in enumerate(parts):
        assert part.tolist() == [number] * 2 and len(taken) <= number + 2
    assert taken == list(range(5))


def test_errors_of_prefetched_chunks_are_raised_at_their_chunk():
    def parts():
        yield np.zeros(1)
        raise ValueError("broken frame")

    ahead = _prefetch(parts())
    assert next(ahead).tolist() == [0]
    with pytest.raises(ValueError, match="broken frame"):
        next(ahead)


@pytest.mark.parametrize("form", [iter, list, torch.from_numpy, lambda frames: (torch.from_numpy(f) for f in frames)])
def test_frames_may_be_of_many_types(clips, form):
    frames = moving(6, 32, 48)
    assert same(gaze_video(clips, form(frames)), gaze_video(clips, frames))


@pytest.mark.parametrize("count", [1, 3])
def test_short_videos_are_one_chunk(clips, count):
    (chunk,) = stream_gaze(clips, moving(count, 9, 7), gazing_ratio=[0.1, 0.2, 0.3, 0.4])
    assert (chunk.start, chunk.stop, chunk.gaze.num_frames, len(chunk.frames)) == (0, count, count, count)


def test_the_processors_normalisation_is_used():
    options = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "offset": False, "rescale_factor": 1 / 255}
    selector, frames = GreedyGazeSelector(GreedyGazeConfig(SCALES, PATCH, **options)), moving(4, 32, 32)
    ours = gaze_video(selector, frames, AutoGazeVideoProcessor(**options), **SETTINGS)
    assert same(ours, gaze_video(GreedyGazeSelector(GreedyGazeConfig(SCALES, PATCH)), frames, **SETTINGS))


@pytest.mark.parametrize(
    "height, width, max_tiles, layout",
    [
        (2160, 3840, 45, (5, 9)),
        (100, 100, 10, (3, 3)),
        (100, 100, 3, (1, 1)),
        (100, 200, 8, (2, 4)),
        (900, 100, 4, (4, 1)),
        (1, 5000, 48, (1, 48)),
    ],
)
def test_the_grid_fits_the_aspect_ratio(height, width, max_tiles, layout):
    assert choose_tile_grid(height, width, max_tiles) == layout


@pytest.mark.parametrize(
    "source, arguments, message",
    [
        (None, {"tiles": "foo"}, "`tiles` must be one of 'whole', 'grid', 'native', got 'foo'"),
        (None, {"max_tiles": 0}, "`max_tiles` must be a whole number of at least 1, got 0"),
        (None, {"max_tiles": 3}, "`max_tiles` needs `tiles=\"grid\"`, got 3 with `tiles='whole'`"),
        (None, {"chunk_frames": 0}, "`chunk_frames` must be a whole number of at least 1, got 0"),
        (None, {"max_batch_size": 2.5}, "`max_batch_size` must be a whole number of at least 1, got 2.5"),
        (None, {"start_frame": -1}, "`start_frame` must be a whole number of at least 0, got -1"),
        (None, {"start_frame": 6}, "`start_frame` must be below 6, the number of frames taken, got 6"),
        (None, {"gazing_ratio": [0.1] * 3}, "`gazing_ratio` must be one number or 4 of them"),
        (None, {"task_loss_requirement": [0.1] * 6}, "`task_loss_requirement` must be one number or 4 of them"),
        (None, {"gazing_ratio": 1.5}, "`gazing_ratio` must lie in 0..1"),
        (None, {"task_loss_requirement": float("nan")}, "`task_loss_requirement` must be numbers, got NaN"),
        (None, {"num_frames": 7}, "`num_frames` must be at most 6"),
        (None, {"fps": 2}, "`fps` needs a video file"),
        (iter([]), {"num_frames": 7}, "`num_frames` needs a source whose length is known"),
        ([], {}, "`source` must hold at least one frame"),
        (7, {}, "`source` must be a path, .*got <class 'int'>"),
        (np.zeros((4, 3, 8, 8), np.uint8), {}, r"`source` must have the shape \(frames, height, width, 3\)"),
    ],
)
def test_wrong_arguments_are_refused_at_once(clips, source, arguments, message):
    with pytest.raises(ValueError, match=message):
        stream_gaze(clips, moving(6, 8, 8) if source is None else source, **arguments)


@pytest.mark.parametrize(
    "frames, arguments, message",
    [
        ([], {}, "`source` must hold at least one frame, got none"),
        (moving(3, 8, 8), {"start_frame": 3}, "`start_frame` must be below 3"),
        (moving(3, 8, 8), {"start_frame": 9}, "`start_frame` must be below 3"),
        (moving(3, 8, 8) / 255, {}, r"frame 0 must be uint8 of shape \(height, width, 3\), got float64"),
        ([*moving(5, 8, 8), *moving(1, 8, 9)], {}, r"frame 5 must be uint8 of shape \(8, 8, 3\), got uint8 of shape"),
    ],
)
def test_wrong_frames_are_refused_when_they_are_read(clips, frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        list(stream_gaze(clips, iter(frames), **arguments))
