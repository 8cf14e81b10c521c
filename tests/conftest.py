import pytest
from published import Checkpoint, checkpoint_folder

from transformers_autogaze import AutoGazeModel


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return Checkpoint(checkpoint_folder("tiny-1"))


@pytest.fixture(scope="session")
def tiny_model(tiny) -> AutoGazeModel:
    """The small published checkpoint in float64; tests must not change it."""
    return tiny.model()
