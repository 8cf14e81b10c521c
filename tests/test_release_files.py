"""The files of a release agree with each other: versions, supported interpreters and libraries, citation."""

import re
from pathlib import Path

import yaml

from transformers_autogaze import __version__


ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CLASSIFIED = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))["jobs"]


def test_the_version_is_the_same_everywhere():
    assert f'version = "{__version__}"' in PROJECT
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest[1] == __version__


def test_tests_run_on_what_is_supported():
    matrix = workflow("tests.yml")["tests"]["strategy"]["matrix"]
    assert matrix["python"] == CLASSIFIED
    assert f'requires-python = ">={CLASSIFIED[0]}"' in PROJECT
    lowest, highest = re.search(r'"transformers>=(\S+),<(\d+)"', PROJECT).groups()
    assert matrix["transformers"] == [f"transformers=={lowest}.0", f"transformers<{highest}"]
    assert workflow("tests.yml")["wheel"]["strategy"]["matrix"]["python"] == [CLASSIFIED[0], CLASSIFIED[-1]]


def test_what_is_published_was_tried_and_needs_no_token():
    jobs = workflow("release.yml")
    assert any("make wheel-test" in step.get("run", "") for step in jobs["build"]["steps"])
    assert jobs["publish"]["needs"] == "build" and jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")


def test_the_paper_is_cited_alike():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in citation["authors"])
    assert citation["title"] in readme and authors in readme and citation["url"].rpartition("/")[2] in readme
