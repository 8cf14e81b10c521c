"""Model cards of checkpoints: facts of a selector and of its training, without figures that were not measured on it."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from ..feature_network_autogaze import FeatureGazeConfig
from ..greedy_autogaze import GreedyGazeConfig


TASK = "other"
"""Pipeline tag of a selector on the Hub, which has no task for choosing patches."""
_TAGS = ("video", "token-pruning", "autogaze", "custom_code")

_TEXT = """# {title}

A selector that chooses the patches of a video that a vision encoder needs, before the encoder runs. It has the model type
`{kind}` of the package `transformers-autogaze`.

## Use

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("path/to/this/folder", trust_remote_code=True)
gaze = model.generate(**processor(videos="video.mp4", num_frames=16, return_tensors="pt"), {setting})
```

## Model

{facts}

## Training

{made}

## Evaluation

Nothing was measured for this card. `autogaze evaluate` measures a checkpoint on videos.
"""


def card_metadata(
    title: str, tags: Sequence[str] = (), base_model: str | None = None, results: Sequence[EvalResult] = ()
) -> str:
    """
    Makes the metadata of a card, which the Hub reads.

    It has no `datasets`, since the Hub accepts only its own datasets there and selectors are trained on files.

    Args:
        title (`str`): name of the model that was evaluated.
        tags (`Sequence[str]`, *optional*): further tags.
        base_model (`str`, *optional*): Hub repository of the model that the weights come from.
        results (`Sequence[EvalResult]`, *optional*): measured results.

    Returns:
        `str`: a YAML block between lines of dashes, with a line break at the end.

    Example:

    ```python
    >>> from huggingface_hub import ModelCard
    >>> from transformers_autogaze.hub.model_cards import card_metadata

    >>> ModelCard(card_metadata("A selector", base_model="you/autogaze")).data.base_model
    'you/autogaze'

    ```
    """
    data = ModelCardData(
        base_model=base_model,
        eval_results=list(results) or None,
        library_name="transformers",
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=title if results else None,  # required for results only
        pipeline_tag=TASK,
        tags=[*_TAGS, *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def make_card(
    model: PreTrainedModel,
    title: str = "A selector of patches",
    made: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> str:
    """
    Makes the card of a selector.

    Args:
        model ([`GazeSelector`]): the selector.
        title (`str`, *optional*, defaults to `"A selector of patches"`): its heading.
        made (`Mapping[str, Any]`, *optional*): facts of its training, such as `{"steps": 1000}`.
        base_model (`str`, *optional*): Hub repository of the model that training started from.

    Returns:
        `str`: the card in Markdown, with the metadata of the Hub.

    Example:

    ```python
    >>> from transformers_autogaze import GreedyGazeSelector
    >>> from transformers_autogaze.hub.model_cards import make_card

    >>> "| scales | 32, 64, 112, 224 pixels |" in make_card(GreedyGazeSelector(), made={"search": "greedy"})
    True

    ```
    """
    config = model.config
    parameters = sum(weight.numel() for weight in model.parameters())
    facts = {
        "parameters": f"{parameters:,}, in {str(model.dtype).removeprefix('torch.')}" if parameters else "none",
        "scales": f"{', '.join(map(str, config.grid.scales))} pixels",
        "patches": f"{config.grid.num_patches} of a frame, {config.grid.patch_size} pixels a side",
        "frames of a clip": getattr(config, "max_num_frames", None) or "any number",
    }
    is_over_time = isinstance(config, (FeatureGazeConfig, GreedyGazeConfig))
    text = _TEXT.format(
        title=title,
        kind=config.model_type,
        setting="clip_ratio=0.25" if is_over_time else "gazing_ratio=0.25",
        facts=_table(facts),
        made=_table(made) if made else "No facts of the training are recorded.",
    )
    return f"{card_metadata(title, base_model=base_model)}\n{text}"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])
