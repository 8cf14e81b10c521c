"""
Makes Markdown of docstrings in the style of Hugging Face, for the API reference.

`Args:` and `Raises:` become lists, references such as [`GazeOutput`] or "docs/design.md, section 2" become links, and names that
the package imports when they are first used are found like all others.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import griffe


DOCS = Path(__file__).parents[1]
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Examples?):(?: (.+))?$")
ENTRY = re.compile(r"    ([\w*][\w*, .]*?)(?: \((.*?)\))?:(?: (.*))?$")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\(|\[)")
DOCUMENT = re.compile(r"`?docs/([\w/]+)\.md`?(?:,\s+section\s+(\d[\d.]*\d|\d))?")
CODE = re.compile(r"(```.*?```)", re.DOTALL)


class Docstrings(griffe.Extension):
    """Rewrites all docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Adds names that are imported late, then rewrites docstrings."""
        documented = {path.rpartition(".")[2]: path for path in documented_paths()}
        add_late_names(pkg)
        for docstring in docstrings(pkg):
            docstring.value = to_markdown(docstring.value, documented)


def documented_paths() -> Iterator[str]:
    """Gives the names that the API reference has, with their modules."""
    for page in sorted((DOCS / "api").glob("*.md")):
        yield from re.findall(r"^::: (\S+)", page.read_text("utf-8"), flags=re.MULTILINE)


def add_late_names(module: griffe.Module) -> None:
    """Adds the names that a package finds in its modules when they are first used, to it and to its packages."""
    for table in ("_LAZY", "_MODULES"):
        if table in module.members:
            for name, place in ast.literal_eval(str(module.members[table].value)).items():
                module.set_member(name, griffe.Alias(name, f"{module.path}.{place}.{name}"))
    for package in list(module.modules.values()):
        if not package.is_alias:
            add_late_names(package)


def docstrings(obj: griffe.Object) -> Iterator[griffe.Docstring]:
    """Gives the docstrings of an object and of all that it defines."""
    if obj.docstring:
        yield obj.docstring
    for member in obj.members.values():
        if not member.is_alias:
            yield from docstrings(member)


def to_markdown(text: str, documented: dict[str, str]) -> str:
    """
    Makes Markdown of a docstring.

    Args:
        text (`str`): the docstring, without its indentation.
        documented (`dict[str, str]`): the names that references may link to, and their full names.
    """
    lines: list[str] = []
    section = None
    for line in text.splitlines():
        if found := SECTION.match(line):
            section = found[1]
            title = {"Args": "Parameters"}.get(section, section)
            lines += ["", f"**{title}**", ""] if found[2] is None else ["", f"**{title}**: {found[2]}"]
        elif line and not line.startswith(" "):
            section = None
            lines.append(line)
        elif section in ("Args", "Attributes", "Raises"):
            lines.append(_entry(line))
        else:
            lines.append(line[4:] if section in ("Returns", "Yields") else line)
    parts = CODE.split("\n".join(lines))
    return "".join(_code(part) if part.startswith("```") else _links(part, documented) for part in parts)


def _entry(line: str) -> str:
    """Makes an item of a list of a line that begins one; others belong to the item before."""
    if not (found := ENTRY.match(line)):
        return line if line.startswith("     ") else f"\n{line[4:]}"
    names, kind, text = found.groups()
    names = ", ".join(f"**`{name}`**" for name in names.split(", "))
    return f"- {names}{f' ({kind})' if kind else ''}: {text or ''}".rstrip()


def _code(block: str) -> str:
    """Colours examples with prompts as a session of Python."""
    return block.replace("```python", "```pycon", 1) if ">>> " in block else block


def _links(text: str, documented: dict[str, str]) -> str:
    """Makes links of references."""

    def name(found: re.Match) -> str:
        first = found[1].partition(".")[0]
        return f"[`{found[1]}`][{documented[first]}]" if first in documented else f"`{found[1]}`"

    return DOCUMENT.sub(_document, REFERENCE.sub(name, text))


def _document(found: re.Match) -> str:
    """Makes a link of a reference to a document and, where it has one, to its section."""
    page, number = found.groups()
    if page.endswith("README"):
        return found[0]
    address, title = f"../{page}.md", page.rpartition("/")[2].replace("_", " ")
    if number:
        headings = re.findall(r"^#+ +(.+?) *$", (DOCS / f"{page}.md").read_text("utf-8"), flags=re.MULTILINE)
        heading = next(heading for heading in headings if heading.startswith((f"{number} ", f"{number}. ")))
        address += "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        title += f", section {number}"
    return f"[{title}]({address})"
