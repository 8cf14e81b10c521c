"""AutoGaze for Hugging Face Transformers."""

from transformers import AutoConfig, AutoModel

from .configuration_autogaze import AutoGazeConfig
from .gazing_autogaze import GazeGrid, GazeOutput
from .generation_autogaze import GazeCache, GazeSelector
from .modeling_autogaze import AutoGazeModel


AutoConfig.register(AutoGazeConfig.model_type, AutoGazeConfig, exist_ok=True)
AutoModel.register(AutoGazeConfig, AutoGazeModel, exist_ok=True)

__all__ = ["AutoGazeConfig", "AutoGazeModel", "GazeCache", "GazeGrid", "GazeOutput", "GazeSelector"]
