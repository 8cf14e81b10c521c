"""Every reference to a document, a section, a heading or a file of the repository is valid."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples", "docs")
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")
DOCUMENT = re.compile(r"\b((?:docs|examples|benchmarks|tests)/[\w./-]+\.(?:md|py))\b")
# Lines of a comment begin with "#", so it may stand between a document and its section.
SECTIONS = re.compile(r"(docs/[\w/-]+\.md),[\s#]+sections?[\s#]+(\d[\d.]*\d|\d)(?:[\s#]+and[\s#]+(\d[\d.]*\d|\d))?")
OWN_SECTION = re.compile(r"\bsections?\s+(\d[\d.]*\d|\d)")
LINK = re.compile(r"\]\((?!https?://|mailto:)([^()\s]+)\)")
LINKED = re.compile(r"\[[^]]*\]\([^)]*\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
NUMBER = re.compile(r"(\d[\d.]*\d|\d)\.? ")
UNKNOWN = re.compile(r"\((?:SPEC|DESIGN),")  # documents that the repository does not have


def headings(document: Path) -> list[str]:
    """Gives the headings of a Markdown file; lines of code are none."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    return HEADING.findall(text)


def section_numbers(document: Path) -> set[str]:
    """Gives the numbers of the numbered headings of a Markdown file."""
    return {number[1] for heading in headings(document) if (number := NUMBER.match(heading))}


def anchors(document: Path) -> set[str]:
    """Gives the anchors that GitHub makes of the headings of a Markdown file."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(document)}


def referring_files(root: Path) -> list[Path]:
    """Gives the files of a repository that may refer to others."""
    files = [root / name for name in FILES]
    for folder in FOLDERS:
        files += [path for suffix in (".py", ".md") for path in sorted((root / folder).rglob(f"*{suffix}"))]
    return [path for path in files if path.is_file() and path != Path(__file__)]


def broken_links(root: Path, path: Path, text: str) -> list[str]:
    """Returns the broken relative links of a Markdown file, and its references to sections that it does not have."""
    broken = []
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        target = (path.parent / target).resolve() if target else path
        if not target.exists():
            broken.append(f"link to {link}")
        elif anchor and anchor not in anchors(target):
            broken.append(f"anchor {link}")
    if numbers := section_numbers(path):
        text = SECTIONS.sub("", LINKED.sub("", text))
        broken += [f"section {number} of its own" for number in OWN_SECTION.findall(text) if number not in numbers]
    return broken


def broken_references(root: Path) -> list[str]:
    """Returns every broken reference of a repository, with the file that it is in."""
    broken = []
    for path in referring_files(root):
        text = path.read_text(encoding="utf-8")
        found = [f"file {name}" for name in DOCUMENT.findall(text) if not (root / name).is_file()]
        for name, *numbers in SECTIONS.findall(text):
            existing = section_numbers(root / name) if (root / name).is_file() else set()
            found += [f"{name}, section {number}" for number in numbers if number and number not in existing]
        found += [f"unknown document {reference}" for reference in UNKNOWN.findall(text)]
        if path.suffix == ".md":
            found += broken_links(root, path, text)
        broken += [f"{path.relative_to(root)}: {reference}" for reference in found]
    return broken


def test_every_reference_is_valid():
    assert broken_references(ROOT) == []


def test_the_documents_of_computation_and_decisions_are_referred_to():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    referred = {name for name, *_ in SECTIONS.findall(text)}
    assert {"docs/specification.md", "docs/design.md"} <= referred
    assert len(section_numbers(ROOT / "docs" / "specification.md")) > 20


@pytest.mark.parametrize(
    ("place", "text", "expected"),
    [
        ("src/a.py", '"""See docs/missing.md."""', "file docs/missing.md"),
        ("src/a.py", "# as docs/page.md,\n# section 3 says", "docs/page.md, section 3"),
        ("src/a.py", '"""See docs/page.md, sections 1.1 and 1.2."""', "docs/page.md, section 1.2"),
        ("src/a.py", '"""A gaze (SPEC, "Streaming")."""', "unknown document (SPEC,"),
        ("tests/a.py", "# examples/missing.py does it", "file examples/missing.py"),
        ("docs/other.md", "[there](page.md#1-other)", "anchor page.md#1-other"),
        ("docs/other.md", "[there](../page.md)", "link to ../page.md"),
        ("docs/other.md", "# 1. Title\n\nSee section 2.", "section 2 of its own"),
        ("README.md", "![a picture](docs/images/missing.png)", "link to docs/images/missing.png"),
        ("src/a.py", "# see docs/page.md, section 1.1, and docs/page.md", None),
        ("docs/other.md", "[there](page.md#11-a-part), [here](#title)\n\n# Title", None),
        ("README.md", "[there](docs/page.md#1-a-page) and [elsewhere](https://example.org/missing)", None),
    ],
)
def test_broken_references_are_found(tmp_path, place, text, expected):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "docs" / "page.md").write_text("# 1. A page\n\n## 1.1 A part\n\n```bash\n# 1.2 no heading\n```\n")
    (tmp_path / place).write_text(text)
    assert broken_references(tmp_path) == ([f"{place}: {expected}"] if expected else [])
