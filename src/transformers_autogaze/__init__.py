"""AutoGaze for Hugging Face Transformers."""

from .gazing_autogaze import GazeGrid, GazeOutput


__all__ = ["GazeGrid", "GazeOutput"]
