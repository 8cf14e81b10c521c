"""
What MkDocs does beside its own when it builds the site.

Files of the repository that lie outside `docs/` become pages, so that links to them work on GitHub and on the site alike; and
tables that another page has are included, so that their figures are written once.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api"
HLVID = "src/transformers_autogaze/lmms_harness/tasks/hlvid/README.md"
EXAMPLES = "examples.md"
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", HLVID: "hlvid.md"}
"""Files of the repository that become pages, by their paths there. README.md is not one of them: index.md stands in its place."""
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)([^()\s#]+)(#[^()\s]*)?(?=\))")
NAME = re.compile(r"(```.*?```|^#.*?$|\[[^]]*\][(\[])|`(\w+)`", re.DOTALL | re.MULTILINE)
"""What links of names leave alone (code blocks, headings, links), or else a name."""
INCLUDED = re.compile(r"<!-- table (\S+) of (\S+) -->")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made of files outside `docs/`."""
    for source, page in PAGES.items():
        files.append(
            File.generated(config, page, content=_with_site_links((ROOT / source).read_text("utf-8"), source, page))
        )
    files.append(File.generated(config, EXAMPLES, content=_examples()))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Includes tables of other pages, turns links out of `docs/` into links to pages, and links names to the API reference."""
    markdown = INCLUDED.sub(lambda found: _table(found[1], found[2]), markdown)
    if not page.file.generated_by:
        markdown = _with_site_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return _with_names_linked(markdown)


def _with_site_links(markdown: str, source: str, page: str) -> str:
    """Gives the text of a file of the repository with links as they are on its page."""

    def place(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        anchor = found[2] or ""
        if target.startswith("examples/"):
            name = posixpath.basename(target)
            target, anchor = EXAMPLES, f"#{re.sub(r'[^a-z0-9_-]', '', name)}"
        elif target == "README.md":
            target = "index.md"
        else:
            target = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(page) or ".") + anchor

    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(place, part) for part in parts)


def _with_names_linked(markdown: str) -> str:
    """Links each name of the API reference where a page has it first, outside code blocks, headings and other links."""
    paths = re.findall(
        r"^::: (\S+)", "".join(page.read_text("utf-8") for page in API.glob("*.md")), flags=re.MULTILINE
    )
    names = {path.rpartition(".")[2]: path for path in paths}

    def link(found: re.Match) -> str:
        path = names.pop(found[2], None) if found[2] else None
        return f"[`{found[2]}`][{path}]" if path else found[0]

    return NAME.sub(link, markdown)


def _table(name: str, document: str) -> str:
    """Gives what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in a document."""
    text = (ROOT / "docs" / document).read_text("utf-8")
    return text.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0].strip()


def _examples() -> str:
    """Makes a page of the scripts in `examples/`."""
    parts = [
        "# Examples\n\nScripts to copy, from the folder `examples/` of the repository. Each Python script runs with `--tiny` as well: random "
        "weights and a drawn clip, without the Hub.\n"
    ]
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix in (".py", ".sh"):
            language = {".py": "python", ".sh": "bash"}[path.suffix]
            parts.append(f"## {path.name}\n\n```{language}\n{path.read_text('utf-8').strip()}\n```\n")
    return "\n".join(parts)
