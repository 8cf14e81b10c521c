"""
Configuration of the AutoGaze model; it also reads that of the published checkpoint.

Saving a configuration also writes the code with which a checkpoint loads where only transformers is installed.
"""

import copy
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import cached_file

from .grid_autogaze import GazeGrid


DECODING_POSITIONS = ("sequential", "frame_tail")
STOPPING = ("predicted", "measured")
PIPELINE_TASK = "video-token-pruning"
CODE_FILES = tuple(
    f"{name}_autogaze.py"
    for name in (
        "canvas_measures",
        "canvas_search",
        "canvas_selection",
        "cells",
        "clip_schedule",
        "composite",
        "configuration",
        "cuda_graphs",
        "decode_steps",
        "feature_gaze",
        "feature_network",
        "feature_search",
        "frame_arrays",
        "frame_decoding",
        "frame_orientation",
        "frame_sampling",
        "fused_decoder",
        "gaze_batches",
        "gaze_files",
        "gaze_pictures",
        "gazing",
        "generation",
        "graphed_steps",
        "greedy",
        "grid",
        "measured_stopping",
        "modeling",
        "pipeline",
        "processing",
        "selection",
        "token_budgets",
        "video_processing",
        "video_sources",
    )
)
"""Modules that are saved with a checkpoint, as its remote code."""
_STRATEGIES: dict[str, dict[str, dict[str, float]]] = {
    "gazing_ratio_config": {
        "fixed": {"gazing_ratio": 0.5},
        "uniform": {"gazing_ratio_min": 0, "gazing_ratio_max": 1},
        "exponential": {"gazing_ratio_min": 0, "gazing_ratio_max": 1, "lambda": 10},
    },
    "gazing_ratio_each_frame_config": {"uniform": {}, "dirichlet": {"alpha": 0.5}, "self": {}},
    "task_loss_requirement_config": {
        "fixed": {"task_loss_requirement": 0.7},
        "uniform": {"task_loss_requirement_min": 0.6, "task_loss_requirement_max": 0.9},
    },
}
_PIPELINE = {"impl": "pipeline_autogaze.VideoTokenPruningPipeline", "pt": ["AutoModel"], "type": "multimodal"}


def have_equal_content(config: PreTrainedConfig, other: object) -> bool:
    """Compares the content of configurations, which newer releases of transformers do not for subclasses."""
    if type(config) is not type(other):
        return False
    first, second = ({**one.to_dict(), "_name_or_path": None, "transformers_version": None} for one in (config, other))
    return first == second


class GazeSelectorConfig(PreTrainedConfig):
    """
    Base class of the configurations of all selectors: the patches, and checkpoints with remote code.

    Args:
        scales (`Sequence[int | tuple[int, int]]`): sizes in pixels at which patches are chosen, coarse to fine.
        patch_size (`int`): height and width of a patch in pixels, at every scale.
        rescale_factor (`float`, *optional*, defaults to 1/127.5), offset (`bool`, *optional*, defaults to `True`),
        image_mean, image_std (`list[float]`, *optional*, default to ImageNet's):
            The processor's normalisation of values 0..255, which is undone where errors are measured: times the factor,
            minus 1 with `offset`, minus the mean, divided by the standard deviation.
        kwargs: the arguments of [`~transformers.PreTrainedConfig`].

    Raises:
        ValueError: if a scale, the factor or a standard deviation is out of range.
    """

    if TYPE_CHECKING:  # at run time, the annotation would make this a field of a dataclass
        max_num_frames: int | None
    # Defaults: RGB frames, one frame of gaze per video frame, and clips of any length.
    num_channels = 3
    frame_sampling_rate = 1
    max_num_frames = None
    __eq__ = have_equal_content

    def __init__(
        self,
        scales: Sequence[int | tuple[int, int]] = (16,),
        patch_size: int = 16,
        rescale_factor: float = 1 / 127.5,
        offset: bool = True,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **kwargs,
    ):
        if not rescale_factor > 0 or len(image_std) != 3 or min(image_std) <= 0 or len(image_mean) != 3:
            raise ValueError(
                "`rescale_factor` and three values of `image_std` must be positive, with three of `image_mean`, got "
                f"{rescale_factor}, {image_std} and {image_mean}"
            )
        self.scales = GazeGrid(scales, patch_size).scales
        self.patch_size = patch_size
        self.rescale_factor = rescale_factor
        self.offset = offset
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        kwargs.pop("custom_pipelines", None)
        super().__init__(**kwargs)

    @property
    def grid(self) -> GazeGrid:
        """The patches of one frame."""
        return GazeGrid(self.scales, self.patch_size)

    @property
    def custom_pipelines(self) -> dict[str, dict[str, Any]]:
        """
        The pipeline in the remote code of a checkpoint. Empty where the task is registered, so that an installed package is
        used without `trust_remote_code`.
        """
        if PIPELINE_TASK in PIPELINE_REGISTRY.supported_tasks:
            return {}
        return {PIPELINE_TASK: dict(_PIPELINE)}

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as a dictionary, including the pipeline of its checkpoints."""
        return {**super().to_dict(), "custom_pipelines": {PIPELINE_TASK: dict(_PIPELINE)}}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        Writes `config.json` and, beside it, the modules that load the checkpoint with `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to; created if missing.
            push_to_hub (`bool`, *optional*, defaults to `False`): whether to upload the folder as well.
            kwargs: the arguments of [`~transformers.PreTrainedConfig.save_pretrained`].
        """
        os.makedirs(save_directory, exist_ok=True)
        for name in CODE_FILES:
            source: Path | str | None = Path(__file__).parent / name
            if not os.path.exists(source) and self.name_or_path:
                # If this module is remote code, the other ones may be missing in its cache folder.
                source = cached_file(self.name_or_path, name, _raise_exceptions_for_missing_entries=False)
            target = Path(save_directory) / name
            if source is not None and Path(source).resolve() != target.resolve():
                shutil.copyfile(source, target)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class AutoGazeVisionConfig(PreTrainedConfig):
    """
    Configuration of the vision stem: patch embedding and causal 3-D convolutions (docs/specification.md, section 2.2).

    Args:
        hidden_size (`int`, *optional*, defaults to 192): channels of the convolutions.
        output_size (`int`, *optional*, defaults to 192): channels of the vision tokens; the decoder's hidden size.
        num_channels (`int`, *optional*, defaults to 3): colour channels of the frames.
        patch_size (`int`, *optional*, defaults to 16): height and width in pixels of a vision token's patch.
        temporal_patch_size (`int`, *optional*, defaults to 1): video frames per frame of gaze.
        num_blocks (`int`, *optional*, defaults to 1): number of causal convolution blocks.
        spatial_kernel_size (`int`, *optional*, defaults to 3): height and width of their kernels, odd.
        temporal_kernel_size (`int`, *optional*, defaults to 3): frames of their kernels, the current and earlier ones.

    Raises:
        ValueError: if a size is not a positive number, or the spatial kernel is even.
    """

    model_type = "autogaze_vision"
    base_config_key = "vision_config"
    __eq__ = have_equal_content

    def __init__(
        self,
        hidden_size: int = 192,
        output_size: int = 192,
        num_channels: int = 3,
        patch_size: int = 16,
        temporal_patch_size: int = 1,
        num_blocks: int = 1,
        spatial_kernel_size: int = 3,
        temporal_kernel_size: int = 3,
        **kwargs,
    ):
        sizes = {
            "hidden_size": hidden_size,
            "output_size": output_size,
            "num_channels": num_channels,
            "patch_size": patch_size,
            "temporal_patch_size": temporal_patch_size,
            "spatial_kernel_size": spatial_kernel_size,
            "temporal_kernel_size": temporal_kernel_size,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"`vision_config.{name}` must be a positive integer, got {size!r}")
        if not isinstance(num_blocks, int) or num_blocks < 0:
            raise ValueError(f"`vision_config.num_blocks` must be an integer of at least 0, got {num_blocks!r}")
        if spatial_kernel_size % 2 == 0:
            raise ValueError(f"`vision_config.spatial_kernel_size` must be odd, got {spatial_kernel_size}")
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.num_blocks = num_blocks
        self.spatial_kernel_size = spatial_kernel_size
        self.temporal_kernel_size = temporal_kernel_size
        super().__init__(**kwargs)


class AutoGazeDecoderConfig(LlamaConfig):
    """
    Configuration of the gaze decoder, a small Llama that predicts several patches per step.

    See docs/specification.md, section 2.4.

    Args:
        num_multi_token_pred (`int`, *optional*, defaults to 10): number of patches per decoding step.
        kwargs: the arguments of [`~transformers.LlamaConfig`], with the published sizes as defaults.

    Raises:
        ValueError: if `num_multi_token_pred` is not a positive integer.
    """

    model_type = "autogaze_decoder"
    base_config_key = "decoder_config"
    __eq__ = have_equal_content

    def __init__(self, num_multi_token_pred: int = 10, **kwargs):
        if not isinstance(num_multi_token_pred, int) or num_multi_token_pred < 1:
            raise ValueError(
                f"`decoder_config.num_multi_token_pred` must be a positive integer, got {num_multi_token_pred!r}"
            )
        defaults: dict[str, Any] = {
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "vocab_size": 266,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if not {"rope_parameters", "rope_scaling", "rope_theta"} & set(kwargs):
            defaults["rope_parameters"] = {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        self.num_multi_token_pred = num_multi_token_pred
        super().__init__(**{**defaults, **kwargs})


class AutoGazeConfig(GazeSelectorConfig):
    r"""
    Configuration of an [`AutoGazeModel`]; the defaults are those of the published model with 3.26 million parameters.

    Args:
        scales (`list[int]`, *optional*, defaults to `[32, 64, 112, 224]`):
            Sizes in pixels at which patches are chosen, coarse to fine.
        patch_size (`int`, *optional*, defaults to 16):
            Height and width of a patch in pixels, at every scale.
        image_size (`int`, *optional*, defaults to 224):
            Height and width in pixels of the frames that the model takes.
        max_num_frames (`int`, *optional*, defaults to 16):
            Number of frames of the clips that the model was trained on; longer ones work.
        decoding_positions (`str`, *optional*, defaults to `"sequential"`):
            Positions of chosen patches while a frame is decoded. `"sequential"`: their true positions, as in scoring.
            `"frame_tail"`: the last positions of the prompt in every step, as the published weights were trained
            (docs/specification.md, section 4.5).
        stopping (`str`, *optional*, defaults to `"predicted"`):
            The loss that ends a frame with a threshold. `"predicted"`: the loss that the model predicts, as published.
            `"measured"`: the loss of the closed-form reconstruction after every patch, so that every frame meets its
            threshold or uses its whole budget; for models that were trained on that loss.
        kwargs: further arguments of [`GazeSelectorConfig`].
        vision_config (`AutoGazeVisionConfig` or `dict`, *optional*):
            The vision stem.
        decoder_config (`AutoGazeDecoderConfig` or `dict`, *optional*):
            The gaze decoder. Its vocabulary is one id per patch and one end id.
        gazing_ratio_config (`dict`, *optional*):
            Distribution of the share of patches if `generate` is given neither a ratio nor a threshold:
            `sample_strategy_during_inference` and `sample_strategy_during_training` are each one of `fixed`
            (`{"gazing_ratio"}`), `uniform` (`{"gazing_ratio_min", "gazing_ratio_max"}`) and `exponential` (the same
            two and `"lambda"`).
        gazing_ratio_each_frame_config (`dict`, *optional*):
            Distribution of that share over the frames: `uniform`, `dirichlet` (`{"alpha"}`, a number or one per frame)
            or `self` (the share is a maximum, and a drawn threshold applies).
        task_loss_requirement_config (`dict`, *optional*):
            Distribution of the threshold: `fixed` (`{"task_loss_requirement"}`) or `uniform`
            (`{"task_loss_requirement_min", "task_loss_requirement_max"}`).
        has_task_loss_requirement_during_training (`bool`, *optional*, defaults to `False`):
            Whether a threshold is drawn in training mode.
        has_task_loss_requirement_during_inference (`bool`, *optional*, defaults to `True`):
            Whether a threshold is drawn in evaluation mode.

    Raises:
        ValueError: if a part is out of range or parts do not fit each other; the message names it.

    Example:

    ```python
    >>> from transformers_autogaze import AutoGazeConfig

    >>> config = AutoGazeConfig()
    >>> config.grid.num_patches, config.end_id, config.num_vision_tokens
    (265, 265, 196)

    ```
    """

    model_type = "autogaze"
    sub_configs = {"vision_config": AutoGazeVisionConfig, "decoder_config": AutoGazeDecoderConfig}
    __eq__ = have_equal_content

    def __init__(
        self,
        scales: Sequence[int] = (32, 64, 112, 224),
        patch_size: int = 16,
        image_size: int = 224,
        max_num_frames: int = 16,
        decoding_positions: str = "sequential",
        stopping: str = "predicted",
        vision_config: AutoGazeVisionConfig | dict | None = None,
        decoder_config: AutoGazeDecoderConfig | dict | None = None,
        gazing_ratio_config: dict | None = None,
        gazing_ratio_each_frame_config: dict | None = None,
        task_loss_requirement_config: dict | None = None,
        has_task_loss_requirement_during_training: bool = False,
        has_task_loss_requirement_during_inference: bool = True,
        **kwargs,
    ):
        grid = GazeGrid(scales, patch_size)
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = AutoGazeVisionConfig(**(vision_config or {}))
        if decoder_config is None or isinstance(decoder_config, dict):
            decoder_config = AutoGazeDecoderConfig(**{"vocab_size": grid.num_patches + 1, **(decoder_config or {})})
        decoder_config.eos_token_id = grid.num_patches
        self.image_size = image_size
        self.max_num_frames = max_num_frames
        self.decoding_positions = decoding_positions
        self.stopping = stopping
        self.vision_config = vision_config
        self.decoder_config = decoder_config
        self._check_parts(grid)
        self.gazing_ratio_config = _complete_strategies("gazing_ratio_config", gazing_ratio_config)
        self.gazing_ratio_each_frame_config = _complete_strategies(
            "gazing_ratio_each_frame_config", gazing_ratio_each_frame_config
        )
        self.task_loss_requirement_config = _complete_strategies(
            "task_loss_requirement_config", task_loss_requirement_config
        )
        self.has_task_loss_requirement_during_training = has_task_loss_requirement_during_training
        self.has_task_loss_requirement_during_inference = has_task_loss_requirement_during_inference
        super().__init__(scales, patch_size, **kwargs)

    def _check_parts(self, grid: GazeGrid) -> None:
        vision, decoder = self.vision_config, self.decoder_config
        if self.decoding_positions not in DECODING_POSITIONS:
            raise ValueError(
                f"`decoding_positions` must be one of {DECODING_POSITIONS}, got {self.decoding_positions!r}"
            )
        if self.stopping not in STOPPING:
            raise ValueError(f"`stopping` must be one of {STOPPING}, got {self.stopping!r}")
        if not isinstance(self.image_size, int) or self.image_size < 1 or self.image_size % vision.patch_size:
            raise ValueError(
                f"`image_size` must be a positive multiple of `vision_config.patch_size`={vision.patch_size}, "
                f"got {self.image_size!r}"
            )
        if not isinstance(self.max_num_frames, int) or self.max_num_frames < 1:
            raise ValueError(f"`max_num_frames` must be a positive integer, got {self.max_num_frames!r}")
        if decoder.vocab_size != grid.num_patches + 1:
            raise ValueError(
                f"`decoder_config.vocab_size` must be {grid.num_patches + 1}, one id for each of the "
                f"{grid.num_patches} patches of {grid} and one end id, got {decoder.vocab_size}"
            )
        if vision.output_size != decoder.hidden_size:
            raise ValueError(
                f"`vision_config.output_size` must equal `decoder_config.hidden_size`={decoder.hidden_size}, "
                f"got {vision.output_size}"
            )

    @property
    def end_id(self) -> int:
        """The last id of the decoder's vocabulary, which marks padding."""
        return self.grid.num_patches

    @property
    def num_channels(self) -> int:  # type: ignore[override]  # a constant in the base class
        """Colour channels of the frames."""
        return self.vision_config.num_channels

    @property
    def frame_sampling_rate(self) -> int:  # type: ignore[override]  # a constant in the base class
        """Video frames per frame of gaze."""
        return self.vision_config.temporal_patch_size

    @property
    def num_vision_tokens(self) -> int:
        """Number of vision tokens of a frame."""
        return (self.image_size // self.vision_config.patch_size) ** 2

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "AutoGazeConfig":
        """Builds the configuration from a dictionary in the layout of this package or of the published checkpoint."""
        if "gaze_model_config" in config_dict:
            config_dict = _from_published_layout(config_dict)
        return super().from_dict(config_dict, **kwargs)


def _complete_strategies(name: str, given: dict | None) -> dict:
    """Fills the configuration of a distribution with defaults and checks its strategies and their parameters."""
    defaults = copy.deepcopy(_STRATEGIES[name])
    config: dict[str, Any] = {
        "sample_strategy_during_training": next(iter(defaults)),
        "sample_strategy_during_inference": next(iter(defaults)),
        **defaults,
        **(given or {}),
    }
    for key, value in config.items():
        if key in ("sample_strategy_during_training", "sample_strategy_during_inference"):
            if value not in defaults:
                raise ValueError(f"`{name}[{key!r}]` must be one of {list(defaults)}, got {value!r}")
        elif key not in defaults:
            raise ValueError(f"`{name}` must hold the strategies {list(defaults)}, got {key!r}")
        elif missing := defaults[key].keys() - value.keys():
            raise ValueError(f"`{name}[{key!r}]` must hold {sorted(defaults[key])}, got no {sorted(missing)}")
    return config


def _from_published_layout(published: dict[str, Any]) -> dict[str, Any]:
    """
    Converts the nested configuration of the published checkpoint (docs/specification.md, section 2).

    The published file repeats defaults of transformers; only the values that describe the model are read.
    """
    gaze = published["gaze_model_config"]
    vision, decoder = gaze["vision_model_config"], gaze["gaze_decoder_config"]
    scales = sorted(int(scale) for scale in str(published["scales"]).split("+"))
    patch_area = sum(scale**2 for scale in scales) / published["num_vision_tokens_each_frame"]
    decoder_keys = """
        hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act vocab_size
        max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling attention_bias attention_dropout mlp_bias
        num_multi_token_pred
    """.split()
    own_keys = """
        max_num_frames gazing_ratio_config gazing_ratio_each_frame_config task_loss_requirement_config
        has_task_loss_requirement_during_training has_task_loss_requirement_during_inference torch_dtype
    """.split()
    return {
        "model_type": "autogaze",
        "scales": scales,
        "patch_size": round(math.sqrt(patch_area)),
        "image_size": gaze["input_img_size"],
        "decoding_positions": "frame_tail",
        "vision_config": {
            "hidden_size": vision["hidden_dim"],
            "output_size": vision["out_dim"],
            "patch_size": vision["kernel_size"],
            "temporal_patch_size": vision["temporal_patch_size"],
            "num_blocks": vision["depth"],
            "spatial_kernel_size": vision["trunk_spatial_kernel_size"],
            "temporal_kernel_size": vision["trunk_temporal_kernel_size"],
        },
        "decoder_config": {key: decoder[key] for key in decoder_keys if key in decoder},
        **{key: published[key] for key in own_keys if published.get(key) is not None},
    }


AutoGazeConfig.register_for_auto_class()
