"""Line charts, drawn with Pillow. Knows nothing of what the lines mean."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont


# Told apart with any kind of colour vision (Okabe and Ito, 2008).
_COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (86, 180, 233), (120, 120, 120), (0, 0, 0))
_GRID, _TEXT = (225, 225, 225), (40, 40, 40)
_SCALE = 2  # pixels drawn per pixel kept, which smooths the lines
_LEFT, _TOP, _BOTTOM, _GAP = 70, 54, 56, 8
_ROW, _SWATCH = 22, 30  # of the legend, which stands at the right


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (760, 480),
) -> Image.Image:
    """
    Draws lines with a mark at every point, and a legend at the right.

    Args:
        lines (`Mapping` of `str` to `Sequence[tuple[float, float]]`): the points of each line by its name, in order.
        title, x_label, y_label (`str`): what to write at the top and at the axes.
        size (`tuple[int, int]`, *optional*, defaults to `(760, 480)`): width and height in pixels.

    Returns:
        `PIL.Image.Image`: the chart, in RGB.

    Raises:
        ValueError: if there is no point.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.charts import line_chart

    >>> line_chart({"a": [(0, 1), (1, 3)], "b": [(0, 2)]}, "Title", "x", "y").size
    (760, 480)

    ```
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError(f"`lines` must hold at least one point, got {dict(lines)}")
    x_ticks, y_ticks = (_ticks(min(values), max(values)) for values in zip(*points, strict=True))
    font, large = (ImageFont.load_default(size=height * _SCALE) for height in (14, 17))
    legend = _SWATCH + max(math.ceil(font.getlength(name) / _SCALE) for name in lines)
    width, height = (side * _SCALE for side in size)
    left, right = _LEFT * _SCALE, width - (legend + 3 * _GAP) * _SCALE
    top, bottom = _TOP * _SCALE, height - _BOTTOM * _SCALE

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left),
            bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top),
        )

    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    gap = _GAP * _SCALE
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        draw.line([(x, top), (x, bottom)], fill=_GRID, width=_SCALE)
        draw.text((x, bottom + gap), f"{tick:g}", fill=_TEXT, font=font, anchor="mt")
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        draw.line([(left, y), (right, y)], fill=_GRID, width=_SCALE)
        draw.text((left - gap, y), f"{tick:g}", fill=_TEXT, font=font, anchor="rm")
    draw.text(((left + right) / 2, height - gap), x_label, fill=_TEXT, font=font, anchor="mb")
    draw.text((gap, top - gap), y_label, fill=_TEXT, font=font, anchor="lb")
    draw.text((width / 2, gap), title, fill=_TEXT, font=large, anchor="mt")

    # The first line lies on top.
    for index, (name, line) in reversed(list(enumerate(lines.items()))):
        colour, at = _COLOURS[index % len(_COLOURS)], [place(*point) for point in line]
        draw.line(at, fill=colour, width=2 * _SCALE, joint="curve")
        for x, y in at:
            radius = 3 * _SCALE
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
        x, y = right + gap, top + _ROW * _SCALE * (index + 0.5)
        draw.line([(x, y), (x + (_SWATCH - _GAP) * _SCALE, y)], fill=colour, width=3 * _SCALE)
        draw.text((x + _SWATCH * _SCALE, y), name, fill=_TEXT, font=font, anchor="lm")
    return image.resize(size, Image.Resampling.LANCZOS)


def _ticks(low: float, high: float) -> list[float]:
    """Gives about six round numbers that enclose a range."""
    span = (high - low) or max(abs(high), 1.0)
    unit = 10 ** math.floor(math.log10(span / 5))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if span / (factor * unit) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
