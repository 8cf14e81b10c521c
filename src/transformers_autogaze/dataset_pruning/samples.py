"""Writes kept patches as WebDataset tars with one sample per video, frame by frame, and joins such tars."""

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np

from ..pruning.video_pruning import KeptPatches
from ..utils.output_files import to_json


_FIELDS = ("pixels", "ids", "frames")


def write_sample(
    path: Path, key: str, patches: Iterable[KeptPatches], metadata: Callable[[], Mapping[str, Any]]
) -> None:
    """
    Writes the kept patches of a video as a tar of one sample.

    The files of the sample are `{key}.json`, `{key}.pixels.npy` (uint8 of shape `(N, 3, patch_size, patch_size)`), `{key}.ids.npy`
    and `{key}.frames.npy` (int32 of shape `(N,)`): the pixels of the `N` patches of the video, the id of each in its frame, and
    the index of the frame among those taken from the video. Patches are sorted by frame, and in a frame by order of choice.

    Args:
        path (`Path`): the tar.
        key (`str`): key of the sample.
        patches (`Iterable[KeptPatches]`): the patches of each frame; those of one frame at a time are in memory.
        metadata (`Callable[[], Mapping[str, Any]]`):
            Returns the contents of `{key}.json`, which include `patch_size`; called after the last patch.
    """
    with TemporaryFile() as pixels, TemporaryFile() as ids, TemporaryFile() as frames:
        for kept in patches:
            pixels.write(kept.pixels.numpy().tobytes())
            ids.write(kept.ids.numpy().astype(np.int32).tobytes())
            frames.write(np.full(len(kept.ids), kept.frame, np.int32).tobytes())
        count, values = ids.tell() // 4, metadata()
        patch_size = values["patch_size"]
        shapes = ((count, 3, patch_size, patch_size), np.uint8), ((count,), np.int32), ((count,), np.int32)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            _add(tar, f"{key}.json", to_json(values).encode(), None)
            for name, file, (shape, kind) in zip(_FIELDS, (pixels, ids, frames), shapes, strict=True):
                _add(tar, f"{key}.{name}.npy", _npy_header(shape, kind), file)


def join_samples(path: Path, parts: Iterable[Path]) -> None:
    """
    Joins tars into one, in the order given.

    Args:
        path (`Path`): the tar to write.
        parts (`Iterable[Path]`): the tars to join.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for part in parts:
            with tarfile.open(part) as source:
                for member in source:
                    tar.addfile(member, source.extractfile(member))


def _add(tar: tarfile.TarFile, name: str, head: bytes, body: BinaryIO | None) -> None:
    # Without a time or a user, so that equal contents give equal files.
    member = tarfile.TarInfo(name)
    member.size = len(head) + (0 if body is None else body.tell())
    if body is not None:
        body.seek(0)
    tar.addfile(member, _BytesThenFile(head, body))


def _npy_header(shape: tuple[int, ...], kind: type) -> bytes:
    """Returns the header of a `.npy` file."""
    head = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()


class _BytesThenFile(io.RawIOBase):
    """Reads some bytes first, and then a file."""

    def __init__(self, head: bytes, body: BinaryIO | None):
        self.head, self.body = io.BytesIO(head), body

    def read(self, size: int = -1) -> bytes:
        data = self.head.read(size)
        rest = size - len(data)
        return data + self.body.read(rest) if self.body is not None and rest > 0 else data
