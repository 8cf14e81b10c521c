"""Arguments that all models for lmms-eval have in common."""

from ..token_budgets_autogaze import budget_each_frame, check_clip_ratio, threshold_each_frame


NO_SELECTOR = "none"
"""The value of `selector` with which all tokens are kept."""


def read_settings(selector: str, batch_size: int | str, **settings: float | None) -> dict[str, float]:
    """
    Checks arguments before a model is loaded.

    Args:
        selector (`str`): name of the selector, or [`NO_SELECTOR`].
        batch_size (`int` or `str`): must be 1.
        settings (`float`, *optional*): `gazing_ratio`, `task_loss_requirement` and `clip_ratio`.

    Returns:
        `dict[str, float]`: the settings that are not `None`.

    Raises:
        ValueError: if an argument is out of range, or settings are given without a selector.

    Example:

    ```python
    >>> from transformers_autogaze.lmms_harness.settings import read_settings

    >>> read_settings("features", batch_size=1, gazing_ratio=0.25, task_loss_requirement=None)
    {'gazing_ratio': 0.25}

    ```
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if selector == NO_SELECTOR and given:
        raise ValueError(f"`{next(iter(given))}` must not be given with `selector` {NO_SELECTOR!r}, got {given}")
    if "gazing_ratio" in given:
        budget_each_frame(given["gazing_ratio"], 1, 1)
    if "task_loss_requirement" in given:
        threshold_each_frame(given["task_loss_requirement"], 1, 1)
    check_clip_ratio(given.get("clip_ratio"))
    if str(batch_size) != "1":
        raise ValueError(f"`batch_size` must be 1, as times are measured per answer, got {batch_size!r}")
    return given
