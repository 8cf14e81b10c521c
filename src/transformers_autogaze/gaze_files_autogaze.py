"""
Gazes on disk: all fields of a batch as `.safetensors`, and `gaze.json` for one video, which docs/gaze_file.md describes.

Files are written under temporary names and renamed when they are complete.
"""

import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .grid_autogaze import GazeGrid


if TYPE_CHECKING:
    from .gazing_autogaze import GazeOutput

FORMAT = "autogaze.gaze"
FORMAT_VERSION = 1
"""Version of both formats; it is incremented when older readers would misread a file."""
UNITS = {
    "fps": "frames of the video per second",
    "width": "pixels",
    "height": "pixels",
    "duration": "seconds",
    "grid.scales": "pixels",
    "grid.patch_size": "pixels",
    "grid.extent": "pixels of the video: height, width",
    "frame_indices": "frames of the video, from 0",
    "frame_times": "seconds from the start of the video",
    "records.frame": "place in frame_indices, from 0",
    "records.frame_index": "frames of the video, from 0",
    "records.time": "seconds from the start of the video",
    "records.scale": "pixels that the frame was resized to",
    "records.id": "patches of the frame over all scales, coarse to fine, from 0",
    "records.box": "pixels of the video: left, top, right, bottom",
    "records.order": "place of choice in the frame, from 0",
}
_KINDS: dict[str, Callable[[Any], bool]] = {
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "whole number": lambda value: type(value) is int,
    "whole number of at least 1": lambda value: type(value) is int and value > 0,
    "text": lambda value: isinstance(value, str),
    "object": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
    "list of whole numbers": lambda value: isinstance(value, list) and all(type(one) is int for one in value),
    "list of numbers": lambda value: isinstance(value, list) and all(map(_KINDS["number"], value)),
}
# Types of the fields. All fields are optional here; those with a question mark may also be `null`.
_FIELDS = {
    "package_version": "text?",
    "video": "text?",
    "selector": "text?",
    "tiles": "text?",
    "settings": "object?",
    "fps": "number?",
    "width": "number?",
    "height": "number?",
    "duration": "number?",
    "statistics": "object?",
    "units": "object",
    "grid": "object",
    "grid.scales": "list",
    "grid.patch_size": "whole number of at least 1",
    "grid.frame_sampling_rate": "whole number of at least 1",
    "grid.extent": "list of numbers",
    "frame_indices": "list of whole numbers",
    "frame_times": "list of numbers?",
    "records": "list",
}
_RECORD_FIELDS = {
    "frame": "whole number",
    "frame_index": "whole number",
    "time": "number",
    "id": "whole number",
    "box": "list of numbers",
    "order": "whole number",
}
_MASK = "gazing_mask"
_NUMBERS = ("patch_size", "frame_sampling_rate", "num_vision_tokens_each_frame", "first_frame")


def save_gaze(gaze: "GazeOutput", path: str | os.PathLike) -> None:
    """Writes all fields of a gaze except `cache`; see [`GazeOutput.save`]."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors, got {str(path)!r}")
    tensors = {key: value for key, value in gaze.items() if isinstance(value, torch.Tensor)}
    tensors |= {f"{_MASK}.{number}": mask for number, mask in enumerate(gaze.gazing_mask)}
    facts = {"version": FORMAT_VERSION, "scales": gaze.scales, **{name: gaze.get(name) for name in _NUMBERS}}
    # Selected clips are views of a batch, which safetensors does not accept.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    with _atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", FORMAT: json.dumps(facts)})


def load_gaze(kind: type["GazeOutput"], path: str | os.PathLike) -> "GazeOutput":
    """Reads a gaze from `.safetensors` or a `gaze.json`; see [`GazeOutput.load`]."""
    if Path(path).suffix == ".json":
        return GazeFile.read(path, kind).gaze
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors or .json, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"`path` must be a whole file of a gaze, got {str(path)!r}: {error}") from error
    _check_version(facts, path)
    if missing := [name for name in ("scales", *_NUMBERS) if name not in facts]:
        raise ValueError(f"`path` must be a whole file of a gaze, got {str(path)!r} without {', '.join(missing)}")
    masks = [tensors.pop(key) for key in sorted((key for key in tensors if key.startswith(_MASK)), key=_number_of)]
    scales = [tuple(scale) if isinstance(scale, list) else scale for scale in facts["scales"]]
    try:
        return kind(**tensors, gazing_mask=masks, scales=scales, **{name: facts[name] for name in _NUMBERS})
    except TypeError as error:
        raise ValueError(
            f"`path` must be a whole file of a gaze, got {str(path)!r} with the tensors {', '.join(tensors)}"
        ) from error


class GazeFileWriter:
    """
    Writes the `gaze.json` of a video whose patches are chosen chunk by chunk.

    Records are kept in a temporary file, as their number grows with the video. docs/gaze_file.md describes the format.

    Args:
        frame_indices (`Sequence[int]`): indices in the video of the gazed frames.
        frame_times (`Sequence[float]`, *optional*): times of these frames in seconds, if the video has time stamps.

    Example:

    ```python
    >>> import tempfile
    >>> from transformers_autogaze import GazeGrid, GazeOutput
    >>> from transformers_autogaze.gaze_files_autogaze import GazeFile, GazeFileWriter

    >>> grid, path = GazeGrid([32], patch_size=16), tempfile.mkdtemp() + "/gaze.json"
    >>> with GazeFileWriter(frame_indices=[0, 30], frame_times=[0.0, 1.0]) as writer:
    ...     record = {"frame": 1, "scale": 32, "id": 3, "box": [50, 50, 100, 100], "order": 0}
    ...     writer.add([record])
    ...     writer.write(path, grid, extent=(100, 100), video="clip.mp4", fps=30.0, width=100, height=100)
    >>> file = GazeFile.read(path)
    >>> file.gaze.gazing_pos.tolist(), file.records[0]["frame_index"], file.records[0]["time"]
    ([[7]], 30, 1.0)

    ```
    """

    def __init__(self, frame_indices: Sequence[int], frame_times: Sequence[float] | None = None):
        self.frame_indices = [int(index) for index in frame_indices]
        self.frame_times = None if frame_times is None else [round(float(time), 6) for time in frame_times]
        self._records_file = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._num_records = 0

    def __enter__(self) -> "GazeFileWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._records_file.close()

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """
        Adds records.

        Args:
            records (`Iterable[Mapping]`):
                As [`~AutoGazeProcessor.post_process_gaze`] returns them, with `frame` counted over all gazed frames of the
                video.
        """
        for record in records:
            frame = record["frame"]
            entry = {"frame": frame, "frame_index": self.frame_indices[frame]}
            if self.frame_times is not None:
                entry["time"] = self.frame_times[frame]
            self._records_file.write(",\n" if self._num_records else "")
            self._records_file.write(f"  {json.dumps({**entry, **record}, allow_nan=False)}")
            self._num_records += 1

    def write(
        self,
        path: str | os.PathLike,
        grid: GazeGrid,
        extent: tuple[int, int],
        num_frames: int | None = None,
        frame_sampling_rate: int = 1,
        **facts: Any,
    ) -> None:
        """
        Writes the file.

        Args:
            path (`str` or `os.PathLike`): the file; an existing one is replaced.
            grid ([`GazeGrid`]): the grid that ids belong to.
            extent (`tuple[int, int]`): height and width of the grid in pixels of the video.
            num_frames (`int`, *optional*): number of frames that were decoded; all of `frame_indices` by default.
            frame_sampling_rate (`int`, *optional*, defaults to 1): video frames per frame of gaze.
            facts: further fields, such as `video`, `selector`, `settings`, `fps`, `width`, `height`, `statistics`.

        Raises:
            ValueError: if a number is not finite.
        """
        scales = [list(scale) if isinstance(scale, tuple) else scale for scale in grid.scales]
        head = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "package_version": _package_version(),
            **facts,
            "grid": {
                "scales": scales,
                "patch_size": grid.patch_size,
                "frame_sampling_rate": frame_sampling_rate,
                "extent": list(extent),
            },
            "frame_indices": self.frame_indices[:num_frames],
            "frame_times": None if self.frame_times is None else self.frame_times[:num_frames],
            "units": UNITS,
        }
        # Serialised before anything is written, as it may raise.
        text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
        with _atomic_write(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(text + ',\n "records": [\n')
            self._records_file.seek(0)
            for part in iter(lambda: self._records_file.read(2**20), ""):
                file.write(part)
            file.write("\n ]\n}\n")


@dataclass(repr=False)
class GazeFile:
    """
    The content of a `gaze.json`.

    Args:
        gaze ([`GazeOutput`]): kept patches, a batch of one, in the order of choice.
        records (`list[dict]`): a record per kept patch.
        facts (`dict`): all other fields of the file, such as `video`, `fps`, `grid` and `statistics`.
    """

    gaze: "GazeOutput"
    records: list[dict[str, Any]]
    facts: dict[str, Any]

    def __repr__(self) -> str:
        return f"GazeFile({self.facts.get('video')!r}, {self.gaze!r})"

    @classmethod
    def read(cls, path: str | os.PathLike, kind: type["GazeOutput"] | None = None) -> "GazeFile":
        """
        Reads a `gaze.json`.

        Args:
            path (`str` or `os.PathLike`): the file.
            kind (`type[GazeOutput]`, *optional*): class of the gaze.

        Raises:
            ValueError: if the file is invalid or of a newer version, or a field has another type.
        """
        if kind is None:
            from .gazing_autogaze import GazeOutput as kind
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`path` must be a gaze.json, got {str(path)!r}: {error}") from error
        _check_version(facts, path)
        _check_fields(facts, path)
        records = facts.pop("records")
        try:
            return cls(_gaze_of_records(kind, records, facts), records, facts)
        except (ValueError, TypeError) as error:
            raise ValueError(f"`path` must be a whole gaze.json, got {str(path)!r}: {error}") from error

    def frame_at(self, time: float) -> int:
        """
        Finds the gazed frame at a time.

        Args:
            time (`float`): seconds from the start of the video.

        Returns:
            `int`: index in `frame_indices`; 0 for a time before the first frame.

        Raises:
            ValueError: if the file has no times of frames.
        """
        times = self.facts.get("frame_times")
        if times is None:
            raise ValueError(
                f"`time` needs the times of frames, got {time} for a video without time stamps; use `frame_indices`"
            )
        return max(0, bisect_right(times, time + 1e-6) - 1)


def _gaze_of_records(
    kind: type["GazeOutput"], records: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> "GazeOutput":
    layout, num_frames = facts["grid"], len(facts["frame_indices"])
    scales = [tuple(scale) if isinstance(scale, list) else scale for scale in layout["scales"]]
    grid, rate = GazeGrid(scales, layout["patch_size"]), layout["frame_sampling_rate"]
    places = [(record["frame"] // rate, record["order"], record["id"]) for record in records]
    frame, _, ids = torch.tensor(sorted(places), dtype=torch.long).reshape(-1, 3).unbind(1)
    if bool(((frame < 0) | (frame >= num_frames // rate) | (ids < 0) | (ids >= grid.num_patches)).any()):
        raise ValueError(f"`records` must be of {num_frames} frames of {grid.num_patches} patches")
    counts = torch.bincount(frame, minlength=num_frames // rate)
    pos = (frame * grid.num_patches + ids)[None]
    return kind.from_ids(
        pos, torch.zeros_like(pos, dtype=torch.bool), counts, grid, rate, clip_num_gazing_each_frame=counts[None]
    )


def _check_fields(facts: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Checks that the fields that a gaze needs are there, and the types of all fields."""

    def require(holder: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
        if missing := [field for field in fields if field not in holder]:
            names = ", ".join(f"`{where}{field}`" for field in missing)
            raise ValueError(f"`path` must be a whole gaze.json, got {str(path)!r} without {names}")

    def check(holder: Mapping[str, Any], key: str, field: str, kind: str) -> None:
        if key not in holder or (holder[key] is None and kind.endswith("?")) or _KINDS[kind.rstrip("?")](holder[key]):
            return
        may_be = f"{kind[:-1]} or null" if kind.endswith("?") else kind
        raise ValueError(f"`{field}` of {str(path)!r} must be of the type {may_be}, got {repr(holder[key])[:80]}")

    for field, kind in _FIELDS.items():
        part, _, key = field.rpartition(".")
        check(facts.get(part, {}) if part else facts, key, field, kind)
    require(facts, ("grid", "frame_indices", "records"), "")
    require(facts["grid"], ("scales", "patch_size", "frame_sampling_rate"), "grid.")
    for number, record in enumerate(facts["records"]):
        if not isinstance(record, dict):
            raise ValueError(
                f"`records[{number}]` of {str(path)!r} must be of the type object, got {repr(record)[:80]}"
            )
        for key, kind in _RECORD_FIELDS.items():
            check(record, key, f"records[{number}].{key}", kind)
        require(record, ("frame", "order", "id"), f"records[{number}].")
    indices, times = facts["frame_indices"], facts.get("frame_times")
    if times is not None and len(times) != len(indices):
        raise ValueError(
            f"`frame_times` of {str(path)!r} must be one for each of the {len(indices)} frames, got {len(times)}"
        )


def _check_version(facts: Any, path: str | os.PathLike) -> None:
    is_ours = (
        isinstance(facts, dict) and isinstance(facts.get("version"), int) and facts.get("format", FORMAT) == FORMAT
    )
    if not is_ours:
        raise ValueError(f"`path` must be a gaze that this package wrote, got {str(path)!r} with {_describe(facts)}")
    if facts["version"] > FORMAT_VERSION:
        raise ValueError(
            f"`path` must be a gaze of version {FORMAT_VERSION} or before, got {facts['version']} in {str(path)!r}; a newer "
            "transformers-autogaze reads it"
        )


def _describe(facts: Any) -> str:
    """Describes the content of a file in a few words, for messages."""
    if not isinstance(facts, dict):
        return "no facts about a gaze" if facts is None else f"a {type(facts).__name__}"
    if facts.get("format", FORMAT) != FORMAT:
        return f"the format {str(facts['format'])[:80]!r} instead of {FORMAT!r}"
    return f"the version {str(facts.get('version'))[:80]} instead of a whole number"


def _number_of(key: str) -> int:
    return int(key.rpartition(".")[2])


def _package_version() -> str | None:
    try:
        return version("transformers-autogaze")
    except PackageNotFoundError:  # run as remote code
        return None


@contextmanager
def _atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which is renamed on success and removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
