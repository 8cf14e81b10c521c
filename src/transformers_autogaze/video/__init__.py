"""Videos of any size and length: gazing at them chunk by chunk and tile by tile, drawing the kept patches, and writing videos."""

from .streaming import GazeChunk, gaze_video, stream_gaze
from .visualization import side_by_side
from .writing import write_video


__all__ = ["GazeChunk", "gaze_video", "side_by_side", "stream_gaze", "write_video"]
