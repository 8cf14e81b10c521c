"""
What a network is to foresee: an encoder's features of crops at every scale, reduced to few numbers, made once and kept.

This module owns the principal components of features and the store on disk or in memory. Encoders are `teachers`' matter, what
crops there are that of `crops`, what is learned from them that of `distillation`.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from safetensors.torch import load_file, save_file

from ..feature_network_autogaze import STRIDE
from ..utils.output_files import replacing
from .crops import Source, cut_pairs
from .teachers import FeatureTeacher


_FORMAT = 1
_FIRST_SOURCES, _FIRST_PAIRS = 48, 4  # that components are found on: files at most, and pairs of each
_BATCH = 8  # crops that the encoder sees together


class Components(NamedTuple):
    """
    Principal components of an encoder's features at the finest scale.

    Args:
        mean (`torch.FloatTensor` of shape `(hidden,)`): the mean feature.
        axes (`torch.FloatTensor` of shape `(components, hidden)`): the components, the strongest first.
        variances (`torch.FloatTensor` of shape `(hidden,)`): variances along all components, of which `axes` has the first.
    """

    mean: torch.Tensor
    axes: torch.Tensor
    variances: torch.Tensor

    @classmethod
    def find(cls, features: torch.Tensor, num_components: int) -> "Components":
        """
        Finds them.

        Args:
            features (`torch.FloatTensor` of shape `(places, hidden)`): features.
            num_components (`int`): components to keep.
        """
        precise = features.double()
        mean = precise.mean(0)
        covariance = (precise - mean).T @ (precise - mean) / len(precise)
        variances, axes = torch.linalg.eigh(covariance)
        variances, axes = variances.flip(0).clamp(min=0), axes.flip(1)[:, :num_components].T
        return cls(mean.float(), axes.float().contiguous(), variances.float())

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Puts features `(.., hidden)` on the components: `(.., components)`."""
        return (features - self.mean.to(features)) @ self.axes.T.to(features)

    def weights(self, whitening: float) -> torch.Tensor:
        """
        Gives what components are multiplied with to make a vector of mean squared length 1.

        Args:
            whitening (`float`): power of its deviation that each component is divided by: 0 leaves features as they are.

        Returns:
            `torch.FloatTensor` of shape `(components,)`
        """
        kept = self.variances[: len(self.axes)].double()
        weights = kept.clamp(min=1e-6 * float(kept[0])).sqrt() ** -whitening
        return (weights / (kept * weights**2).sum().sqrt()).float()

    @property
    def explained(self) -> float:
        """Share of the variance that the components hold."""
        return float(self.variances[: len(self.axes)].sum() / self.variances.sum())


class TeacherFeatures:
    """
    Crops and what an encoder makes of them, row by row; rows `2 i` and `2 i + 1` are a pair.

    Filled source by source, from where an earlier run was broken off. With several processes, each fills its part.

    Args:
        teacher ([`FeatureTeacher`]): the encoder.
        sources (`Sequence[Source]`): files to cut crops from, see [`find_sources`].
        num_pairs (`Sequence[int]`): pairs of crops of each source.
        num_components (`int`): principal components to keep of the features.
        folder (`str` or `os.PathLike`, *optional*): where to keep it; in memory only if not given.
        max_gigabytes (`float`, *optional*, defaults to 8.0): what it may take, in 1e9 bytes.
        seed (`int`, *optional*, defaults to 0): where the random numbers of crops start from.
        part (`tuple[int, int]`, *optional*, defaults to `(0, 1)`): number of this process, and how many there are.
        wait (`Callable`, *optional*): waits for all processes.

    Raises:
        ValueError: if it would take more than it may, or the folder holds that of another encoder or of other settings.
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
        part: tuple[int, int] = (0, 1),
        wait: Callable[[], None] = lambda: None,
    ):
        hidden = teacher.hidden_size
        if not 1 <= num_components <= hidden:
            raise ValueError(
                f"`num_components` must lie in 1..{hidden}, the channels of the encoder, got {num_components}"
            )
        self.teacher, self.sources, self.seed = teacher, list(sources), seed
        self.folder = None if folder is None else Path(folder)
        self.part, self.wait = part, wait
        self.num_components = num_components
        self.first_row = np.concatenate([[0], np.cumsum([2 * count for count in num_pairs])]).tolist()
        """`list[int]`: the first row of each source, and the number of rows at the end."""
        finest = teacher.grid.grids[-1]
        self.size = (finest[0] * STRIDE, finest[1] * STRIDE)
        """Height and width in pixels of the crops that are kept, those that the network sees."""
        every = -(-len(self.sources) // _FIRST_SOURCES)
        self._num_first = [
            2 * min(count, _FIRST_PAIRS) if index % every == 0 else 0 for index, count in enumerate(num_pairs)
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
                f"their features take {needed:.3g}; allow more, or ask for fewer crops"
            )
        self._open(arrays)
        self.components: Components | None = None

    def __len__(self) -> int:
        return self.first_row[-1]

    def settings(self) -> dict[str, Any]:
        """Tells what decides on the contents, to be compared with those of a folder."""
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
        """Makes what is not there yet; gives itself."""
        number, count = self.part
        mine = range(number, len(self.sources), count)
        left = [(stage, index) for stage in (0, 1) for index in mine if not self.done[stage, index]]
        rows = sum(len(self._rows(stage, index)) for stage, index in left)
        with tqdm(total=rows, unit="crop", desc="teacher", disable=number > 0) as progress:
            for stage in (0, 1):
                for index in (index for at, index in left if at == stage):
                    self._fill_source(stage, index, progress)
                    self._flush()
                    self.done[stage, index] = 1
                    self._flush()
                self.wait()
                if stage == 0:
                    self._find_components()
        self.wait()
        return self

    def _rows(self, stage: int, index: int) -> range:
        """Rows of a source that a stage fills: the first, on which components are found, or all others."""
        start, stop = self.first_row[index : index + 2]
        middle = start + self._num_first[index]
        return range(start, middle) if stage == 0 else range(middle, stop)

    def _fill_source(self, stage: int, index: int, progress: tqdm) -> None:
        rows = self._rows(stage, index)
        if not rows:
            return
        sizes = [self.teacher.grid.sizes[-1], self.size]
        seed = (self.seed, index, stage)
        first, waiting = rows.start, []
        for pair in cut_pairs(self.sources[index], len(rows) // 2, sizes, seed):
            waiting.append(pair)
            if 2 * len(waiting) < _BATCH and first + 2 * len(waiting) < rows.stop:
                continue
            seen, kept = (torch.cat(crops) for crops in zip(*waiting, strict=True))
            features = self.teacher(seen)
            stop = first + len(seen)
            self.levels[first:stop] = kept.permute(0, 2, 3, 1).numpy()
            if stage == 0:
                place = sum(self._num_first[:index]) + first - rows.start
                self.first_features[place : place + len(seen)] = features.cpu().numpy()
            else:
                self.features[first:stop] = self.components(features).cpu().numpy()
            first, waiting = stop, []
            progress.update(len(seen))

    def _find_components(self) -> None:
        """Finds the components on the first rows of all sources, and puts these rows on them."""
        path = None if self.folder is None else self.folder / "components.safetensors"
        if self.part[0] == 0 and (path is None or not path.exists()):
            finest = self.teacher.grid.num_patches_each_scale[-1]
            features = torch.from_numpy(np.array(self.first_features[:, -finest:]))
            self.components = Components.find(features.flatten(0, 1).float(), self.num_components)
            place = 0
            for index, count in enumerate(self._num_first):
                rows = torch.from_numpy(np.array(self.first_features[place : place + count])).float()
                start = self.first_row[index]
                self.features[start : start + count] = self.components(rows).numpy()
                place += count
            if path is not None:
                self._flush()
                with replacing(path) as unfinished:
                    save_file(self.components._asdict(), unfinished)
        self.wait()
        if path is not None:
            self.components = Components(**load_file(path))

    def _open(self, arrays: dict[str, tuple[tuple[int, ...], Any]]) -> None:
        if self.folder is None:
            self.levels, self.features, self.first_features, self.done = (
                np.zeros(shape, kind) for shape, kind in arrays.values()
            )
            return
        path = self.folder / "settings.json"
        if self.part[0] == 0:
            settings = self.settings()
            if path.exists():
                _check_same(path, settings)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                for name, (shape, kind) in arrays.items():
                    np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", kind, shape).flush()
                with replacing(path) as unfinished:
                    unfinished.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        self.wait()
        self.levels, self.features, self.first_features, self.done = (
            np.load(self.folder / f"{name}.npy", mmap_mode="r+") for name in arrays
        )

    def _flush(self) -> None:
        for array in (self.levels, self.features, self.first_features, self.done):
            if isinstance(array, np.memmap):
                array.flush()


def teacher_vectors(features: torch.Tensor, weights: torch.Tensor, patch_at: torch.Tensor) -> torch.Tensor:
    """
    Makes the vectors that a network is to foresee.

    Args:
        features (`torch.Tensor` of shape `(frames, patches, components)`): features on their components, by id.
        weights (`torch.FloatTensor` of shape `(components,)`): see [`~Components.weights`].
        patch_at (`torch.LongTensor` of shape `(scales, rows, columns)`): patch over each place, see `GazeGrid.patches_at`.

    Returns:
        `torch.FloatTensor` of shape `(frames, scales, components, rows, columns)`
    """
    vectors = features.float() * weights.to(features.device)
    return vectors[:, patch_at.flatten()].unflatten(1, tuple(patch_at.shape)).permute(0, 1, 4, 2, 3)


def _check_same(path: Path, settings: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    for name, value in settings.items():
        if found.get(name) != value:
            said = (value, found.get(name))
            if name == "inputs":
                said = (f"{len(value)} files", "others")
            raise ValueError(
                f"`cache_dir` {str(path.parent)!r} holds features of another run: {name} is {said[1]} there and {said[0]} "
                "here; name another folder, or delete this one"
            )
