"""
Loading of checkpoints for the command line, with errors for unsupported, broken or incomplete ones.

`from_pretrained` of transformers only warns about missing weights and initialises them at random, which a model with a new head
needs. For a command, missing weights are an error.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils import get_session
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .. import AUTOGAZE_SELECTOR, FEATURES_SELECTOR, FINEST_SELECTOR, GREEDY_SELECTOR
from ..configuration_autogaze import AutoGazeConfig
from ..evaluation.feature_clips import encoder_normalization
from ..feature_network_autogaze import FeatureGazeConfig
from ..greedy_autogaze import GreedyGazeConfig
from ..integrations.vision import GazeVisionModel
from ..integrations.vision_adapters import ADAPTERS, find_tower
from ..processing_autogaze import AutoGazeProcessor
from ..selection_autogaze import GazeSelector
from ..video_processing_autogaze import AutoGazeVideoProcessor


logger = logging.get_logger(__name__)

SHIPPED_SELECTORS = {
    "features": FEATURES_SELECTOR,
    "finest": FINEST_SELECTOR,
    "greedy": GREEDY_SELECTOR,
    "autogaze": AUTOGAZE_SELECTOR,
}
"""Names of selectors on the command line, and their folders or repositories."""
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_FAULTS = {
    "missing_keys": "no weights for",
    "unexpected_keys": "weights that the model does not have",
    "mismatched_keys": "weights of other shapes than those of its configuration",
    "infinite_keys": "weights that are not finite",
}
_UNUSED_WEIGHTS = r"(^|\.)(pooler|head|mask_token)(\.|$)"  # parts of towers that do not affect features
_MAX_NAMES, _MAX_ERROR_LENGTH = 5, 400  # of weights and of characters of an error in a message
_HUB_TIMEOUT = 5  # seconds

T = TypeVar("T")


def check_device(device: str | None) -> torch.device:
    """
    Finds the device to compute on.

    Args:
        device (`str`, *optional*): its name, such as `"cuda:1"`; by default CUDA if it is available, or else the CPU.

    Returns:
        `torch.device`

    Raises:
        ValueError: if torch cannot compute on the device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except Exception as error:  # Its class depends on the build of torch.
        raise ValueError(
            f"`--device` must be a device that torch can compute on here, such as cpu, got {device!r}: {_shorten(error)}"
        ) from error


def check_weights_files(folder: str | os.PathLike, argument: str) -> None:
    """
    Checks that the weight files in a folder can be opened.

    Args:
        folder (`str` or `os.PathLike`): folder of a checkpoint.
        argument (`str`): name of the argument in messages.

    Raises:
        ValueError: if there is no weight file, or one cannot be opened.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"`{argument}` must be the folder of a checkpoint, but {str(folder)!r} holds no weights")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # A broken file can raise anything.
            raise ValueError(f"`{argument}`: {str(file)!r} cannot be loaded: {_shorten(error)}") from error


def load_selector(
    name: str | os.PathLike,
    configs: Iterable[type[PreTrainedConfig]] = (AutoGazeConfig, FeatureGazeConfig, GreedyGazeConfig),
    argument: str = "--model",
    device: str | torch.device = "cpu",
) -> tuple[GazeSelector, AutoGazeProcessor]:
    """
    Loads a selector in float32 and its processor.

    Args:
        name (`str` or `os.PathLike`): a folder, a repository of the Hub, or a name of `SHIPPED_SELECTORS`.
        configs (`Iterable[type[PreTrainedConfig]]`, *optional*): accepted configuration classes, all by default.
        argument (`str`, *optional*, defaults to `"--model"`): name of the argument in messages.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): device of the selector.

    Returns:
        `tuple` of the selector, in evaluation mode, and its processor; the published one if the checkpoint has none.

    Raises:
        ValueError: if the checkpoint does not exist or belongs to another model, its weights do not match its configuration,
            or a file cannot be read.
    """
    name = _find(name, argument)
    config = load_config(name, argument)
    if not isinstance(config, tuple(configs)):
        kinds = ", ".join(kind.model_type for kind in configs)
        raise ValueError(
            f"`{argument}` must be a checkpoint of a gaze model ({kinds}), but {name!r} has the model type {config.model_type!r}"
        )
    if isinstance(config, GreedyGazeConfig):  # It has no weights.
        model = _read_part(name, argument, "config.json", lambda: AutoModel.from_pretrained(name, config=config))
    else:
        model = load_complete(AutoModel, name, config, argument, faults=_FAULTS)
    return model.eval().to(device), _load_processor(name, argument)


def load_encoder(
    name: str | os.PathLike, dtype: torch.dtype = torch.float32, argument: str = "--encoder"
) -> tuple[GazeVisionModel, AutoGazeVideoProcessor]:
    """
    Loads a vision tower and the normalisation of its frames.

    Args:
        name (`str` or `os.PathLike`): a folder or a repository of the Hub; of a vision-language model, the vision model is loaded.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): precision of the weights.
        argument (`str`, *optional*, defaults to `"--encoder"`): name of the argument in messages.

    Returns:
        `tuple` of the tower, in evaluation mode and frozen, and the video processor.

    Raises:
        ValueError: if the checkpoint does not exist, its architecture is not supported, weights of the tower are missing, or a
            file cannot be read.
    """
    name = _find(name, argument)
    config = load_tower_config(name, argument)
    tower = GazeVisionModel(load_complete(AutoModel, name, config, argument, dtype, _UNUSED_WEIGHTS))
    processor = _read_part(
        name, argument, "image processor", lambda: encoder_normalization(name, tower.config.model_type)
    )
    return tower.eval().requires_grad_(False), processor


def load_tower_config(
    name: str | os.PathLike, argument: str = "--encoder", others: Iterable[str] = ()
) -> PreTrainedConfig:
    """
    Loads the configuration of a vision tower, to report an unsupported one before the weights are loaded.

    Args:
        name (`str` or `os.PathLike`): a folder or a repository of the Hub; of a vision-language model, the vision model counts.
        argument (`str`, *optional*, defaults to `"--encoder"`): name of the argument in messages.
        others (`Iterable[str]`, *optional*): model types that the caller supports besides towers.

    Returns:
        [`~transformers.PreTrainedConfig`] of the tower, or of the whole model if its type is one of `others`.

    Raises:
        ValueError: if the checkpoint does not exist, or has no tower of a supported family.
    """
    name, others = _find(name, argument), tuple(others)
    config = load_config(name, argument)
    vision_config = getattr(config, "vision_config", None)
    if config.model_type in others:
        return config
    if getattr(vision_config, "model_type", None) in ADAPTERS:
        return vision_config
    if config.model_type not in ADAPTERS:
        make = functools.partial(AutoModel.from_config, config, trust_remote_code=False)
        with torch.device("meta"):  # so that no memory is taken
            model = _read_part(name, argument, "model", make)
        try:
            find_tower(model)
        except ValueError:
            raise ValueError(
                f"`{argument}` must be an encoder of one of the families {', '.join((*ADAPTERS, *others))}, but {name!r} has the "
                f"model type {config.model_type!r}"
            ) from None
    return config


def load_config(name: str | os.PathLike, argument: str) -> PreTrainedConfig:
    """
    Loads the configuration of a checkpoint.

    Args:
        name (`str` or `os.PathLike`): a folder or a repository of the Hub.
        argument (`str`): name of the argument in messages.

    Raises:
        ValueError: if the checkpoint does not exist, or its configuration cannot be read.
    """
    name = _find(name, argument)
    if os.path.isfile(file := os.path.join(name, "config.json")):
        _read_part(name, argument, "config.json", lambda: _check_object(file))
    return _read_part(name, argument, "config.json", lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))


def load_complete(
    loader: Any,
    name: str | os.PathLike,
    config: PreTrainedConfig,
    argument: str,
    dtype: torch.dtype = torch.float32,
    unused: str | None = None,
    faults: Iterable[str] = ("missing_keys", "mismatched_keys", "infinite_keys"),
) -> PreTrainedModel:
    """
    Loads a model from a checkpoint that must have all of its weights.

    Args:
        loader: a model class or an Auto class.
        name (`str` or `os.PathLike`): a folder or a repository of the Hub.
        config ([`~transformers.PreTrainedConfig`]): configuration of the model.
        argument (`str`): name of the argument in messages.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): precision of the weights.
        unused (`str`, *optional*): regular expression for names of weights that may be missing.
        faults (`Iterable[str]`, *optional*):
            Kinds of faults that are errors: keys of transformers' loading report, such as `"missing_keys"`, and
            `"infinite_keys"` for weights that are not finite.

    Returns:
        [`~transformers.PreTrainedModel`]

    Raises:
        ValueError: if weights are missing, have other shapes or are not finite, or a file cannot be read.
    """
    options = {"config": config, "dtype": dtype, "trust_remote_code": False}
    # With this option, weights of other shapes are in the report instead of an error.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    name = os.fspath(name)
    model, found = _read_part(name, argument, "model", lambda: loader.from_pretrained(name, **options))
    found["infinite_keys"] = [key for key, weight in model.state_dict().items() if not bool(weight.isfinite().all())]
    _check_weights(name, argument, {key: found[key] for key in faults}, unused)
    return model


def _find(name: str | os.PathLike, argument: str) -> str:
    name = os.fspath(name)
    if not name.strip():
        raise ValueError(f"`{argument}` must name a checkpoint, a folder or a repository of the Hub, got {name!r}")
    if os.path.isfile(name):
        raise ValueError(f"`{argument}` must be a checkpoint's folder or Hub repository, but {name!r} is a file")
    if (os.path.isabs(name) or name.startswith(".")) and not os.path.isdir(name):
        raise ValueError(
            f"`{argument}` must be a checkpoint's folder or Hub repository, but there is no folder {name!r}"
        )
    if os.path.isdir(name):
        return name
    name = str(SHIPPED_SELECTORS.get(name, name))
    return name if os.path.isdir(name) or is_offline_mode() or _is_hub_reachable() else _find_cached(name, argument)


@functools.cache
def _is_hub_reachable() -> bool:
    """Whether the Hub can be reached; checked once, since loading would otherwise retry for minutes for each file."""
    try:
        get_session().head(ENDPOINT, timeout=_HUB_TIMEOUT)
        return True
    except Exception:  # The class of the error depends on the version of huggingface_hub.
        return False


def _find_cached(name: str, argument: str) -> str:
    """Returns the folder of a repository in the Hub's local cache."""
    config = try_to_load_from_cache(name, "config.json") if name.count("/") < 2 else None
    if not isinstance(config, str):
        raise ValueError(
            f"`{argument}` must be a checkpoint's folder or Hub repository, but the config.json of {name!r} cannot be loaded: "
            f"there is no such folder, {ENDPOINT} cannot be reached, and it is not in the local cache"
        )
    logger.warning(f"{ENDPOINT} cannot be reached; {name} is loaded from the local cache.")
    return os.path.dirname(config)


def _read_part(name: str, argument: str, what: str, read: Callable[[], T]) -> T:
    """Reads a part of a checkpoint, with the name of the part in the message of any error."""
    try:
        return read()
    except ImportError:
        raise
    except Exception as error:  # A broken file can raise anything.
        must = "" if os.path.isdir(name) else " must be a checkpoint's folder or Hub repository, but"
        raise ValueError(
            f"`{argument}`{must or ':'} the {what} of {name!r} cannot be loaded: {_shorten(error)}"
        ) from error


def _check_weights(name: str, argument: str, found: dict[str, Any], unused: str | None = None) -> None:
    """Raises a ValueError if a loading report names weights that do not match the pattern `unused`."""
    for key, weights in found.items():
        names = sorted(weight if isinstance(weight, str) else weight[0] for weight in weights)
        names = [weight for weight in names if unused is None or not re.search(unused, weight)]
        if names:
            more = "" if len(names) <= _MAX_NAMES else f" and {len(names) - _MAX_NAMES} more"
            raise ValueError(
                f"`{argument}` must be a complete checkpoint, but that of {name!r} has {_FAULTS[key]}: "
                f"{', '.join(names[:_MAX_NAMES])}{more}"
            )


def _load_processor(name: str, argument: str) -> AutoGazeProcessor:
    def find() -> list[str]:
        files = (cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in _PROCESSOR_FILES)
        found = [file for file in files if file is not None]
        for file in found:
            _check_object(file)
        return found

    if _read_part(name, argument, "processor", find):
        return _read_part(name, argument, "processor", lambda: AutoGazeProcessor.from_pretrained(name))
    logger.warning(f"{name} has no processor; the published preprocessing is used.")
    return AutoGazeProcessor()


def _check_object(file: str) -> None:
    """Raises a ValueError if a file is not a JSON object, since the error of transformers would be unclear."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{os.path.basename(file)} must hold a JSON object, got a {type(content).__name__}")


def _shorten(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_ERROR_LENGTH else f"{text[:_MAX_ERROR_LENGTH]} .."
