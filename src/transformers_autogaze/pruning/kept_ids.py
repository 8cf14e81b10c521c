"""The kept patches of a whole video, as ids only; many ids go to a temporary file, so that a long video needs little memory."""

from collections.abc import Iterator
from tempfile import SpooledTemporaryFile

import numpy as np
import torch

from ..gaze_pictures_autogaze import count_statistics
from ..gazing_autogaze import GazeOutput
from ..video.streaming import GazeChunk


_MAX_BYTES_IN_MEMORY = 2**24  # of ids


class KeptIds:
    """
    The kept patches of a video that is gazed at chunk by chunk, in the order of choice.

    Args:
        chunk ([`GazeChunk`]): the first chunk, which has the grid and the sizes of all; it is not added.
    """

    def __init__(self, chunk: GazeChunk):
        self.grid, self.frame_sampling_rate, self.extent = (
            chunk.gaze.grid,
            chunk.gaze.frame_sampling_rate,
            chunk.extent,
        )
        self.level_size = chunk.levels.shape[-2], chunk.levels.shape[-1]
        self.num_frames = 0
        """Number of frames of all chunks that were added."""
        self._lengths: list[int] = []
        self._counts: list[np.ndarray] = []
        self._file = SpooledTemporaryFile(max_size=_MAX_BYTES_IN_MEMORY)

    def add(self, chunk: GazeChunk) -> None:
        """Adds the gaze of the next chunk."""
        ids = [own.cpu().numpy() for own in chunk.gaze.ids_each_frame()]
        self._counts.append(torch.stack([mask[0].sum(-1) for mask in chunk.gaze.gazing_mask], -1).cpu().int().numpy())
        self._lengths.append(len(chunk.frames))
        self.num_frames += len(chunk.frames)
        self._file.write(np.concatenate(ids).astype(np.int32).tobytes())

    @property
    def counts(self) -> np.ndarray:
        """`np.ndarray` of shape `(frames, scales)`: patches kept of every frame and scale."""
        return np.concatenate(self._counts)

    def __iter__(self) -> Iterator[tuple[int, int, GazeOutput]]:
        """Yields the frames `start` to `stop` of each chunk and its gaze, without padding and scores."""
        start = place = 0
        for length, counts in zip(self._lengths, (counts.sum(1) for counts in self._counts), strict=True):
            # Another iteration may have moved the position in the file.
            self._file.seek(place)
            size = 4 * int(counts.sum())
            ids = np.frombuffer(self._file.read(size), np.int32).astype(np.int64)
            place += size
            first = np.repeat(np.arange(len(counts)), counts) * self.grid.num_patches
            pos, counts = torch.from_numpy(ids + first)[None], torch.from_numpy(counts).long()
            gaze = GazeOutput.from_ids(
                pos,
                torch.zeros_like(pos, dtype=torch.bool),
                counts,
                self.grid,
                self.frame_sampling_rate,
                clip_num_gazing_each_frame=counts[None],
            )
            yield start, start + length, gaze
            start += length

    def statistics(self) -> dict[str, object]:
        """Computes the same as [`~GazeOutput.statistics`]."""
        return count_statistics(self.counts, self.grid)
