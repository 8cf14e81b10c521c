"""
The targets of distillation: an encoder's features of crops at every scale, reduced to principal components, computed once and
cached on disk or in memory.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..feature_network_autogaze import STRIDE
from ..utils.json_files import read_json_object
from ..utils.output_files import replacing
from .crops import Source, cut_pairs
from .teachers import FeatureTeacher


_FORMAT = 1
_REMEDY = "give another folder, or delete this one"
_FIRST_SOURCES, _FIRST_PAIRS = 48, 4  # files, and pairs of each, that the components are computed on, at most
_BATCH_SIZE = 8  # crops in a batch of the encoder


class Components(NamedTuple):
    """
    Principal components of an encoder's features at the finest scale.

    Args:
        mean (`torch.FloatTensor` of shape `(hidden,)`): the mean feature.
        axes (`torch.FloatTensor` of shape `(components, hidden)`): the first components, by decreasing variance.
        variances (`torch.FloatTensor` of shape `(hidden,)`): variances along all components, in the same order.
    """

    mean: torch.Tensor
    axes: torch.Tensor
    variances: torch.Tensor

    @classmethod
    def find(cls, features: torch.Tensor, num_components: int) -> "Components":
        """
        Computes the principal components of features.

        Args:
            features (`torch.FloatTensor` of shape `(places, hidden)`): features.
            num_components (`int`): components to keep.
        """
        features = features.double()
        mean = features.mean(0)
        covariance = (features - mean).T @ (features - mean) / len(features)
        variances, axes = torch.linalg.eigh(covariance)
        variances, axes = variances.flip(0).clamp(min=0), axes.flip(1)[:, :num_components].T
        return cls(mean.float(), axes.float().contiguous(), variances.float())

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features `(.., hidden)` onto the components: `(.., components)`."""
        return (features - self.mean.to(features)) @ self.axes.T.to(features)

    def weights(self, whitening: float) -> torch.Tensor:
        """
        Returns the factors that scale the components to a vector of mean squared length 1.

        Args:
            whitening (`float`): power of its standard deviation that each component is divided by; 0 keeps their proportions.

        Returns:
            `torch.FloatTensor` of shape `(components,)`
        """
        kept = self.variances[: len(self.axes)].double()
        weights = kept.clamp(min=1e-6 * float(kept[0])).sqrt() ** -whitening
        return (weights / (kept * weights**2).sum().sqrt()).float()

    @property
    def explained(self) -> float:
        """Share of the variance that the kept components explain."""
        return float(self.variances[: len(self.axes)].sum() / self.variances.sum())


class TeacherFeatures:
    """
    Crops and the encoder's features of them, one row for each crop; rows `2 i` and `2 i + 1` are a pair.

    They are computed source by source, and an interrupted run is resumed. Several processes share the sources.

    Args:
        teacher ([`FeatureTeacher`]): the encoder.
        sources (`Sequence[Source]`): files to cut crops from, see [`find_sources`].
        num_pairs (`Sequence[int]`): pairs of crops of each source.
        num_components (`int`): principal components to keep of the features.
        folder (`str` or `os.PathLike`, *optional*): folder of the cache, which is in memory if it is not given.
        max_gigabytes (`float`, *optional*, defaults to 8.0): maximum size of the cache, in 1e9 bytes.
        seed (`int`, *optional*, defaults to 0): seed of the crops.
        process (`tuple[int, int]`, *optional*, defaults to `(0, 1)`): rank of this process, and the world size.
        barrier (`Callable`, *optional*): waits for all processes.

    Raises:
        ValueError: if the cache would be too large, or the folder holds one of another encoder or of other settings.
    """

    def __init__(
        self,
        teacher: FeatureTeacher,
        sources: Sequence[Source],
        num_pairs: Sequence[int],
        num_components: int,
        folder: str | os.PathLike | None = None,
        max_gigabytes: float = 8.0,
        seed: int = 0,
        process: tuple[int, int] = (0, 1),
        barrier: Callable[[], None] = lambda: None,
    ):
        hidden = teacher.hidden_size
        if not 1 <= num_components <= hidden:
            raise ValueError(
                f"`num_components` must lie in 1..{hidden}, the channels of the encoder, got {num_components}"
            )
        self.teacher, self.sources, self.seed = teacher, list(sources), seed
        self.folder = None if folder is None else Path(folder)
        (self.rank, self.world_size), self.barrier = process, barrier
        self.num_components = num_components
        self.first_row = np.concatenate([[0], np.cumsum([2 * count for count in num_pairs])]).tolist()
        """`list[int]`: the first row of each source, followed by the number of rows."""
        finest = teacher.grid.grids[-1]
        self.size = (finest[0] * STRIDE, finest[1] * STRIDE)
        """`tuple[int, int]`: height and width in pixels of the cached crops, which the network sees."""
        step = -(-len(self.sources) // _FIRST_SOURCES)
        self._num_first = [
            2 * min(count, _FIRST_PAIRS) if index % step == 0 else 0 for index, count in enumerate(num_pairs)
        ]
        arrays = {
            "levels": ((len(self), *self.size, 3), np.uint8),
            "features": ((len(self), teacher.grid.num_patches, num_components), np.float16),
            "first_features": ((sum(self._num_first), teacher.grid.num_patches, hidden), np.float16),
            "done": ((2, len(self.sources)), np.uint8),
        }
        needed = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in arrays.values()) / 1e9
        if needed > max_gigabytes:
            raise ValueError(
                f"`cache_size_gb` is {max_gigabytes:g}, but {len(self)} crops of {self.size[0]}x{self.size[1]} pixels and "
                f"their features take {needed:.3g}; give a larger size, or fewer crops"
            )
        self._open(arrays)
        self.components: Components | None = None

    def __len__(self) -> int:
        return self.first_row[-1]

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the contents, which must equal those of a folder."""
        return {
            "format": _FORMAT,
            "encoder": self.teacher.name,
            "encoder_fingerprint": self.teacher.fingerprint(),
            "dtype": str(self.teacher.dtype).removeprefix("torch."),
            "grids": [list(grid) for grid in self.teacher.grid.grids],
            "num_components": self.num_components,
            "seed": self.seed,
            "inputs": {
                source.path: [os.path.getsize(source.path), stop - start]
                for source, start, stop in zip(self.sources, self.first_row, self.first_row[1:], strict=False)
            },
        }

    def fill(self) -> "TeacherFeatures":
        """Computes all rows that are missing, and returns itself."""
        own = range(self.rank, len(self.sources), self.world_size)
        missing = {stage: [index for index in own if not self.done[stage, index]] for stage in (0, 1)}
        num_rows = sum(len(self._rows(stage, index)) for stage in missing for index in missing[stage])
        with tqdm(total=num_rows, unit="crop", desc="teacher", disable=self.rank > 0) as progress:
            for stage, indices in missing.items():
                for index in indices:
                    self._fill_source(stage, index, progress)
                    self._flush()
                    self.done[stage, index] = 1
                    self._flush()
                self.barrier()
                if stage == 0:
                    self._find_components()
        self.barrier()
        return self

    def _rows(self, stage: int, index: int) -> range:
        """Rows of a source that a stage fills: the first ones, for computing the components, or all others."""
        start, stop = self.first_row[index : index + 2]
        middle = start + self._num_first[index]
        return range(start, middle) if stage == 0 else range(middle, stop)

    def _fill_source(self, stage: int, index: int, progress: tqdm) -> None:
        rows = self._rows(stage, index)
        if not rows:
            return
        sizes = [self.teacher.grid.sizes[-1], self.size]
        seed = (self.seed, index, stage)
        start, batch = rows.start, []
        for pair in cut_pairs(self.sources[index], len(rows) // 2, sizes, seed):
            batch.append(pair)
            stop = start + 2 * len(batch)
            if 2 * len(batch) < _BATCH_SIZE and stop < rows.stop:
                continue
            teacher_crops, crops = (torch.cat(crops) for crops in zip(*batch, strict=True))
            features = self.teacher(teacher_crops)
            self.levels[start:stop] = crops.permute(0, 2, 3, 1).numpy()
            if stage == 0:
                offset = sum(self._num_first[:index]) - rows.start
                self.first_features[offset + start : offset + stop] = features.cpu().numpy()
            else:
                self.features[start:stop] = self.components(features).cpu().numpy()
            progress.update(stop - start)
            start, batch = stop, []

    def _find_components(self) -> None:
        """Computes the components from the first rows of all sources, and projects these rows."""
        path = None if self.folder is None else self.folder / "components.safetensors"
        if self.rank == 0 and (path is None or not path.exists()):
            finest = self.teacher.grid.num_patches_each_scale[-1]
            features = torch.from_numpy(np.array(self.first_features[:, -finest:]))
            self.components = Components.find(features.flatten(0, 1).float(), self.num_components)
            offset = 0
            for start, count in zip(self.first_row, self._num_first, strict=False):
                first_features = torch.from_numpy(np.array(self.first_features[offset : offset + count])).float()
                self.features[start : start + count] = self.components(first_features).numpy()
                offset += count
            if path is not None:
                self._flush()
                with replacing(path) as unfinished:
                    save_file(self.components._asdict(), unfinished)
        self.barrier()
        if path is not None:
            self.components = self._read_components(path)

    def _read_components(self, path: Path) -> Components:
        hidden, kept = self.teacher.hidden_size, self.num_components
        shapes = {"mean": (hidden,), "axes": (kept, hidden), "variances": (hidden,)}
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"`cache_dir`: {str(path)!r} must hold components, but reading it gave {error}; {_REMEDY}"
            ) from error
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            raise ValueError(
                f"`cache_dir`: {str(path)!r} must hold tensors of the shapes {shapes}, got {found}; {_REMEDY}"
            )
        return Components(**tensors)

    def _open(self, arrays: dict[str, tuple[tuple[int, ...], Any]]) -> None:
        if self.folder is None:
            self.levels, self.features, self.first_features, self.done = (
                np.zeros(shape, kind) for shape, kind in arrays.values()
            )
            return
        path = self.folder / "settings.json"
        if self.rank == 0:
            settings = self.settings()
            if path.exists():
                _check_same(path, settings)
            else:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                except FileExistsError:
                    raise ValueError(f"`cache_dir` must be a folder, but {str(self.folder)!r} is a file") from None
                for name, (shape, kind) in arrays.items():
                    np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", kind, shape).flush()
                with replacing(path) as unfinished:
                    unfinished.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        self.barrier()
        self.levels, self.features, self.first_features, self.done = (
            _open_array(self.folder / f"{name}.npy", *expected) for name, expected in arrays.items()
        )

    def _flush(self) -> None:
        for array in (self.levels, self.features, self.first_features, self.done):
            if isinstance(array, np.memmap):
                array.flush()


def teacher_vectors(features: torch.Tensor, weights: torch.Tensor, patch_at: torch.Tensor) -> torch.Tensor:
    """
    Makes the vectors that a network learns to predict.

    Args:
        features (`torch.Tensor` of shape `(frames, patches, components)`): projected features, by patch id.
        weights (`torch.FloatTensor` of shape `(components,)`): see [`~Components.weights`].
        patch_at (`torch.LongTensor` of shape `(scales, rows, columns)`): patch at each place, see [`GazeGrid.patches_at`].

    Returns:
        `torch.FloatTensor` of shape `(frames, scales, components, rows, columns)`
    """
    vectors = features.float() * weights.to(features.device)
    return vectors[:, patch_at.flatten()].unflatten(1, tuple(patch_at.shape)).permute(0, 1, 4, 2, 3)


def _open_array(path: Path, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """Opens an array of the cache for reading and writing."""
    try:
        array = np.load(path, mmap_mode="r+")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`cache_dir`: {str(path)!r} must hold an array, but reading it gave {error}; {_REMEDY}"
        ) from error
    if array.shape != shape or array.dtype != kind:
        raise ValueError(
            f"`cache_dir`: {str(path)!r} must hold {np.dtype(kind)} of the shape {shape}, got {array.dtype} of the shape "
            f"{array.shape}; {_REMEDY}"
        )
    return array


def _check_same(path: Path, settings: dict[str, Any]) -> None:
    where = f"`cache_dir`: {str(path)!r}"
    found = read_json_object(path, where, f"the settings of an earlier run ({_REMEDY})")
    for name, value in settings.items():
        if found.get(name) != value:
            ours, theirs = (f"{len(value)} files", "others") if name == "inputs" else (value, found.get(name))
            raise ValueError(
                f"`cache_dir` {str(path.parent)!r} holds features of another run: {name} is {theirs} there and {ours} here; "
                f"{_REMEDY}"
            )
