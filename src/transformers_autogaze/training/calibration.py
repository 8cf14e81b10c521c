"""
Evaluation and calibration of a distilled network.

The R2 of the predicted vectors is measured on crops. Calibration measures, on whole clips, the encoder's loss for each loss that
the network predicts.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from ..evaluation.features import canvas_features
from ..feature_network_autogaze import FeatureGazeNetwork
from ..frame_decoding_autogaze import read_video, stream_video
from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from .augmentation import pan_and_zoom, resize_pixels
from .crops import Source, read_source
from .distillation_trainer import CropPairDataset
from .teacher_features import TeacherFeatures


_NUM_FRAMES = 16  # of a clip
_MAX_FILES = 12  # number of files that clips are taken from
# Thresholds at which the encoder's loss is measured.
_PREDICTED_LOSSES = (0.01, 0.02, 0.04, 0.08, 0.14, 0.22, 0.34, 0.5, 0.7)


class PredictionQuality(NamedTuple):
    """
    R2 of predicted vectors.

    Args:
        r2 (`list[float]`): share of the variance that is predicted, at each scale, coarse to fine.
        change_r2 (`float`): the same for the difference between the crops of a pair, at the finest scale.
    """

    r2: list[float]
    change_r2: float


@torch.no_grad()
def measure_predictions(network: FeatureGazeNetwork, pairs: CropPairDataset, batch_size: int = 8) -> PredictionQuality:
    """
    Measures the R2 of a network's predictions on crops.

    Args:
        network ([`FeatureGazeNetwork`]): the network.
        pairs ([`CropPairDataset`]): pairs of files that were not trained on.
        batch_size (`int`, *optional*, defaults to 8): pairs in a batch.

    Returns:
        [`PredictionQuality`]
    """
    network.eval()
    sums = torch.zeros(4, len(network.config.scale_factors), dtype=torch.float64)
    for first in range(0, len(pairs), batch_size):
        items = [pairs[index] for index in range(first, min(first + batch_size, len(pairs)))]
        vectors = torch.stack([item["vectors"] for item in items])
        levels = torch.stack([item["levels"] for item in items]).flatten(0, 1).permute(0, 3, 1, 2)
        errors = vectors - predict_vectors(network, levels).unflatten(0, (-1, 2)).cpu()
        values = errors, vectors, errors[:, 0] - errors[:, 1], vectors[:, 0] - vectors[:, 1]
        for index, value in enumerate(values):
            sums[index] += value.double().square().transpose(0, -4).flatten(1).sum(1)
    r2 = 1 - sums[0] / sums[1].clamp(min=1e-12)
    return PredictionQuality(r2.tolist(), float(1 - sums[2, -1] / sums[3, -1].clamp(min=1e-12)))


def calibrate(
    network: FeatureGazeNetwork,
    features: TeacherFeatures,
    held_out: Sequence[Source],
    trained_on: Sequence[Source] = (),
) -> list[list[float]]:
    """
    Measures the share of an encoder's feature variance that is lost at each predicted loss.

    Predictions are worse for files that differ from those of training. The loss is therefore measured both on files that were
    not trained on and on whole frames of files whose crops were; both groups have the same weight.

    Patches of the finest scale are chosen with thresholds on the predicted loss. The encoder reads the kept patches
    (`attention="canvas"`), and the canvas of its features is compared with the features of whole frames.

    Args:
        network ([`FeatureGazeNetwork`]): the network.
        features ([`TeacherFeatures`]): the encoder and its components.
        held_out (`Sequence[Source]`): files that were not trained on. Videos give a clip of frames spread over them and
            one of consecutive frames; without videos, clips are made by camera motion over the pictures.
        trained_on (`Sequence[Source]`, *optional*): files that were trained on; without any, only `held_out` is used.

    Returns:
        `list[list[float]]`: pairs of predicted and measured loss, ascending, from `[0, 0]` on; `config.loss_knots`.
    """
    network.eval()
    groups = [
        np.mean([_measure_losses(network, features, levels) for levels in _read_clips(sources, features.seed)], axis=0)
        for sources in (held_out, trained_on)
        if sources
    ]
    return ascending_knots(_PREDICTED_LOSSES, np.mean(groups, axis=0).tolist())


def _measure_losses(network: FeatureGazeNetwork, features: TeacherFeatures, levels: torch.Tensor) -> list[float]:
    """Returns the measured loss of a clip for each of the predicted losses as a threshold."""
    teacher, finest = features.teacher, len(features.teacher.grid.grids) - 1
    one_scale = GazeGrid(teacher.grid.scales[-1:], teacher.grid.patch_size)
    mean = features.components.mean.to(teacher.device)
    small, large = (
        (resize_pixels(levels, size) * 255).round().to(torch.uint8) for size in (teacher.grid.sizes[-1], features.size)
    )
    with torch.no_grad():
        vectors = predict_vectors(network, large)[:, -1].flatten(2).transpose(1, 2)
    dense = teacher(small, [finest])
    losses = []
    for predicted in _PREDICTED_LOSSES:
        is_kept = keep_to_threshold(vectors, predicted)
        gaze = GazeOutput.from_masks([is_kept[None].to(teacher.device)], one_scale)
        canvas = canvas_features(teacher.encode_kept(small, is_kept), gaze, mean)
        losses.append(float((canvas - dense).square().sum(-1).mean()))
    return [loss / float(features.components.variances.sum()) for loss in losses]


def keep_to_threshold(vectors: torch.Tensor, max_loss: float) -> torch.Tensor:
    """
    Keeps the fewest places of each frame for which the predicted loss is at most a threshold.

    Args:
        vectors (`torch.FloatTensor` of shape `(frames, places, feature_size)`): vectors of a clip.
        max_loss (`float`): largest mean squared distance of a frame's vectors from those of the canvas.

    Returns:
        `torch.BoolTensor` of shape `(frames, places)`: the kept places.

    Example:

    ```python
    >>> from transformers_autogaze.training.calibration import keep_to_threshold

    >>> keep_to_threshold(torch.tensor([[[1.0], [2.0]], [[2.0], [2.1]]]), 0.5).tolist()
    [[False, True], [True, False]]

    ```
    """
    canvas = torch.zeros_like(vectors[0])
    kept = []
    for frame in vectors:
        errors = (frame - canvas).square().sum(-1)
        largest, order = errors.sort(descending=True)
        remaining = largest.flip(0).cumsum(0).flip(0)  # error if this place and all after it are not kept
        is_kept = torch.zeros_like(order, dtype=torch.bool)
        is_kept[order] = remaining > max_loss * len(errors)
        kept.append(is_kept)
        canvas = torch.where(is_kept[:, None], frame, canvas)
    return torch.stack(kept)


def ascending_knots(predicted: Sequence[float], measured: Sequence[float]) -> list[list[float]]:
    """
    Makes strictly ascending pairs of losses in 0..1: where measured losses fall, neighbours are averaged.

    Args:
        predicted, measured (`Sequence[float]`): losses, the predicted ones ascending.

    Returns:
        `list[list[float]]`: pairs.

    Example:

    ```python
    >>> from transformers_autogaze.training.calibration import ascending_knots

    >>> ascending_knots([0.1, 0.2, 0.3], [0.2, 0.1, 0.4])
    [[0.0, 0.0], [0.15, 0.15], [0.3, 0.4]]

    ```
    """
    groups: list[tuple[float, float, int]] = []
    for x, y in zip(predicted, measured, strict=True):
        groups.append((x, min(y, 1.0), 1))
        # Means are compared as they are rounded below, so that no pair is returned twice.
        while len(groups) > 1 and round(groups[-1][1] / groups[-1][2], 5) <= round(groups[-2][1] / groups[-2][2], 5):
            (x1, y1, n1), (x2, y2, n2) = groups.pop(), groups.pop()
            groups.append((x1 + x2, y1 + y2, n1 + n2))
    pairs = [[round(x / n, 5), round(y / n, 5)] for x, y, n in groups]
    return [[0.0, 0.0], *(pair for pair in pairs if min(pair) > 0)]


def predict_vectors(network: FeatureGazeNetwork, levels: torch.Tensor) -> torch.Tensor:
    """Returns a network's vectors for frames `(frames, 3, height, width)` in levels 0..255."""
    pixels = levels.to(network.device).float() / 255
    return network(FeatureGazeNetwork.normalize(pixels)).float()


def _read_clips(sources: Sequence[Source], seed: int) -> Iterator[torch.Tensor]:
    """Yields clips `(frames, 3, height, width)` in levels 0..255."""
    videos = [source for source in sources if source.is_video and source.num_frames > 1]
    for source in _choose_evenly(videos):
        count = min(_NUM_FRAMES, source.num_frames)
        spread = read_video(source.path, num_frames=count)[0]
        consecutive = np.stack(list(islice(stream_video(source.path)[1], count)))
        yield from (torch.from_numpy(frames).permute(0, 3, 1, 2) for frames in (spread, consecutive))
    if not videos:
        generator = torch.Generator().manual_seed(seed)
        for source in _choose_evenly(sources):
            frames = pan_and_zoom(read_source(source)[0], _NUM_FRAMES, (512, 512), generator)
            yield (frames * 255).round().to(torch.uint8)


def _choose_evenly(sources: Sequence[Source]) -> list[Source]:
    """Chooses at most `_MAX_FILES` files, evenly spread, since files with neighbouring names are often similar."""
    count = min(_MAX_FILES, len(sources))
    return [sources[index] for index in np.unique(np.linspace(0, len(sources) - 1, count).round().astype(int))]
