"""
Kept patches of videos in WebDataset tars: one sample for each video, written frame by frame.

This module knows files and pixels, and nothing of where they are put together.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np

from ..output_files import to_json
from ..pruning import KeptPatches


_FIELDS = ("pixels", "ids", "frames")


def write_sample(path: Path, key: str, patches: Iterable[KeptPatches], facts: Callable[[], Mapping[str, Any]]) -> None:
    """
    Writes the kept patches of a video to a tar of one sample.

    It has `{key}.json` and, one entry for each patch in the order of time and of choice, `{key}.pixels.npy`, levels 0..255 of
    shape `(N, 3, patch_size, patch_size)`, `{key}.ids.npy` and `{key}.frames.npy`, the id in its frame and the frame, counted over
    those taken from the video.

    Args:
        path (`Path`): the tar.
        key (`str`): what WebDataset calls the sample.
        patches (`Iterable[KeptPatches]`): the patches of each frame; no more than one frame's are held.
        facts (`Callable[[], Mapping[str, Any]]`):
            Gives what `{key}.json` says, `patch_size` among it; is asked once the patches are through.
    """
    with TemporaryFile() as pixels, TemporaryFile() as ids, TemporaryFile() as frames:
        for kept in patches:
            pixels.write(kept.pixels.numpy().tobytes())
            ids.write(kept.ids.numpy().astype(np.int32).tobytes())
            frames.write(np.full(len(kept.ids), kept.frame, np.int32).tobytes())
        count, known = ids.tell() // 4, facts()
        patch_size = known["patch_size"]
        shapes = ((count, 3, patch_size, patch_size), np.uint8), ((count,), np.int32), ((count,), np.int32)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            _add(tar, f"{key}.json", to_json(known).encode(), None)
            for name, file, (shape, kind) in zip(_FIELDS, (pixels, ids, frames), shapes, strict=True):
                _add(tar, f"{key}.{name}.npy", _header(shape, kind), file)


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
    # Nothing but the contents decides what is written: no time, no user.
    member = tarfile.TarInfo(name)
    member.size = len(head) + (0 if body is None else body.tell())
    if body is not None:
        body.seek(0)
    tar.addfile(member, _Joined(head, body))


def _header(shape: tuple[int, ...], kind: type) -> bytes:
    """Gives what a NumPy file starts with."""
    head = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, facts)
    return head.getvalue()


class _Joined(io.RawIOBase):
    """Some bytes, and then a file."""

    def __init__(self, head: bytes, body: BinaryIO | None):
        self.head, self.body = io.BytesIO(head), body

    def read(self, size: int = -1) -> bytes:
        data = self.head.read(size)
        rest = size - len(data)
        return data + self.body.read(rest) if self.body is not None and rest > 0 else data
