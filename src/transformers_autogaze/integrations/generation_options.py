"""
Generation on pruned prompts, with the options of an MLLM's `generate`.

The MLLM reads fewer tokens than the caller's prompt has. Options that do not depend on this are passed on, lengths and
callbacks are adapted so that they refer to the caller's prompt, and all other options are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .wrapping import without_peft


# These depend on scores, or on which tokens a prompt contains, but not on their number or positions.
_SUPPORTED = frozenset(
    """
    bad_words_ids begin_suppress_tokens bos_token_id do_sample early_stopping eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty length_penalty max_length max_new_tokens max_time min_length min_new_tokens min_p
    no_repeat_ngram_size num_beams num_return_sequences output_attentions output_hidden_states output_logits
    output_scores pad_token_id remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    return_legacy_cache sequence_bias stop_strings suppress_tokens synced_gpus temperature tokenizer top_h top_k top_p
    typical_p use_cache use_model_defaults
    """.split()
)
_CALLBACKS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
_METADATA = ("transformers_version", "_from_model_config", "_commit_hash")


def check_generation_options(
    config: GenerationConfig | None, options: dict[str, Any], model_inputs: Sequence[str] = ()
) -> None:
    """
    Checks options of `generate` before any computation.

    Args:
        config (`GenerationConfig`, *optional*): that of the MLLM, used if `options` has no `generation_config`.
        options (`dict[str, Any]`): the caller's arguments of `generate`.
        model_inputs (`Sequence[str]`): names of options that are further inputs of the MLLM, such as images.

    Raises:
        ValueError: if an option is not supported on a pruned prompt.
    """
    _, requested = _merge_options(config, options)
    defaults = GenerationConfig().to_dict()
    for name, value in requested.items():
        is_supported = name in _SUPPORTED or name in _CALLBACKS or name in model_inputs or name == "generation_config"
        is_supported |= name in _METADATA or (name == "cache_implementation" and value == "dynamic")
        if not is_supported and (name not in defaults or value != defaults[name]):
            # The text of a model or a tensor would be too long for a message.
            got = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
            raise ValueError(
                f"`{name}` must not be given for a pruned prompt, got {got}: it is not known to give the MLLM's own answer "
                "there; leave it out"
            )


def generate_on_pruned_prompts(
    mllm: Any, inputs: Mapping[str, torch.Tensor], options: dict[str, Any], prompts: torch.Tensor
) -> Any:
    """
    Calls an MLLM's `generate` on pruned prompts.

    Args:
        mllm ([`~transformers.PreTrainedModel`]): the MLLM, or a `PeftModel` of it.
        inputs (`Mapping[str, torch.Tensor]`): the pruned prompts: `input_ids`, `inputs_embeds` and `attention_mask`.
        options (`dict[str, Any]`): the caller's arguments of `generate`, as [`check_generation_options`] accepts them.
        prompts (`torch.LongTensor` of shape `(batch, length)`): the caller's prompts.

    Returns:
        What `generate` returns. Its sequences start with `prompts`, whatever the lengths of the pruned prompts, so that
        `[:, prompts.shape[1] :]` are the answers.

    Raises:
        ValueError: if `max_length` is not more than the length of the prompts.
    """
    length = inputs["input_ids"].shape[1]
    config = getattr(without_peft(mllm), "generation_config", None)
    output = mllm.generate(**inputs, **_adapt_options(config, options, prompts, length))
    restore = _PromptRestorer(prompts, length)
    if isinstance(output, torch.Tensor):
        return restore(output)
    output["sequences"] = restore(output.sequences)
    return output


def _merge_options(config: GenerationConfig | None, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options that are not `None`, and these together with those of the generation configuration in use."""
    options = {name: value for name, value in options.items() if value is not None}
    effective = options.get("generation_config", config)
    return options, {**({} if effective is None else effective.to_diff_dict()), **options}


def _adapt_options(
    config: GenerationConfig | None, options: dict[str, Any], prompts: torch.Tensor, length: int
) -> dict[str, Any]:
    """
    Adapts options to pruned prompts of a length, so that lengths and callbacks refer to the caller's `prompts`.

    The arguments are those of [`generate_on_pruned_prompts`].
    """
    options, requested = _merge_options(config, options)
    defaults = GenerationConfig().to_dict()
    adapted = dict(options)
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        total = requested.get(name)
        adapted.pop(name, None)
        if total is None or total == defaults.get(name) or requested.get(new) is not None:
            continue
        if name == "max_length" and total <= prompts.shape[1]:
            raise ValueError(f"`max_length` must be more than the prompt's {prompts.shape[1]} tokens, got {total}")
        adapted[new] = max(0, total - prompts.shape[1])
    restore = _PromptRestorer(prompts, length)
    if "logits_processor" in options:
        adapted["logits_processor"] = LogitsProcessorList(
            _RestoringProcessor(processor, restore) for processor in options["logits_processor"]
        )
    if "stopping_criteria" in options:
        criteria = options["stopping_criteria"]
        criteria = criteria if isinstance(criteria, Sequence) else [criteria]
        adapted["stopping_criteria"] = StoppingCriteriaList(
            _RestoringCriterion(criterion, restore) for criterion in criteria
        )
    if "prefix_allowed_tokens_fn" in options:
        allowed_tokens = options["prefix_allowed_tokens_fn"]
        adapted["prefix_allowed_tokens_fn"] = lambda batch_id, ids: allowed_tokens(
            batch_id, torch.cat([prompts[batch_id].to(ids.device), ids[length:]])
        )
    if "streamer" in options:
        adapted["streamer"] = _RestoringStreamer(options["streamer"], prompts)
    return adapted


class _PromptRestorer:
    """Replaces the pruned prompts of a length at the start of sequences by the caller's prompts."""

    def __init__(self, prompts: torch.Tensor, length: int):
        self.prompts, self.length = prompts, length

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        copies = len(input_ids) // len(self.prompts)  # beams, or several answers to a prompt
        prompts = self.prompts.to(input_ids.device).repeat_interleave(copies, dim=0)
        return torch.cat([prompts, input_ids[:, self.length :]], dim=1)


class _RestoringProcessor(LogitsProcessor):
    def __init__(self, processor: Callable[..., torch.Tensor], restore: _PromptRestorer):
        self.processor, self.restore = processor, restore

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(self.restore(input_ids), scores)


class _RestoringCriterion(StoppingCriteria):
    def __init__(self, criterion: Callable[..., torch.Tensor], restore: _PromptRestorer):
        self.criterion, self.restore = criterion, restore

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.criterion(self.restore(input_ids), scores, **kwargs)


class _RestoringStreamer(BaseStreamer):
    def __init__(self, streamer: BaseStreamer, prompts: torch.Tensor):
        self.streamer, self.prompts = streamer, prompts

    def put(self, value: torch.Tensor) -> None:
        # The first call passes the prompt.
        value, self.prompts = (value, None) if self.prompts is None else (self.prompts.cpu(), None)
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
