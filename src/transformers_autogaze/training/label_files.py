"""Label files: the published JSON with the settings that its labels were made with, and the progress of an unfinished run."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..grid_autogaze import GazeGrid
from ..utils.json_files import describe_json, parse_json, read_json_object
from ..utils.output_files import lock_file, replacing


_SETTINGS, _SIZE = "settings", "file_size"
_EXPECTED_UNFINISHED = "the labels of an unfinished run, which is resumed (give another file, or delete it)"
_EXPECTED = 'labels, {video: {"gazing_pos": .., "task_losses": ..}}'


class ClipLabels(NamedTuple):
    """
    Labels of one clip.

    Args:
        gazing_pos (`list[list[int]]`):
            Patches to keep of each frame, in the order of choice, counted from the first patch of the frame.
        task_losses (`list[list[float]]`):
            Task loss of the frame after each of these patches.
    """

    gazing_pos: list[list[int]]
    task_losses: list[list[float]]


def write_labels(
    path: str | os.PathLike,
    labels: Mapping[str, ClipLabels],
    settings: Mapping[str, Any] | None = None,
    file_sizes: Mapping[str, int] | None = None,
) -> None:
    """
    Writes labels in the published JSON format, `{video: {"gazing_pos": .., "task_losses": ..}}`.

    Args:
        path (`str` or `os.PathLike`): file to write; an existing file is replaced once the new one is complete.
        labels (`Mapping[str, ClipLabels]`): labels by the names of the videos.
        settings (`Mapping[str, Any]`, *optional*): settings that they were made with, written as the entry `"settings"`.
        file_sizes (`Mapping[str, int]`, *optional*):
            Sizes in bytes of the video files, written as `"file_size"` beside the labels, to detect other videos with the same
            names.
    """
    entries = {name: _to_entry(name, clip, file_sizes or {}) for name, clip in labels.items()}
    text = json.dumps(entries if settings is None else {_SETTINGS: settings, **entries})
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_labels(
    *paths: str | os.PathLike,
    grid: GazeGrid | None = None,
    settings: Mapping[str, Any] | None = None,
    file_sizes: Mapping[str, int] | None = None,
) -> dict[str, ClipLabels]:
    """
    Reads label files, such as the shards of one collection.

    Args:
        paths (`str` or `os.PathLike`): files in the published JSON format.
        grid ([`GazeGrid`], *optional*):
            Patches that the labels must belong to; by default those of the file's settings, if it has any.
        settings (`Mapping[str, Any]`, *optional*):
            Settings that the labels must have been made with, such as `{"num_frames": 16}`; files without settings pass.
        file_sizes (`Mapping[str, int]`, *optional*):
            Sizes in bytes that the labelled videos must have, see [`~VideoCollection.file_sizes`]; labels without a size
            pass.

    Returns:
        `dict[str, ClipLabels]` by the names of the videos.

    Raises:
        ValueError: if a file has another format, patches and losses do not match, an id lies outside the grid, clips differ in
            their number of frames, files have other settings than given or differ in them, or a video has another size than
            the labelled one.

    Example:

    ```python
    >>> from transformers_autogaze.training.label_files import ClipLabels, read_labels, write_labels

    >>> write_labels("labels.json", {"clip.mp4": ClipLabels([[3, 0]], [[0.9, 0.5]])})
    >>> read_labels("labels.json")
    {'clip.mp4': ClipLabels(gazing_pos=[[3, 0]], task_losses=[[0.9, 0.5]])}

    ```
    """
    labels: dict[str, ClipLabels] = {}
    first_settings: dict[str, Any] = {}
    for path in paths:
        file_labels, file_settings, sizes = _read(path)
        if not file_labels and not file_settings:
            raise ValueError(f"label file {str(path)!r} must hold labels, got none")
        check_file_sizes(path, sizes, file_sizes or {})
        file_grid = grid or _grid_of(path, file_settings)
        if file_settings:
            check_label_settings(path, file_settings, settings or {})
            check_label_settings(path, file_settings, first_settings, f"in {str(paths[0])!r}")
            first_settings = file_settings
        for name, clip in file_labels.items():
            _check_labels(f"{str(path)!r}, {name!r}", clip, file_grid)
        labels |= file_labels
    lengths = {len(clip.gazing_pos): name for name, clip in labels.items()}
    if len(lengths) > 1:
        (one, name), (other, other_name) = list(lengths.items())[:2]
        raise ValueError(
            f"label files must hold clips with equal numbers of frames, got {one} of {name!r} and {other} of {other_name!r}"
        )
    return labels


def read_label_settings(path: str | os.PathLike) -> dict[str, Any]:
    """
    Reads the settings that the labels of a file were made with.

    Args:
        path (`str` or `os.PathLike`): a file in the published JSON format.

    Returns:
        `dict`: empty if the file has none.

    Raises:
        ValueError: if the file has another format.
    """
    return _read(path)[1]


def read_file_sizes(path: str | os.PathLike) -> dict[str, int]:
    """
    Reads the sizes of the videos that the labels of a file were made of.

    Args:
        path (`str` or `os.PathLike`): a file in the published JSON format.

    Returns:
        `dict[str, int]`: bytes by the names of the videos whose size is in the file.

    Raises:
        ValueError: if the file has another format.
    """
    return _read(path)[2]


def check_label_settings(
    path: str | os.PathLike, settings: Mapping[str, Any], expected: Mapping[str, Any], where: str = "now"
) -> None:
    """
    Checks the settings that the labels of a file were made with.

    Args:
        path (`str` or `os.PathLike`): the file, for the message.
        settings (`Mapping[str, Any]`): its settings.
        expected (`Mapping[str, Any]`): settings that it must have; others are ignored.
        where (`str`, *optional*, defaults to `"now"`): origin of `expected`, for the message.

    Raises:
        ValueError: if a setting differs; the message names it and both values.
    """
    for name, value in expected.items():
        if settings.get(name) != value:
            raise ValueError(
                f"the labels in {str(path)!r} were made with `{name}` {settings.get(name)}, but it is {value} {where}: "
                "give the same settings, or another file"
            )


def check_file_sizes(path: str | os.PathLike, labelled: Mapping[str, int], file_sizes: Mapping[str, int]) -> None:
    """
    Checks that the labels of a file belong to the current videos, and not to others with the same names.

    Args:
        path (`str` or `os.PathLike`): the file, for the message.
        labelled (`Mapping[str, int]`): sizes in bytes of the videos that were labelled, by name.
        file_sizes (`Mapping[str, int]`): sizes in bytes of the current videos; only names in both are compared.

    Raises:
        ValueError: if a size differs; the message names the video and both sizes.
    """
    for name, size in labelled.items():
        if file_sizes.get(name, size) != size:
            raise ValueError(
                f"the labels of {name!r} in {str(path)!r} were made of a video of {size} bytes, but it has "
                f"{file_sizes[name]} bytes now: give labels of these videos, or another file"
            )


class UnfinishedLabels:
    """
    The labels that an unfinished run has made, in a file beside the output, which a later run resumes from. The file is locked.

    Args:
        output (`Path`): the final label file.
        settings (`Mapping[str, Any]`): settings that the labels are made with.
        file_sizes (`Mapping[str, int]`): sizes in bytes of the videos.

    Raises:
        ValueError: if another process holds the lock, or an earlier run had other settings or videos.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], file_sizes: Mapping[str, int]):
        self.file_sizes = file_sizes
        self.path = output.with_suffix(".partial.jsonl")
        self.file = self.path.open("a+", encoding="utf-8")
        self.done: dict[str, ClipLabels] = {}
        """Labels by the names of the videos."""
        try:
            lock_file(
                self.file,
                f"`output` {str(output)!r} is being labelled by another process: wait for it, give another file, or "
                "label in shards",
            )
            self._read(settings)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "UnfinishedLabels":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def add(self, labels: Mapping[str, ClipLabels]) -> None:
        """Adds labels of videos and writes them to the file."""
        self.done |= labels
        self.file.writelines(
            json.dumps([name, _to_entry(name, clip, self.file_sizes)]) + "\n" for name, clip in labels.items()
        )
        self.file.flush()

    def remove(self) -> None:
        """Removes the file once the output is complete."""
        self.path.unlink(missing_ok=True)

    def _read(self, settings: Mapping[str, Any]) -> None:
        """Reads the labels of an earlier run, and removes a last line that was cut off."""
        where = f"label file {str(self.path)!r}"
        self.file.seek(0)
        try:
            text = self.file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} must hold {_EXPECTED_UNFINISHED}, but it is no text: {error}") from error
        complete = text[: text.rfind("\n") + 1]
        lines = [parse_json(line, where, _EXPECTED_UNFINISHED) for line in complete.splitlines()]
        if not lines:
            self.file.truncate(0)
            self.file.write(json.dumps({_SETTINGS: settings}) + "\n")
            self.file.flush()
            return
        head, *entries = lines
        if not isinstance(head, dict) or not isinstance(head.get(_SETTINGS), dict):
            raise ValueError(f"{where} must hold {_EXPECTED_UNFINISHED}, got {describe_json(head)} on the first line")
        for entry in entries:
            if not isinstance(entry, list) or len(entry) != 2:
                raise ValueError(f"{where} must hold {_EXPECTED_UNFINISHED}, got {describe_json(entry)}")
        labels = {name: _from_entry(where, name, entry) for name, entry in entries}
        check_label_settings(self.path, head[_SETTINGS], settings)
        check_file_sizes(self.path, _sizes_of(dict(entries)), self.file_sizes)
        if len(complete) < len(text):
            self.file.truncate(len(complete.encode()))
        self.done = labels


def _to_entry(name: str, labels: ClipLabels, file_sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns the entry of one video in a label file."""
    return {**labels._asdict(), **({_SIZE: file_sizes[name]} if name in file_sizes else {})}


def _sizes_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {name: entry[_SIZE] for name, entry in entries.items() if _SIZE in entry}


def _read(path: str | os.PathLike) -> tuple[dict[str, ClipLabels], dict[str, Any], dict[str, int]]:
    """Reads the labels, settings and video sizes of a file, each empty if the file has none."""
    where = f"label file {str(path)!r}"
    entries = read_json_object(path, where, _EXPECTED)
    settings = entries.get(_SETTINGS, {})
    # A video can have this name as well.
    if not (isinstance(settings, dict) and "gazing_pos" in settings):
        settings = entries.pop(_SETTINGS, {})
        if not isinstance(settings, dict):
            raise ValueError(f'{where} must hold an object as "{_SETTINGS}", got {describe_json(settings)}')
    labels = {name: _from_entry(where, name, entry) for name, entry in entries.items()}
    return labels, settings, _sizes_of(entries)


def _from_entry(where: str, name: object, entry: Any) -> ClipLabels:
    """Returns the labels of one video of a label file, whose frames are not checked."""
    if not isinstance(name, str) or not isinstance(entry, dict) or not {"gazing_pos", "task_losses"} <= set(entry):
        raise ValueError(f"{where} must hold {_EXPECTED}, got {describe_json(entry)} for {name!r}")
    return ClipLabels(entry["gazing_pos"], entry["task_losses"])


def _grid_of(path: str | os.PathLike, settings: Mapping[str, Any]) -> GazeGrid | None:
    """Returns the grid that the labels of a file belong to, if it is in the settings."""
    if "scales" not in settings or "patch_size" not in settings:
        return None
    try:
        return GazeGrid([tuple(size) for size in settings["scales"]], settings["patch_size"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"label file {str(path)!r} must have the scales and patch size of a grid in its settings: {error}"
        ) from error


def _check_labels(where: str, labels: ClipLabels, grid: GazeGrid | None) -> None:
    if not all(isinstance(part, list) and all(isinstance(frame, list) for frame in part) for part in labels):
        raise ValueError(f"label file {where} must hold a list of patches and one of losses for each frame")
    counts = [[len(frame) for frame in part] for part in labels]
    if counts[0] != counts[1] or not counts[0] or min(counts[0]) < 1:
        raise ValueError(
            f"label file {where} must hold at least one patch for each frame and one loss for each patch, got "
            f"{counts[0]} patches and {counts[1]} losses"
        )
    highest = math.inf if grid is None else grid.num_patches - 1
    for ids, losses in zip(*labels, strict=True):
        for id in ids:
            if type(id) is not int or not 0 <= id <= highest:
                allowed = "whole numbers of at least 0" if grid is None else f"ids in 0..{highest}"
                raise ValueError(f"label file {where} must hold {allowed}, got {id!r}")
        if len(set(ids)) < len(ids):
            raise ValueError(f"label file {where} must hold no patch twice in a frame, got {ids}")
        for loss in losses:
            if type(loss) not in (int, float) or not math.isfinite(loss):
                raise ValueError(f"label file {where} must hold numbers as losses, got {loss!r}")


def labels_to_table(labels: Mapping[str, ClipLabels]) -> Any:
    """
    Converts labels to a `datasets` table, for large collections.

    Args:
        labels (`Mapping[str, ClipLabels]`): labels by the names of the videos.

    Returns:
        `datasets.Dataset` with the columns `video`, `gazing_pos` and `task_losses`.
    """
    from datasets import Dataset as Table
    from datasets import Features, List, Value

    features = Features(
        {
            "video": Value("string"),
            "gazing_pos": List(List(Value("int32"))),
            "task_losses": List(List(Value("float64"))),
        }
    )
    rows = [{"video": name, **clip._asdict()} for name, clip in labels.items()]
    return Table.from_list(rows, features=features)


def labels_from_table(table: Any) -> dict[str, ClipLabels]:
    """
    Converts a table of [`labels_to_table`] back to labels.

    Args:
        table (`datasets.Dataset`): with the columns `video`, `gazing_pos` and `task_losses`.

    Returns:
        `dict[str, ClipLabels]` by the names of the videos.
    """
    return {row["video"]: ClipLabels(row["gazing_pos"], row["task_losses"]) for row in table}
