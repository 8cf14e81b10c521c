"""
What the wrappers of towers and MLLMs share: they behave like the model that they wrap.

This module owns the habits of transformers' models, saving and loading included. What a wrapper makes of a gaze is its own
matter.
"""

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
# What Trainer, PEFT and accelerate ask of a model, and the wrapped one answers.
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

# Arguments that no signature names: of the decorators of `forward`, an older name, and of PEFT.
_ALWAYS_TAKEN = ("return_dict", "past_key_values", "adapter_names")


def hub_arguments(kwargs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Gives those arguments of `from_pretrained` that say where files come from, and those that are named."""
    return {key: kwargs[key] for key in (*_HUB, *more) if key in kwargs}


def without_peft(model: nn.Module) -> nn.Module:
    """Gives the model inside a `PeftModel`, whose layers PEFT has changed in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ModelWrapper(PushToHubMixin, nn.Module):
    """
    Base of what wraps a model of transformers, or a `PeftModel` of one, kept under the name `wrapped_name`.

    Configuration, device, dtype, gradient checkpointing and embeddings are the wrapped model's. A state dict has each tied
    weight once.
    """

    wrapped_name: str
    """The attribute that holds the wrapped model."""
    main_input_name = "input_ids"
    base_model_prefix = ""

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_post_hook(_excuse_tied_weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _DELEGATED:
                raise
        return getattr(self.wrapped, name)

    @property
    def wrapped(self) -> nn.Module:
        """The wrapped model."""
        return super().__getattr__(self.wrapped_name)

    @property
    def config(self) -> PreTrainedConfig:
        """The wrapped model's configuration."""
        return self.wrapped.config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """How the wrapped model answers where `generate` is not told; `None` for a model that does not answer."""
        return getattr(without_peft(self.wrapped), "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        without_peft(self.wrapped).generation_config = value

    @property
    def device(self) -> torch.device:
        """Where the wrapped model is."""
        model = without_peft(self.wrapped)
        return model.device if hasattr(model, "device") else next(model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the wrapped model."""
        model = without_peft(self.wrapped)
        return model.dtype if hasattr(model, "dtype") else next(model.parameters()).dtype

    def _check_names(self, given: Mapping[str, Any]) -> None:
        """Checks further arguments of `forward`, as models of transformers silently ignore unknown ones."""
        model = without_peft(self.wrapped)
        functions = (self.forward, model.forward, model.get_decoder().forward, model.loss_function)
        others = (*TransformersKwargs.__annotations__, *_ALWAYS_TAKEN)
        check_names(f"{type(self).__name__}.forward", given, functions, others)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Gives the weights as `nn.Module.state_dict`, each tied one once, under its first name."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in _tied_names(self):
            state.pop(prefix + name, None)
        return state

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """
        Saves the wrapped model in its own format, and beside it what the wrapper needs to be made again.

        The files of the wrapped model are those that it writes itself, so they load without this package. Of a `PeftModel`
        these are the adapter's alone.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to; made if it is missing.
            push_to_hub (`bool`, *optional*, defaults to `False`): whether to upload the folder as well.
            repo_id (`str`, *optional*): the repository; named like the folder by default.
            kwargs: further arguments of the wrapped model's `save_pretrained`.
        """
        folder = Path(save_directory)
        self.wrapped.save_pretrained(folder, **kwargs)
        facts = {
            "version": _VERSION,
            "wrapper": type(self).__name__,
            "model": type(without_peft(self.wrapped)).__name__,
            **self._save_parts(folder),
        }
        with replacing(folder / WRAPPER_FILE) as unfinished:
            unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name)

    def _save_parts(self, folder: Path) -> dict[str, Any]:
        """Writes what the wrapped model does not, and gives what goes into the wrapper's file."""
        raise NotImplementedError

    @classmethod
    def _load_wrapped(
        cls, name: str | os.PathLike, facts: Mapping[str, Any] | None, kwargs: dict[str, Any]
    ) -> nn.Module:
        """Loads the model that a folder or repository of `save_pretrained` has, and the adapter on it."""
        if facts is None or not hasattr(transformers, facts["model"]):
            config = transformers.AutoConfig.from_pretrained(name, **hub_arguments(kwargs))
            names = config.architectures or []
            kind = getattr(transformers, names[0], None) if names else None
            if kind is None:
                raise ValueError(f"{str(name)!r} must be a model of transformers, got {names or 'no architecture'}")
            return kind.from_pretrained(name, **kwargs)
        kind = getattr(transformers, facts["model"])
        adapter = cached_file(
            name, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs)
        )
        if adapter is None:
            return kind.from_pretrained(name, **kwargs)
        from peft import PeftModel

        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ValueError(
                f"the adapter in {str(name)!r} must name the model that it is for; load that one, and wrap it"
            )
        return PeftModel.from_pretrained(kind.from_pretrained(base, **kwargs), str(name))


def read_wrapper_file(
    name: str | os.PathLike, wrapper: type[ModelWrapper], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """
    Reads what [`~ModelWrapper.save_pretrained`] wrote beside a model.

    Args:
        name (`str` or `os.PathLike`): folder or repository.
        wrapper (`type[ModelWrapper]`): the class that it must be of.
        kwargs (`Mapping[str, Any]`): arguments of `from_pretrained`; those about the Hub count.

    Returns:
        `dict`, or `None` where there is no such file.

    Raises:
        ValueError: if it is of another class or a newer version.
    """
    path = cached_file(name, WRAPPER_FILE, _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs))
    if path is None:
        return None
    facts = json.loads(Path(path).read_text(encoding="utf-8"))
    if facts["wrapper"] != wrapper.__name__ or facts["version"] > _VERSION:
        raise ValueError(
            f"{str(name)!r} must be a {wrapper.__name__} of version {_VERSION} or before, got a {facts['wrapper']} of "
            f"version {facts['version']}"
        )
    return facts


def save_gazing_parts(wrapper: Any, folder: Path, processor: Any, gaze_processor: Any) -> dict[str, Any]:
    """Saves the selector and how frames are normalised for it; gives what the wrapper's file says of them."""
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
    facts: Mapping[str, Any] | None,
    kwargs: Mapping[str, Any],
    gaze_model: Any,
    processor: Any,
    gaze_processor: Any,
) -> dict[str, Any]:
    """Gives `gaze_model`, `processor` and `gaze_processor`: those given, or else the saved ones; and the saved settings."""
    facts = facts or {}
    if gaze_model is None and facts.get("has_gaze_model"):
        gaze_model = AutoModel.from_pretrained(_fetch(name, _SELECTOR, kwargs))
    if processor is None and facts.get("normalization"):
        processor = SimpleNamespace(**facts["normalization"])
    if gaze_processor is None and facts.get("has_gaze_processor"):
        gaze_processor = AutoGazeVideoProcessor.from_pretrained(_fetch(name, _PROCESSOR, kwargs))
    parts = {"gaze_model": gaze_model, "processor": processor, "gaze_processor": gaze_processor}
    return {**parts, **facts.get("settings", {})}


def _fetch(name: str | os.PathLike, part: str, kwargs: Mapping[str, Any]) -> str:
    """Gives the folder of a part; taken for itself, as an adapter beside it would be taken for its own."""
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
    """Lists the names of weights that another name before them has, too."""
    seen, names = set(), []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            names.append(name)
        seen.add(id(parameter))
    return names


def _excuse_tied_weights(module: nn.Module, incompatible: Any) -> None:
    tied = tuple(_tied_names(module))
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not (tied and name.endswith(tied))]
