"""Line charts with matplotlib, which is imported only when a chart is drawn."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.output_files import replacing


class Panel(NamedTuple):
    """
    One chart of a figure.

    Args:
        lines (`Mapping` of `str` to `Sequence[tuple[float, float]]`): the points of each line by its name, in order.
        title, x_label, y_label (`str`): title of the chart and labels of its axes.
        styles (`Mapping` of `str` to `dict`, *optional*): arguments of matplotlib's `plot` for lines, by name.
        log_x (`bool`, *optional*, defaults to `False`): whether the x axis is logarithmic.
        x_ticks (`Mapping` of `float` to `str`, *optional*): labels of the x axis by their positions.
    """

    lines: Mapping[str, Sequence[tuple[float, float]]]
    title: str
    x_label: str
    y_label: str
    styles: Mapping[str, Mapping[str, Any]] = {}
    log_x: bool = False
    x_ticks: Mapping[float, str] = {}


def check_matplotlib() -> None:
    """
    Checks that charts can be drawn, without importing matplotlib.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("charts need matplotlib: pip install 'transformers-autogaze[evaluate]'")


def draw_charts(path: str | Path, panels: Sequence[Panel]) -> Path:
    """
    Draws charts side by side with a legend at the right, as a PNG.

    Args:
        path (`str` or `Path`): the file to write.
        panels (`Sequence[Panel]`): the charts, from left to right.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if a chart has no points.
        ImportError: if matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.plots import Panel, draw_charts

    >>> draw_charts("chart.png", [Panel({"a": [(0, 1), (1, 3)], "b": [(0, 2)]}, "Title", "x", "y")]).name
    'chart.png'

    ```
    """
    for panel in panels:
        if not any(len(line) for line in panel.lines.values()):
            raise ValueError(f"`panels` must hold at least one point each, got none for {panel.title!r}")
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    # The legend takes about half the width of a chart.
    figure = Figure(figsize=(5.1 * len(panels) + 2.5, 4.8), dpi=100, layout="constrained")
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, line in panel.lines.items():
            style = {"marker": "o", "markersize": 4, **panel.styles.get(name, {})}
            (handle,) = axes.plot(*zip(*line, strict=True), **style) if len(line) else axes.plot([], [], **style)
            handles.setdefault(name, handle)
        if panel.log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if panel.x_ticks:
            axes.set_xticks(list(panel.x_ticks), list(panel.x_ticks.values()))
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")
    return Path(path)
