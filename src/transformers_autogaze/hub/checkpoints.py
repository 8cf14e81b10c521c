"""
Loading of checkpoints for the command line: what is foreign, broken or incomplete is refused, and the message says why.

`from_pretrained` of transformers warns of weights that are missing and goes on with random ones, as it must where a model
gets a new head. A command has no use for random weights.
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
from ..integrations.vision_adapters import ADAPTERS
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
"""What the command line calls selectors, and where they lie: those of this package in it, the published one on the Hub."""
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_FAULTS = {
    "missing_keys": "no weights for",
    "unexpected_keys": "weights that the model does not know",
    "mismatched_keys": "weights of other shapes than its configuration says",
    "infinite_keys": "weights that are not finite",
}
_UNUSED = r"(^|\.)(pooler|head|mask_token)(\.|$)"  # parts of towers that features do not pass
_SHOWN, _LONGEST = 5, 400  # names of weights, and characters of an error, in a message
_HUB_TIMEOUT = 5  # seconds

T = TypeVar("T")


def check_device(device: str | None) -> torch.device:
    """
    Finds the device to compute on.

    Args:
        device (`str`, *optional*): its name, such as `"cuda:1"`; CUDA where there is one, or else the CPU, by default.

    Returns:
        `torch.device`

    Raises:
        ValueError: if torch cannot compute there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except Exception as error:  # Which one depends on how torch was built.
        raise ValueError(
            f"`--device` must be a device that torch can compute on here, such as cpu, got {device!r}: {_short(error)}"
        ) from error


def check_weights_files(folder: str | os.PathLike, argument: str) -> None:
    """
    Checks that files of weights in a folder are whole.

    Args:
        folder (`str` or `os.PathLike`): folder of a checkpoint.
        argument (`str`): what to call it in messages.

    Raises:
        ValueError: if there are none, or one cannot be opened.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"`{argument}` must be the folder of a checkpoint, but {str(folder)!r} holds no weights")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # A broken file can raise anything.
            raise ValueError(f"`{argument}`: {str(file)!r} cannot be loaded: {_short(error)}") from error


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
        configs (`Iterable[type[PreTrainedConfig]]`, *optional*): kinds of selectors that will do; all by default.
        argument (`str`, *optional*, defaults to `"--model"`): what to call it in messages.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where to put it.

    Returns:
        `tuple` of the selector, ready to gaze, and its processor: the published one where the checkpoint has none.

    Raises:
        ValueError: if there is no such checkpoint, it is one of another model, its weights are not those of its
            configuration, or a file cannot be read.
    """
    name = _find(name, argument)
    config = load_config(name, argument)
    if not isinstance(config, tuple(configs)):
        kinds = ", ".join(kind.model_type for kind in configs)
        raise ValueError(
            f"`{argument}` must be a checkpoint of a gaze model ({kinds}), but {name!r} is one of {config.model_type!r}"
        )
    if isinstance(config, GreedyGazeConfig):  # It has no weights.
        model = _reading(name, argument, "config.json", lambda: AutoModel.from_pretrained(name, config=config))
    else:
        model = load_whole(AutoModel, name, config, argument, faults=_FAULTS)
    return model.eval().to(device), _load_processor(name, argument)


def load_encoder(
    name: str | os.PathLike, dtype: torch.dtype = torch.float32, argument: str = "--encoder"
) -> tuple[GazeVisionModel, AutoGazeVideoProcessor]:
    """
    Loads a vision tower and what normalises its frames.

    Args:
        name (`str` or `os.PathLike`): a folder or a repository of the Hub; of a model for pictures and text, its vision part.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): precision of the weights.
        argument (`str`, *optional*, defaults to `"--encoder"`): what to call it in messages.

    Returns:
        `tuple` of the tower, ready to encode, and the video processor.

    Raises:
        ValueError: if there is no such checkpoint, its family is not known, weights of the tower are missing, or a file
            cannot be read.
    """
    name = _find(name, argument)
    config = load_config(name, argument)
    vision_config = getattr(config, "vision_config", None)
    config = vision_config if getattr(vision_config, "model_type", None) in ADAPTERS else config
    if config.model_type not in ADAPTERS:
        # Of a foreign family, that is what is wrong, not the weights.
        _reading(
            name, argument, "model", lambda: GazeVisionModel(AutoModel.from_config(config, trust_remote_code=False))
        )
    tower = GazeVisionModel(load_whole(AutoModel, name, config, argument, dtype, _UNUSED))
    processor = _reading(
        name, argument, "image processor", lambda: encoder_normalization(name, tower.config.model_type)
    )
    return tower.eval().requires_grad_(False), processor


def load_config(name: str | os.PathLike, argument: str) -> PreTrainedConfig:
    """
    Loads the configuration of a checkpoint.

    Args:
        name (`str` or `os.PathLike`): a folder or a repository of the Hub.
        argument (`str`): what to call it in messages.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    name = _find(name, argument)
    if os.path.isfile(file := os.path.join(name, "config.json")):
        _reading(name, argument, "config.json", lambda: _check_object(file))
    return _reading(name, argument, "config.json", lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))


def load_whole(
    loader: Any,
    name: str | os.PathLike,
    config: PreTrainedConfig,
    argument: str,
    dtype: torch.dtype = torch.float32,
    unused: str | None = None,
    faults: Iterable[str] = ("missing_keys", "mismatched_keys", "infinite_keys"),
) -> PreTrainedModel:
    """
    Loads a model, all of whose weights its checkpoint must hold.

    Args:
        loader: a class of models, or an Auto class.
        name (`str` or `os.PathLike`): a folder or a repository of the Hub.
        config ([`~transformers.PreTrainedConfig`]): the model's configuration.
        argument (`str`): what to call it in messages.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): precision of the weights.
        unused (`str`, *optional*): pattern of weights that do not matter.
        faults (`Iterable[str]`, *optional*):
            Kinds of faults that are errors: keys of transformers' loading report, such as `"missing_keys"`, and
            `"infinite_keys"` for weights that are not finite.

    Returns:
        [`~transformers.PreTrainedModel`]

    Raises:
        ValueError: if weights are missing, have other shapes or are not finite, or a file cannot be read.
    """
    options = {"config": config, "dtype": dtype, "trust_remote_code": False}
    # Weights of other shapes are to be in the report, beside those that are missing.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    name = os.fspath(name)
    model, found = _reading(name, argument, "model", lambda: loader.from_pretrained(name, **options))
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
    return name if os.path.isdir(name) or is_offline_mode() or _is_hub_reachable() else _find_in_cache(name, argument)


@functools.cache
def _is_hub_reachable() -> bool:
    """Whether the Hub can be reached; checked once, as loading would otherwise retry for minutes, file by file."""
    try:
        get_session().head(ENDPOINT, timeout=_HUB_TIMEOUT)
        return True
    except Exception:  # The class of the error depends on the version of huggingface_hub.
        return False


def _find_in_cache(name: str, argument: str) -> str:
    """Returns the folder in the Hub's local cache of a repository that was loaded before."""
    config = try_to_load_from_cache(name, "config.json") if name.count("/") < 2 else None
    if not isinstance(config, str):
        raise ValueError(
            f"`{argument}` must be a checkpoint's folder or Hub repository, but the config.json of {name!r} cannot be loaded: "
            f"there is no such folder, {ENDPOINT} cannot be reached, and it was not loaded from there before"
        )
    logger.warning(f"{ENDPOINT} cannot be reached; {name} is taken as it was loaded before, from the local cache.")
    return os.path.dirname(config)


def _reading(name: str, argument: str, what: str, read: Callable[[], T]) -> T:
    """Reads a part of a checkpoint; whatever goes wrong there, the message says in which."""
    try:
        return read()
    except ImportError:
        raise
    except Exception as error:  # A broken file can raise anything.
        must = "" if os.path.isdir(name) else " must be a checkpoint's folder or Hub repository, but"
        raise ValueError(
            f"`{argument}`{must or ':'} the {what} of {name!r} cannot be loaded: {_short(error)}"
        ) from error


def _check_weights(name: str, argument: str, found: dict[str, Any], unused: str | None = None) -> None:
    """Raises a ValueError where a report of loading names anything but weights whose names have an `unused` part."""
    for key, weights in found.items():
        names = sorted(weight if isinstance(weight, str) else weight[0] for weight in weights)
        names = [weight for weight in names if unused is None or not re.search(unused, weight)]
        if names:
            more = "" if len(names) <= _SHOWN else f" and {len(names) - _SHOWN} more"
            raise ValueError(
                f"`{argument}` must be a whole checkpoint, but that of {name!r} has {_FAULTS[key]}: "
                f"{', '.join(names[:_SHOWN])}{more}"
            )


def _load_processor(name: str, argument: str) -> AutoGazeProcessor:
    def find() -> list[str]:
        files = (cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in _PROCESSOR_FILES)
        found = [file for file in files if file is not None]
        for file in found:
            _check_object(file)
        return found

    if _reading(name, argument, "processor", find):
        return _reading(name, argument, "processor", lambda: AutoGazeProcessor.from_pretrained(name))
    logger.warning(f"{name} has no processor; the published preprocessing is used.")
    return AutoGazeProcessor()


def _check_object(file: str) -> None:
    """Raises a ValueError where a file is no JSON object; the error of transformers would be unclear."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{os.path.basename(file)} must hold a JSON object, got a {type(content).__name__}")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} .."
