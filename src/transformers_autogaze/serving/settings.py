"""
Reads and checks the gazing arguments of a request to an inference engine, and loads the selectors that they name.

This module imports no engine.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..hub.checkpoints import SHIPPED_SELECTORS, load_selector
from ..integrations.qwen_vl_gazing import GAZE_SETTINGS
from ..selection_autogaze import GazeSelector
from ..token_budgets_autogaze import budget_each_frame, read_token_budget, threshold_each_frame
from ..video_processing_autogaze import AutoGazeVideoProcessor


GAZE_ARGUMENTS = ("gaze_model", *GAZE_SETTINGS)
"""The arguments of a request about gazing: the selector, and how much to keep. Videos are gazed at if one of the latter is given."""
DEFAULT_GAZE_MODEL = "features"
_INCLUDED = [name for name, place in SHIPPED_SELECTORS.items() if isinstance(place, Path)]
_ASSUMED_FRAMES = 2**20  # a setting is checked as for a video of so many frames, before the video is decoded

_loading = Lock()


class GazeSettings(NamedTuple):
    """
    The selector and the settings that the videos of a request are gazed at with.

    Args:
        gaze_model (`str`): name of the selector.
        options (`dict`): those of the settings `GAZE_SETTINGS` that are given.
    """

    gaze_model: str
    options: dict[str, Any]


def read_settings(configured: Mapping[str, Any], requested: Mapping[str, Any]) -> GazeSettings | None:
    """
    Reads the gazing arguments of a request.

    Each argument of the request overrides the same argument of the server; `None` unsets it.

    Args:
        configured (`Mapping`): the `mm_processor_kwargs` of the server; all but `GAZE_ARGUMENTS` are ignored.
        requested (`Mapping`): the `mm_processor_kwargs` of the request.

    Returns:
        [`GazeSettings`], or `None` if nothing is to be dropped from the videos.

    Raises:
        ValueError: if a setting is out of range, two budgets are given, or the request gives a `gaze_model` that clients may
            not choose, or one without a setting.

    Example:

    ```python
    >>> from transformers_autogaze.serving.settings import read_settings

    >>> read_settings({"gazing_ratio": 0.5, "fps": 2}, {"gazing_ratio": 0.25})
    GazeSettings(gaze_model='features', options={'gazing_ratio': 0.25})
    >>> read_settings({"gazing_ratio": 0.5}, {"gazing_ratio": None}) is None
    True

    ```
    """
    given = {name: {**configured, **requested}.get(name) for name in GAZE_ARGUMENTS}
    options = {name: given[name] for name in GAZE_SETTINGS if given[name] is not None}
    name = DEFAULT_GAZE_MODEL if given["gaze_model"] is None else given["gaze_model"]
    if requested.get("gaze_model") is not None:
        # Clients must not make the server load a folder or repository of their choice.
        known = list(_INCLUDED)
        if configured.get("gaze_model") not in (None, *known):
            known.append(configured["gaze_model"])
        if name not in known:
            raise ValueError(
                f"`gaze_model` of a request must be one of {', '.join(map(repr, known))}, got {name!r}; another selector "
                "can be named where the engine is started, in its `mm_processor_kwargs`"
            )
        if not options:
            raise ValueError(
                f"`gaze_model` must be given with one of {', '.join(GAZE_SETTINGS)}, which say how much to keep"
            )
    if not options:
        return None
    if not isinstance(name, str):
        raise ValueError(f"`gaze_model` must be the name of a selector, such as {DEFAULT_GAZE_MODEL!r}, got {name!r}")
    _check(options, load_gaze_model(name)[0])
    return GazeSettings(name, options)


def load_gaze_model(name: str) -> tuple[GazeSelector, AutoGazeVideoProcessor]:
    """
    Loads a selector; a second call with the same name returns the same selector.

    Args:
        name (`str`): a folder, a repository of the Hub, or a name of `SHIPPED_SELECTORS`.

    Returns:
        `tuple` of the selector, on the CPU, and its video processor.

    Raises:
        ValueError: if there is no such selector.
    """
    with _loading:
        return _load(name)


@lru_cache(maxsize=len(SHIPPED_SELECTORS) + 1)
def _load(name: str) -> tuple[GazeSelector, AutoGazeVideoProcessor]:
    selector, processor = load_selector(name, argument="gaze_model")
    return selector, processor.video_processor


def _check(options: dict[str, Any], selector: GazeSelector) -> None:
    """Checks settings as far as possible without a video."""
    for name, value in options.items():
        if isinstance(value, str):
            raise ValueError(f"`{name}` must be a number, got {json.dumps(value)}")
    ratio, threshold = options.get("gazing_ratio"), options.get("task_loss_requirement")
    budget = read_token_budget(
        selector.config.grid, _ASSUMED_FRAMES, ratio, options.get("clip_ratio"), options.get("tokens_per_clip")
    )
    selector.check_token_budget(budget)
    if ratio is not None:
        budget_each_frame(ratio, len(ratio) if isinstance(ratio, list | tuple) else 1, 1)
    if threshold is not None:
        frames = len(threshold) if isinstance(threshold, list | tuple) else 1
        selector.check_task_loss_requirement(threshold_each_frame(threshold, 1, frames))
