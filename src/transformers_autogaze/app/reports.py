"""Results as HTML: messages, progress, the table of figures and the timeline."""

import html
from collections.abc import Sequence
from typing import Any

from .choices import Choices
from .work import Result


_COLOURS = ("var(--autogaze-first)", "var(--autogaze-second)")
# Layout of the timeline, in units of the SVG view box.
_WIDTH, _HEIGHT, _LEFT, _MARGIN, _FLOOR = 640, 160, 56, 8, 134


def message(text: str, is_error: bool = False) -> str:
    """Returns a status line."""
    return f'<p class="autogaze-{"error" if is_error else "status"}">{html.escape(text)}</p>'


def progress(stage: str, done: int, total: int) -> str:
    """Returns a progress bar with a caption; it has no value if `total` is 0."""
    known = f'value="{done}" max="{total}"' if total else ""
    count = f" {done} of {total}" if total else ""
    stage = html.escape(stage)
    return f'<p class="autogaze-status">{stage}{count}</p><progress {known} aria-label="{stage}"></progress>'


def caption_of(result: Result) -> str:
    """Returns the heading above the overlay of a selector."""
    return f"<h3>{html.escape(result.selector)}</h3>"


def figures(results: Sequence[Result], choices: Choices) -> str:
    """Returns a table of the numbers of kept patches, with a column for each selector."""
    rows = {"": [result.selector for result in results]}
    for result in results:
        for name, value in _figures_of(result, choices).items():
            rows.setdefault(name, []).append(value)
    head, *body = (
        "<tr>"
        + f'<th scope="row">{html.escape(name)}</th>'
        + "".join(f"<{cell}>{html.escape(value)}</{cell}>" for value in values)
        + "</tr>"
        for name, values in rows.items()
        for cell in ["td" if name else "th"]
    )
    note = f"Tokens of {choices.mllm} are counted only for the MLLM's own patches."
    notes = "" if all(result.tokens for result in results) else f"<p>{html.escape(note)}</p>"
    return f'<div class="autogaze-figures"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table>{notes}</div>'


def _figures_of(result: Result, choices: Choices) -> dict[str, str]:
    statistics = result.statistics
    count, kept, factor = statistics["num_frames"], statistics["num_patches"], statistics["reduction_factor"]
    scales = statistics["patches_each_scale"]
    unit = "a frame" if choices.frames_of_token == 1 else f"for {choices.frames_of_token} frames"
    figures = {
        "Patches kept": f"{kept:,}, {kept / count:.1f} {unit}",
        "Share of a dense encoder's": f"{1 / factor:.1%} ({round(factor * kept):,})" if factor else "0%",
    }
    if len(scales) > 1:
        figures["At each scale"] = ", ".join(f"{number:,} at {scale}" for scale, number in scales.items())
    tokens = result.tokens
    name = f"Tokens for {choices.mllm}"
    if tokens is None:
        figures[name] = "not known"
    else:
        saved = 1 - tokens.kept / tokens.whole
        figures[name] = f"{tokens.kept:,} of {tokens.whole:,} ({saved:.0%} saved)"
    figures["Reconstruction"] = f"{statistics['psnr']:.1f} dB PSNR"
    figures["Time"] = f"{result.seconds:.1f} s, of which {result.gazing_seconds:.1f} s in the selector"
    return figures


def timeline(results: Sequence[Result]) -> str:
    """Draws the kept patches of every frame over time, with a curve for each selector, and the scene cuts."""
    counts = [result.statistics["patches_each_frame"] for result in results]
    cuts = results[0].cuts
    most, end = max(1, *map(max, counts)), max(results[0].times[-1], 1e-9)

    def x_of(time: float) -> float:
        return _LEFT + time / end * (_WIDTH - _LEFT - _MARGIN)

    def y_of(count: int) -> float:
        return _MARGIN + (1 - count / most) * (_FLOOR - _MARGIN)

    marks = [
        f'<line x1="{x_of(cut):.1f}" y1="{_MARGIN}" x2="{x_of(cut):.1f}" y2="{_FLOOR}" class="autogaze-cut">'
        f"<title>a new scene, {cut:.2f} s</title></line>"
        for cut in cuts
    ]
    for number, (result, values) in enumerate(zip(results, counts, strict=True)):
        points = [(x_of(time), y_of(value)) for time, value in zip(result.times, values, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 3"' if number else ""
        marks.append(f'<polyline points="{line}" fill="none" stroke="{_COLOURS[number]}" stroke-width="2"{dash}/>')
        marks += (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_COLOURS[number]}">'
            f"<title>{html.escape(result.selector)}, {time:.2f} s: {value} patches</title></circle>"
            for (x, y), time, value in zip(points, result.times, values, strict=True)
        )
    names = [*(html.escape(result.selector) for result in results), *["a new scene"] * bool(cuts)]
    colours = [*_COLOURS[: len(results)], "var(--autogaze-cut)"]
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{name}</span>' for name, colour in zip(names, colours, strict=False)
    )
    return (
        f'<figure class="autogaze-timeline"><figcaption>Patches kept of every frame {legend}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Patches kept of every frame over time">'
        f"{_axes(most, end)}{''.join(marks)}</svg></figure>"
    )


def _axes(most: int, end: float) -> str:
    right = _WIDTH - _MARGIN
    return (
        f'<path d="M{_LEFT} {_MARGIN}V{_FLOOR}H{right}" fill="none" stroke="currentColor" opacity="0.4"/>'
        + _text(_LEFT - 6, _MARGIN + 8, str(most), "end")
        + _text(_LEFT - 6, _FLOOR, "0", "end")
        + _text(_LEFT, _HEIGHT - 6, "0 s", "start")
        + _text(right, _HEIGHT - 6, f"{end:.1f} s", "end")
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12" fill="currentColor">{text}</text>'


def describe_error(error: Any, names: dict[str, str]) -> str:
    """Returns an error message in which each path on the server, a key of `names`, is replaced by a name."""
    text = str(error)
    for path, name in names.items():
        text = text.replace(path, name)
    return text[0].upper() + text[1:] if text else "The video could not be pruned."
