"""
Checks that a wheel and a source distribution have all files that they should, and no others.

    python tests/release/check_distributions.py dist

Run it in a checkout: the expected files are those that git tracks.
"""

import argparse
import subprocess
import tarfile
import zipfile
from pathlib import Path


PACKAGES = ("transformers_autogaze", "transformers_autogaze_cli")
# Beginnings of paths that are not part of a source distribution.
NOT_RELEASED = (".", "Dockerfile")
# Files that the build adds.
ADDED = ("PKG-INFO", "setup.cfg")
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")


def tracked_files() -> set[str]:
    """Gives the files of the repository, by their paths in it."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, text=True)
    return set(filter(None, listed.stdout.split("\0")))


def check(kind: str, found: set[str], expected: set[str]) -> None:
    """Stops if a distribution lacks a file or has one too many."""
    if found != expected:
        raise SystemExit(
            f"{kind}: missing {sorted(expected - found) or 'nothing'}, not expected {sorted(found - expected) or 'nothing'}"
        )
    print(f"{kind}: {len(found)} files, as expected")


def check_wheel(path: Path) -> None:
    """Checks that a wheel holds the packages, their data and its metadata."""
    name, version, *_ = path.name.split("-")
    metadata = {f"{name}-{version}.dist-info/{part}" for part in METADATA}
    sources = {file.removeprefix("src/") for file in tracked_files() if file.startswith("src/")}
    with zipfile.ZipFile(path) as archive:
        found = {file for file in archive.namelist() if not file.endswith("/")}
    check(path.name, found, sources | metadata)
    assert {file.split("/")[0] for file in sources} == set(PACKAGES)


def check_source(path: Path) -> None:
    """Checks that a source distribution holds the files of the repository that are released."""
    top = path.name.removesuffix(".tar.gz")
    released = {file for file in tracked_files() if not file.startswith(NOT_RELEASED)}
    with tarfile.open(path) as archive:
        found = {file.name.removeprefix(f"{top}/") for file in archive.getmembers() if file.isfile()}
    found = {file for file in found if ".egg-info/" not in file}
    check(path.name, found, released | set(ADDED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where one wheel and one source distribution lie")
    folder = parser.parse_args().folder
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_source(source)


if __name__ == "__main__":
    main()
