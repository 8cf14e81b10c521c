"""The base class of the wrappers of towers and MLLMs: they behave like the model that they wrap, and save and load it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedConfig
from transformers.utils import PushToHubMixin, TransformersKwargs, cached_file

from ..selection_autogaze import check_names
from ..utils.output_files import replacing
from ..video_processing_autogaze import AutoGazeVideoProcessor


WRAPPER_FILE = "gaze_wrapper.json"
_VERSION = 1
_SELECTOR, _PROCESSOR = "gaze_model", "gaze_processor"
_NORMALIZATION = ("image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize", "offset")
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
# Attributes and methods that Trainer, PEFT and accelerate use of a model; these are the wrapped model's.
_DELEGATED = frozenset(
    (
        "activation_checkpointing_disable",
        "activation_checkpointing_enable",
        "can_generate",
        "disable_input_require_grads",
        "enable_input_require_grads",
        "get_input_embeddings",
        "get_output_embeddings",
        "gradient_checkpointing_disable",
        "gradient_checkpointing_enable",
        "hf_device_map",
        "hf_quantizer",
        "is_activation_checkpointing",
        "is_gradient_checkpointing",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "is_quantized",
        "prepare_inputs_for_generation",
        "quantization_method",
        "set_input_embeddings",
        "supports_gradient_checkpointing",
    )
)

# Arguments that are in no signature: that of the decorators of `forward`, an older name of the cache, and that of PEFT.
_ALWAYS_ACCEPTED = ("return_dict", "past_key_values", "adapter_names")


def hub_arguments(kwargs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` about downloads from the Hub, and those named in `more`."""
    return {key: kwargs[key] for key in (*_HUB, *more) if key in kwargs}


def without_peft(model: Any) -> Any:
    """Returns the model inside a `PeftModel`, which PEFT has modified in place, or any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ModelWrapper(PushToHubMixin, nn.Module):
    """
    Base class of the wrappers of a model of transformers, or of a `PeftModel`, in the attribute `wrapped_name`.

    Configuration, device, dtype, gradient checkpointing and embeddings are the wrapped model's. A state dict has each tied
    weight once.
    """

    wrapped_name: str
    """Name of the attribute with the wrapped model."""
    main_input_name = "input_ids"
    base_model_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_ignore_missing_tied_weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _DELEGATED:
                raise
        return getattr(self.wrapped, name)

    @property
    def wrapped(self) -> Any:
        """The wrapped model, or its `PeftModel`."""
        return super().__getattr__(self.wrapped_name)

    @property
    def config(self) -> PreTrainedConfig:
        """The wrapped model's configuration."""
        return self.wrapped.config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The wrapped model's defaults of `generate`; `None` for a model that cannot generate."""
        return getattr(without_peft(self.wrapped), "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        without_peft(self.wrapped).generation_config = value

    @property
    def device(self) -> torch.device:
        """The wrapped model's device."""
        model = without_peft(self.wrapped)
        return model.device if hasattr(model, "device") else next(model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The wrapped model's dtype."""
        model = without_peft(self.wrapped)
        return model.dtype if hasattr(model, "dtype") else next(model.parameters()).dtype

    def _check_names(self, given: Mapping[str, Any]) -> None:
        """Checks the names of further arguments of `forward`, as models of transformers silently ignore unknown ones."""
        model = without_peft(self.wrapped)
        functions = (self.forward, model.forward, model.get_decoder().forward, model.loss_function)
        others = (*TransformersKwargs.__annotations__, *_ALWAYS_ACCEPTED)
        check_names(f"{type(self).__name__}.forward", given, functions, others)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # one for two overloads
        """Returns the weights, as `nn.Module.state_dict` does, but each tied weight once, under its first name."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in _tied_names(self):
            state.pop(prefix + name, None)
        return state

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """
        Saves the wrapped model in its own format, and the other parts and the settings of the wrapper beside it.

        The wrapped model writes its own files, so they load without this package. A `PeftModel` writes only its adapter.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to; created if it is missing.
            push_to_hub (`bool`, *optional*, defaults to `False`): whether to upload the folder as well.
            repo_id (`str`, *optional*): the repository; by default named like the folder.
            kwargs: further arguments of the wrapped model's `save_pretrained`.
        """
        folder = Path(save_directory)
        self.wrapped.save_pretrained(folder, **kwargs)
        wrapper_config = {
            "version": _VERSION,
            "wrapper": type(self).__name__,
            "model": type(without_peft(self.wrapped)).__name__,
            **self._save_parts(folder),
        }
        with replacing(folder / WRAPPER_FILE) as unfinished:
            unfinished.write_text(json.dumps(wrapper_config, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name)

    def _save_parts(self, folder: Path) -> dict[str, Any]:
        """Saves everything but the wrapped model, and returns further entries of the wrapper's file."""
        raise NotImplementedError

    @classmethod
    def _load_wrapped(
        cls, name: str | os.PathLike, wrapper_config: Mapping[str, Any] | None, kwargs: dict[str, Any]
    ) -> Any:
        """Loads the wrapped model from a folder or repository, with its PEFT adapter if it has one."""
        if wrapper_config is None or not hasattr(transformers, wrapper_config["model"]):
            config = transformers.AutoConfig.from_pretrained(name, **hub_arguments(kwargs))
            names = config.architectures or []
            model_class = getattr(transformers, names[0], None) if names else None
            if model_class is None:
                raise ValueError(f"{str(name)!r} must be a model of transformers, got {names or 'no architecture'}")
            return model_class.from_pretrained(name, **kwargs)
        model_class = getattr(transformers, wrapper_config["model"])
        adapter = cached_file(
            name, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs)
        )
        if adapter is None:
            return model_class.from_pretrained(name, **kwargs)
        from peft import PeftModel

        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ValueError(
                f"the adapter in {str(name)!r} must name the model that it is for; load that one, and wrap it"
            )
        return PeftModel.from_pretrained(model_class.from_pretrained(base, **kwargs), str(name))


def read_wrapper_file(
    name: str | os.PathLike, wrapper: type[ModelWrapper], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """
    Reads the file that [`~ModelWrapper.save_pretrained`] wrote beside a model.

    Args:
        name (`str` or `os.PathLike`): folder or repository.
        wrapper (`type[ModelWrapper]`): the class that the file must be of.
        kwargs (`Mapping[str, Any]`): arguments of `from_pretrained`, of which those about the Hub are used.

    Returns:
        `dict`, or `None` if there is no such file.

    Raises:
        ValueError: if the file is of another class or a newer version.
    """
    path = cached_file(name, WRAPPER_FILE, _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs))
    if path is None:
        return None
    wrapper_config = json.loads(Path(path).read_text(encoding="utf-8"))
    if wrapper_config["wrapper"] != wrapper.__name__ or wrapper_config["version"] > _VERSION:
        raise ValueError(
            f"{str(name)!r} must be a {wrapper.__name__} of version {_VERSION} or before, got a {wrapper_config['wrapper']} of "
            f"version {wrapper_config['version']}"
        )
    return wrapper_config


def save_gazing_parts(wrapper: Any, folder: Path, processor: Any, gaze_processor: Any) -> dict[str, Any]:
    """Saves the selector and the normalisation of its frames; returns their entries of the wrapper's file."""
    if wrapper.gaze_model is not None:
        wrapper.gaze_model.save_pretrained(folder / _SELECTOR)
    if gaze_processor is not None:
        gaze_processor.save_pretrained(folder / _PROCESSOR)
    normalization = None
    if processor is not None:
        normalization = {key: getattr(processor, key) for key in _NORMALIZATION if hasattr(processor, key)}
    return {
        "has_gaze_model": wrapper.gaze_model is not None,
        "has_gaze_processor": gaze_processor is not None,
        "normalization": normalization,
    }


def load_gazing_parts(
    name: str | os.PathLike,
    wrapper_config: Mapping[str, Any] | None,
    kwargs: Mapping[str, Any],
    gaze_model: Any,
    processor: Any,
    gaze_processor: Any,
) -> dict[str, Any]:
    """Returns `gaze_model`, `processor` and `gaze_processor`, loaded where they are `None`, and the saved settings."""
    wrapper_config = wrapper_config or {}
    if gaze_model is None and wrapper_config.get("has_gaze_model"):
        gaze_model = AutoModel.from_pretrained(_fetch(name, _SELECTOR, kwargs))
    if processor is None and wrapper_config.get("normalization"):
        processor = SimpleNamespace(**wrapper_config["normalization"])
    if gaze_processor is None and wrapper_config.get("has_gaze_processor"):
        gaze_processor = AutoGazeVideoProcessor.from_pretrained(_fetch(name, _PROCESSOR, kwargs))
    parts = {"gaze_model": gaze_model, "processor": processor, "gaze_processor": gaze_processor}
    return {**parts, **wrapper_config.get("settings", {})}


def _fetch(name: str | os.PathLike, part: str, kwargs: Mapping[str, Any]) -> str:
    """
    Returns the local folder of a part, downloaded if needed.

    It is loaded from this folder and not as a subfolder, for which transformers would load the PEFT adapter beside it.
    """
    found = None
    for file in ("config.json", "model.safetensors", "processor_config.json", "video_preprocessor_config.json"):
        path = cached_file(
            name, f"{part}/{file}", _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs)
        )
        found = path or found
    if found is None:
        raise ValueError(f"{str(name)!r} must have the folder {part}, which its {WRAPPER_FILE} names")
    return str(Path(found).parent)


def _tied_names(module: nn.Module) -> list[str]:
    """Lists the names of weights that have an earlier name as well."""
    seen, names = set(), []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            names.append(name)
        seen.add(id(parameter))
    return names


def _ignore_missing_tied_weights(module: nn.Module, incompatible: Any) -> None:
    tied = tuple(_tied_names(module))
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not (tied and name.endswith(tied))]
