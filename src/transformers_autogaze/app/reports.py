"""What the page shows in words, tables and curves, as HTML that follows the page's colours."""

import html
from collections.abc import Sequence
from typing import Any

from ..visualization import PANELS
from .choices import Choices
from .work import Result


_COLOURS = ("var(--autogaze-first)", "var(--autogaze-second)")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 150, 40, 22  # of the timeline, in units of its drawing


def message(text: str, is_error: bool = False) -> str:
    """Writes a line of status."""
    return f'<p class="autogaze-{"error" if is_error else "status"}">{html.escape(text)}</p>'


def progress(stage: str, done: int, total: int) -> str:
    """Writes how far the work is."""
    known = f'value="{done}" max="{total}"' if total else ""
    count = f" {done} of {total}" if total else ""
    stage = html.escape(stage)
    return f'<p class="autogaze-status">{stage}{count}</p><progress {known} aria-label="{stage}"></progress>'


def caption_of(result: Result) -> str:
    """Says what the panels of an overlay are."""
    return f"<p><b>{html.escape(result.selector)}</b>: {', '.join(PANELS)}</p>"


def figures(results: Sequence[Result], choices: Choices) -> str:
    """Writes what was kept as a table, a column for each selector."""
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
    notes = "" if all(result.tokens for result in results) else f"<p>{html.escape(_no_count(choices.mllm))}</p>"
    return f'<div class="autogaze-figures"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table>{notes}</div>'


def _no_count(mllm: str) -> str:
    return f"Tokens of {mllm} are counted where its own patches are chosen from."


def _figures_of(result: Result, choices: Choices) -> dict[str, str]:
    known = result.statistics
    count, kept, factor = known["num_frames"], known["num_patches"], known["reduction_factor"]
    scales = known["patches_each_scale"]
    unit = "a frame" if choices.frames_of_token == 1 else f"for {choices.frames_of_token} frames"
    figures = {
        "Patches kept": f"{kept:,}, {kept / count:.1f} {unit}",
        "Of a dense encoder's": f"{1 / factor:.1%} ({round(factor * kept):,})" if factor else "0%",
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
    figures["Rebuilt from them"] = f"{known['psnr']:.1f} dB PSNR"
    figures["Time"] = f"{result.seconds:.1f} s, {result.gazing_seconds:.1f} s of it to choose"
    return figures


def timeline(results: Sequence[Result]) -> str:
    """Draws the patches of every frame over time, a curve for each selector."""
    counts = [result.statistics["patches_each_frame"] for result in results]
    most, end = max(1, *map(max, counts)), max(results[0].times[-1], 1e-9)
    inner_width, inner_height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 8
    drawn = []
    for number, (result, values) in enumerate(zip(results, counts, strict=True)):
        points = [
            (_LEFT + time / end * inner_width, 8 + (1 - value / most) * inner_height)
            for time, value in zip(result.times, values, strict=True)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 3"' if number else ""
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{_COLOURS[number]}" stroke-width="2"{dash}/>')
        drawn += (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_COLOURS[number]}">'
            f"<title>{html.escape(result.selector)}, {time:.2f} s: {value} patches</title></circle>"
            for (x, y), time, value in zip(points, result.times, values, strict=True)
        )
    floor = _HEIGHT - _BOTTOM
    axes = (
        f'<line x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - 8}" y2="{floor}" stroke="currentColor" opacity="0.4"/>'
        f'<line x1="{_LEFT}" y1="8" x2="{_LEFT}" y2="{floor}" stroke="currentColor" opacity="0.4"/>'
        + _text(_LEFT - 6, 16, str(most), "end")
        + _text(_LEFT - 6, floor, "0", "end")
        + _text(_LEFT, _HEIGHT - 6, "0 s", "start")
        + _text(_WIDTH - 8, _HEIGHT - 6, f"{end:.1f} s", "end")
    )
    legend = "".join(
        f'<span><i style="background:{_COLOURS[number]}"></i>{html.escape(result.selector)}</span>'
        for number, result in enumerate(results)
    )
    return (
        f'<figure class="autogaze-timeline"><figcaption>Patches kept of every frame {legend}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Patches kept of every frame over time">'
        f"{axes}{''.join(drawn)}</svg></figure>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12" fill="currentColor">{text}</text>'


def describe_error(error: Any, names: dict[str, str]) -> str:
    """Says what is at fault, without the names that files have on the server."""
    text = str(error)
    for path, name in names.items():
        text = text.replace(path, name)
    return text[0].upper() + text[1:] if text else "That did not work."
