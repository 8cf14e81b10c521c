"""
Which options of `generate` an MLLM can be given on a pruned prompt.

The prompt that the MLLM reads is not the one that its caller gave. This module knows which options give the MLLM's own
answer all the same, shows the others' functions the prompt as it was given, and refuses what is not known.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


# They look at scores, or at what stands in a prompt, not at how often or where.
_KNOWN = frozenset(
    """
    bad_words_ids begin_suppress_tokens bos_token_id do_sample early_stopping eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty length_penalty max_length max_new_tokens max_time min_length min_new_tokens min_p
    no_repeat_ngram_size num_beams num_return_sequences output_attentions output_hidden_states output_logits
    output_scores pad_token_id remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    return_legacy_cache sequence_bias stop_strings suppress_tokens synced_gpus temperature tokenizer top_h top_k top_p
    typical_p use_cache use_model_defaults
    """.split()
)
_FUNCTIONS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
_NOTES = ("transformers_version", "_from_model_config", "_commit_hash")


def check_generation_options(
    config: GenerationConfig | None, options: dict[str, Any], model_inputs: Sequence[str] = ()
) -> None:
    """
    Checks options of `generate` before any work.

    Args:
        config (`GenerationConfig`, *optional*): that of the MLLM, used if `options` has no `generation_config`.
        options (`dict[str, Any]`): the caller's arguments of `generate`.
        model_inputs (`Sequence[str]`): names of options that are further inputs of the MLLM, such as pictures.

    Raises:
        ValueError: if an option is not known to work on a pruned prompt.
    """
    _, requested = _merge_options(config, options)
    defaults = GenerationConfig().to_dict()
    for name, value in requested.items():
        is_known = name in _KNOWN or name in _FUNCTIONS or name in model_inputs or name == "generation_config"
        is_known |= name in _NOTES or (name == "cache_implementation" and value == "dynamic")
        if not is_known and (name not in defaults or value != defaults[name]):
            # The text of a model or a tensor would be too long for a message.
            shown = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
            raise ValueError(
                f"`{name}` must not be given for a pruned prompt, got {shown}: it is not known to give the MLLM's own answer "
                "there; leave it out"
            )


def _merge_options(config: GenerationConfig | None, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gives the options that are not `None`, and these together with those of the generation configuration in use."""
    options = {name: value for name, value in options.items() if value is not None}
    effective = options.get("generation_config", config)
    return options, {**({} if effective is None else effective.to_diff_dict()), **options}


def fit_generation_options(
    config: GenerationConfig | None, options: dict[str, Any], given: torch.Tensor, length: int
) -> dict[str, Any]:
    """
    Makes options of `generate` fit a pruned prompt; see [`check_generation_options`].

    Args:
        config (`GenerationConfig`, *optional*): that of the MLLM, used if `options` has no `generation_config`.
        options (`dict[str, Any]`): the caller's arguments of `generate`.
        given (`torch.LongTensor` of shape `(batch, length)`): the prompts as they were given.
        length (`int`): length of the prompts that the MLLM reads.

    Returns:
        `dict[str, Any]`: options with which the MLLM gives its own answer. Lengths count from the prompts as given; functions
        see these.

    Raises:
        ValueError: if `max_length` is not more than the length of the prompt.
    """
    options, requested = _merge_options(config, options)
    defaults = GenerationConfig().to_dict()
    fitted = dict(options)
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        total = requested.get(name)
        fitted.pop(name, None)
        if total is None or total == defaults.get(name) or requested.get(new) is not None:
            continue
        if name == "max_length" and total <= given.shape[1]:
            raise ValueError(f"`max_length` must be more than the prompt's {given.shape[1]} tokens, got {total}")
        fitted[new] = max(0, total - given.shape[1])
    seen = _Seen(given, length)
    if "logits_processor" in options:
        fitted["logits_processor"] = LogitsProcessorList(
            _ProcessorAsGiven(processor, seen) for processor in options["logits_processor"]
        )
    if "stopping_criteria" in options:
        criteria = options["stopping_criteria"]
        criteria = criteria if isinstance(criteria, Sequence) else [criteria]
        fitted["stopping_criteria"] = StoppingCriteriaList(_CriterionAsGiven(one, seen) for one in criteria)
    if "prefix_allowed_tokens_fn" in options:
        allowed = options["prefix_allowed_tokens_fn"]
        fitted["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([given[row].to(ids.device), ids[length:]])
        )
    if "streamer" in options:
        fitted["streamer"] = _StreamerAsGiven(options["streamer"], given)
    return fitted


def sequences_as_given(output: Any, given: torch.Tensor, length: int) -> Any:
    """
    Puts the prompts as they were given in the place of those that the MLLM read.

    Args:
        output: what `generate` returned: `torch.LongTensor` of shape `(sequences, length + answer)` or an output that has it.
        given (`torch.LongTensor` of shape `(batch, given length)`): the prompts as they were given.
        length (`int`): length of those that the MLLM read.
    """
    if isinstance(output, torch.Tensor):
        return _Seen(given, length)(output)
    output["sequences"] = _Seen(given, length)(output.sequences)
    return output


class _Seen:
    """Puts given prompts in the place of read ones."""

    def __init__(self, given: torch.Tensor, length: int):
        self.given, self.length = given, length

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        times = len(input_ids) // len(self.given)  # beams, or several answers to a prompt
        prompts = self.given.to(input_ids.device).repeat_interleave(times, dim=0)
        return torch.cat([prompts, input_ids[:, self.length :]], dim=1)


class _ProcessorAsGiven(LogitsProcessor):
    def __init__(self, processor: Callable[..., torch.Tensor], seen: _Seen):
        self.processor, self.seen = processor, seen

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(self.seen(input_ids), scores)


class _CriterionAsGiven(StoppingCriteria):
    def __init__(self, criterion: Callable[..., torch.Tensor], seen: _Seen):
        self.criterion, self.seen = criterion, seen

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.criterion(self.seen(input_ids), scores, **kwargs)


class _StreamerAsGiven(BaseStreamer):
    def __init__(self, streamer: BaseStreamer, given: torch.Tensor):
        self.streamer, self.given = streamer, given

    def put(self, value: torch.Tensor) -> None:
        # The prompt comes first.
        value, self.given = (value, None) if self.given is None else (self.given.cpu(), None)
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
