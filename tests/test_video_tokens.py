import pytest
import torch

from transformers_autogaze import GazeGrid, GazeOutput
from transformers_autogaze.integrations.video_tokens import (
    SinusoidalTimeEmbedding,
    TokenPlaces,
    VideoClip,
    batch_clips,
    cut_clips,
    cut_tiles,
    order_tokens,
)


TILE = GazeGrid([8, 16], 8)


def test_tiles_are_in_order_row_by_row():
    video = torch.arange(4 * 6).view(1, 1, 4, 6)
    tiles = cut_tiles(video, rows=2, cols=3)
    assert [int(tile[0, 0, 0, 0]) for tile in tiles] == [0, 2, 4, 12, 14, 16]
    assert all(tile.shape == (1, 1, 2, 2) for tile in tiles)


def test_clips_are_tiles_of_chunks_with_their_own_masks():
    grid, video = GazeGrid([(8, 16), (16, 32)], 8), torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 16, 32)
    masks = [torch.zeros(1, 5, 2, dtype=torch.bool), torch.zeros(1, 5, 8, dtype=torch.bool)]
    masks[0][0, 0, 0] = masks[1][0, 3, 6] = True
    clips = list(cut_clips(7, video, GazeOutput.from_masks(masks, grid), TILE, chunk_frames=2))
    # No other patch was kept.
    assert [(clip.video, clip.chunk, clip.tile) for clip in clips] == [(7, 0, 0), (7, 1, 1)]
    assert [clip.frame_numbers.tolist() for clip in clips] == [[0, 1], [2, 3]]
    assert clips[0].masks[0].tolist() == [[True], [False]]
    assert clips[1].masks[1].tolist() == [[False] * 4, [False, False, True, False]]
    assert clips[1].frames.shape == (2, 3, 16, 16) and clips[1].frames[:, 0, 0, 0].tolist() == [2, 3]


def test_only_gazed_frames_are_taken():
    video = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    gaze = GazeOutput.full(TILE, 1, 4, frame_sampling_rate=2)
    clips = list(cut_clips(0, video, gaze, TILE, chunk_frames=4))
    assert [clip.frame_numbers.tolist() for clip in clips] == [[0, 2], [4, 6]]
    assert [clip.frames[:, 0, 0, 0].tolist() for clip in clips] == [[0, 2], [4, 6]]
    assert all(mask.all() and len(mask) == 2 for clip in clips for mask in clip.masks)


def test_thumbnails_are_whole_frames_at_the_finest_scale():
    grid, video = GazeGrid([(8, 16), (16, 32)], 8), torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 16, 32)
    gaze = GazeOutput.full(grid, 1, 5)
    clips = list(cut_clips(0, video, gaze, TILE, chunk_frames=2, thumbnail_interval=3))
    assert [(clip.chunk, clip.tile) for clip in clips] == [
        (0, -1),
        (0, 0),
        (0, 1),
        (1, -1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert clips[3].frame_numbers.tolist() == [3] and clips[3].frames.shape == (1, 3, 16, 32)
    assert [mask.all().item() for mask in clips[3].masks] == [False, True] and not clips[3].masks[0].any()


def test_batches_have_clips_of_one_shape():
    clips = [VideoClip(0, n, 0, None, torch.zeros(frames), []) for n, frames in enumerate([2, 2, 3, 2, 3])]
    batches = [[clip.chunk for clip in batch] for batch in batch_clips(iter(clips), max_batch_size=2)]
    assert batches == [[0, 1], [3], [2, 4]]


@pytest.mark.parametrize(
    ("order", "expected", "parts"),
    [
        ("time", [4, 3, 1, 0, 2, 5], [(0, 4), (0, 1), (1, 1)]),
        ("tile", [4, 3, 0, 1, 2, 5], [(0, 1), (0, 2), (0, 1), (0, 1), (1, 1)]),
    ],
)
def test_tokens_are_sorted(order, expected, parts):
    rows = torch.tensor(
        [
            # video, chunk, tile, frame, id
            [0, 0, 0, 1, 2],
            [0, 0, 1, 0, 9],
            [0, 1, 0, 2, 0],
            [0, 0, 0, 0, 5],
            [0, 0, -1, 0, 7],
            [1, 0, 0, 0, 0],
        ]
    )
    index, found = order_tokens(TokenPlaces(*rows.unbind(1)), order)
    assert index.tolist() == expected and found == parts


def test_sinusoids_differ_between_frames_and_are_within_the_amplitude():
    embedding = SinusoidalTimeEmbedding(8, amplitude=0.1)(torch.arange(512))
    assert embedding.abs().max() <= 0.1
    distance = torch.cdist(embedding, embedding) + torch.eye(512)
    assert distance.min() > 1e-4
    with pytest.raises(ValueError, match="`hidden_size` must be even, got 7"):
        SinusoidalTimeEmbedding(7)
