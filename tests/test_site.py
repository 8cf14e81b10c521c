"""What builds the site: docstrings become Markdown, links out of `docs/` lead to pages, tables are included."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


pytest.importorskip("griffe")
pytest.importorskip("mkdocs")
TOOLS = Path(__file__).parents[1] / "docs" / "mkdocs"
to_markdown = runpy.run_path(str(TOOLS / "docstrings.py"))["to_markdown"]
hooks = runpy.run_path(str(TOOLS / "hooks.py"))


def on_page(markdown: str, page: str = "a.md") -> str:
    file = SimpleNamespace(src_uri=page, generated_by=None)
    return hooks["on_page_markdown"](markdown, page=SimpleNamespace(file=file))


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        (
            "Args:\n    size (`int`, *optional*): pixels.",
            "\n**Parameters**\n\n- **`size`** (`int`, *optional*): pixels.",
        ),
        (
            "Args:\n    a, b (`tuple` of shape `(x,)`):\n        Two.\n    source:\n        One.",
            "\n**Parameters**\n\n- **`a`**, **`b`** (`tuple` of shape `(x,)`):\n        Two.\n- **`source`**:\n        One.",
        ),
        ("Raises:\n    ValueError: if so.", "\n**Raises**\n\n- **`ValueError`**: if so."),
        ("Returns:\n    `int`: a number.\n\nMore.", "\n**Returns**\n\n`int`: a number.\n\nMore."),
        ("Args: as in [`Known`].", "\n**Parameters**: as in [`Known`][package.Known]."),
        ("See [`~Known.call`], [`Other`].", "See [`Known.call`][package.Known], `Other`."),
        ("See docs/design.md, section 5.1.", "See [design, section 5.1](../design.md#51-what-a-canvas-is)."),
        ("```python\n>>> [`Known`]\n```", "```pycon\n>>> [`Known`]\n```"),
    ],
)
def test_docstrings_become_markdown(docstring, markdown):
    assert to_markdown(docstring, {"Known": "package.Known"}) == markdown


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("a.md", "../CHANGELOG.md", "changelog.md"),
        ("tasks/a.md", "../../examples/grpo.py", "../examples.md#grpopy"),
        ("tasks/a.md", "../b.md#part", "../b.md#part"),
        ("a.md", "../README.md", "index.md"),
        ("a.md", "https://example.org", "https://example.org"),
    ],
)
def test_links_out_of_docs_lead_to_pages(page, link, expected):
    assert on_page(f"[there]({link}).", page) == f"[there]({expected})."
    assert on_page(f"```\n[there]({link})\n```", page) == f"```\n[there]({link})\n```"


def test_the_first_use_of_a_name_is_a_link():
    text = "# `GazeGrid`\n\n[`GazeGrid`](a.md), `GazeGrid`, `GazeGrid`\n\n```\n`GazeOutput`\n```\n"
    linked = "[`GazeGrid`][transformers_autogaze.GazeGrid]"
    assert on_page(text) == text.replace(", `GazeGrid`", f", {linked}", 1)


def test_tables_of_other_pages_are_included():
    text = on_page("<!-- table thresholds of results/README.md -->")
    assert text.startswith("| threshold | ") and "<!--" not in text
