"""
Measures of preserved encoder features: the canvas of the kept patches' features, compared with the features of all patches.

The places of a canvas are the patches of the finest scale, in row-major order.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..integrations.vision import GazeVisionModel


_MAX_ITERATIONS = 100  # of k-means, which usually converges much earlier


class FeatureScore(NamedTuple):
    """
    Similarity of canvas and dense features, as means over all places and frames.

    Args:
        cosine (`float`): cosine similarity of canvas and dense feature, both minus the mean dense feature.
        agreement (`float`): share of places whose canvas and dense feature belong to the same cluster.
        loss (`float`): squared distance of canvas and dense feature, as a share of the variance of dense features.
    """

    cosine: float
    agreement: float
    loss: float


@torch.no_grad()
def dense_features(tower: GazeVisionModel, frames: torch.Tensor) -> torch.Tensor:
    """
    Encodes every frame separately, with all patches of the finest scale, as without a selector.

    Args:
        tower ([`GazeVisionModel`]): the image tower.
        frames (`torch.FloatTensor` of shape `(frames, channels, height, width)`): one clip, normalised for the tower.

    Returns:
        `torch.FloatTensor` of shape `(frames, places, hidden)`, in float32 or a higher precision.
    """
    features = tower(frames[None], attention="frame").last_hidden_state
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features.view(len(frames), -1, features.shape[-1])


def canvas_features(features: torch.Tensor, gaze: GazeOutput, start: torch.Tensor) -> torch.Tensor:
    """
    Writes the features of kept patches to a canvas, frame by frame, coarse to fine.

    A patch covers the places whose centres lie in it. Places that are not covered keep the feature of the frame before.

    Args:
        features (`torch.FloatTensor` of shape `(tokens, hidden)`):
            Features of the kept patches, in the order of the gaze's slots.
        gaze ([`GazeOutput`]): the kept patches of one clip.
        start (`torch.FloatTensor` of shape `(hidden,)`): feature of every place before the first frame.

    Returns:
        `torch.FloatTensor` of shape `(frames, places, hidden)`: the canvas after each frame.

    Raises:
        ValueError: if the gaze has several clips, or the numbers of features and kept patches differ.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid, GazeOutput
    >>> from transformers_autogaze.evaluation.features import canvas_features

    >>> masks = [torch.tensor([[[True], [False]]]), torch.tensor([[[False] * 4, [True, False, False, False]]])]
    >>> gaze = GazeOutput.from_masks(masks, GazeGrid([16, 32], patch_size=16))
    >>> canvas_features(torch.tensor([[1.0], [2.0]]), gaze, start=torch.zeros(1)).squeeze(-1).tolist()
    [[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]]

    ```
    """
    if gaze.batch_size != 1 or len(features) != int(gaze.num_real.sum()):
        raise ValueError(
            f"`features` must be those of the kept patches of one clip, {gaze.num_real.tolist()}, got {len(features)}"
        )
    rows, cols = gaze.grid.grids[-1]
    finest = gaze.finest_patches(rows, cols)[0].flatten(1)
    is_real = ~gaze.if_padded_gazing[0]
    frame = gaze.frame_of_slot[is_real]
    ids = gaze.gazing_pos[0, is_real] - frame * gaze.num_vision_tokens_each_frame
    # Tokens are numbered in temporal order from 1, so the latest token at a place has the highest number.
    token_number = finest.new_zeros(gaze.num_frames, gaze.num_vision_tokens_each_frame)
    token_number[frame, ids] = torch.arange(1, len(ids) + 1, device=ids.device)
    written = torch.where(finest >= 0, token_number.gather(1, finest.clamp(min=0)), 0)
    latest = written.cummax(0).values
    return torch.cat([start[None].to(features), features])[latest.to(features.device)]


class FeatureMeasure:
    """
    Compares canvases of one clip with its dense features.

    The clusters are computed once, by [`k_means`] on the dense features of the clip.

    Args:
        dense (`torch.FloatTensor` of shape `(frames, places, hidden)`): see [`dense_features`].
        mean (`torch.FloatTensor` of shape `(hidden,)`, *optional*):
            The mean dense feature of all compared clips; that of this clip by default.
        variance (`float`, *optional*):
            Mean squared distance of the dense features of all compared clips from the mean; that of this clip by default.
        num_clusters (`int`, *optional*, defaults to 6): clusters of the dense features.
        seed (`int`, *optional*, defaults to 0): seed of k-means.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.features import FeatureMeasure

    >>> dense = torch.randn(2, 16, 8)
    >>> measure = FeatureMeasure(dense)
    >>> score = measure(dense)
    >>> round(score.cosine, 4), score.agreement, score.loss
    (1.0, 1.0, 0.0)

    ```
    """

    def __init__(
        self,
        dense: torch.Tensor,
        mean: torch.Tensor | None = None,
        variance: float | None = None,
        num_clusters: int = 6,
        seed: int = 0,
    ):
        self.dense = dense
        self.mean = dense.mean((0, 1)) if mean is None else mean.to(dense)
        """`torch.FloatTensor` of shape `(hidden,)`: the mean dense feature, from which canvases start."""
        self._centred = dense - self.mean
        self._variance = float(self._centred.square().sum(-1).mean()) if variance is None else variance
        self._centres = k_means(self._centred.flatten(0, 1), num_clusters, seed)
        self._clusters = _nearest(self._centred.flatten(0, 1), self._centres)

    def __call__(self, canvas: torch.Tensor) -> FeatureScore:
        """
        Measures one canvas.

        Args:
            canvas (`torch.FloatTensor` of shape `(frames, places, hidden)`): see [`canvas_features`].

        Returns:
            [`FeatureScore`]
        """
        if canvas.shape != self.dense.shape:
            raise ValueError(
                f"`canvas` must have the shape {tuple(self.dense.shape)} of the dense features, got {tuple(canvas.shape)}"
            )
        canvas = canvas.to(self._centred) - self.mean
        cosine = F.cosine_similarity(canvas, self._centred, dim=-1).mean()
        agreement = (_nearest(canvas.flatten(0, 1), self._centres) == self._clusters).float().mean()
        error = float((canvas - self._centred).square().sum(-1).mean())
        return FeatureScore(float(cosine), float(agreement), error / max(self._variance, 1e-12))


def keep_dissimilar(dense: torch.Tensor, num_tokens: int, grid: GazeGrid) -> GazeOutput:
    """
    Drops tokens after the tower like EVS (Efficient Video Sampling, as implemented in vLLM).

    All tokens of the first frame are kept. Of the other frames, those with the lowest cosine similarity to the token at the same
    place in the frame before are kept; of equal ones, the earlier.

    Args:
        dense (`torch.FloatTensor` of shape `(frames, places, hidden)`): see [`dense_features`].
        num_tokens (`int`): tokens of the clip to keep; at least those of the first frame are kept.
        grid (`GazeGrid`): the scales of the tower; the tokens belong to the finest.

    Returns:
        [`GazeOutput`]: the kept tokens, as patches of the finest scale of one clip.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.evaluation.features import keep_dissimilar

    >>> dense = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 2]]).repeat(2, 1, 1)
    >>> dense[1, 2] = torch.tensor([-1.0, 1])
    >>> keep_dissimilar(dense, 5, GazeGrid([32], patch_size=16)).gazing_pos.tolist()
    [[0, 1, 2, 3, 6]]

    ```
    """
    num_frames, places = dense.shape[:2]
    change = 1 - F.cosine_similarity(dense[1:], dense[:-1], dim=-1).flatten()
    kept = change.argsort(descending=True, stable=True)[: max(0, num_tokens - places)]
    finest = torch.zeros(num_frames * places, dtype=torch.bool, device=dense.device)
    finest[:places] = True
    finest[places + kept] = True
    coarser = [finest.new_zeros(1, num_frames, count) for count in grid.num_patches_each_scale[:-1]]
    return GazeOutput.from_masks([*coarser, finest.view(1, num_frames, places)], grid)


def k_means(points: torch.Tensor, num_clusters: int, seed: int = 0) -> torch.Tensor:
    """
    Computes cluster centres by k-means with k-means++ initialisation, deterministically for a seed.

    Args:
        points (`torch.FloatTensor` of shape `(points, channels)`): points to cluster.
        num_clusters (`int`): number of clusters, at least 1.
        seed (`int`, *optional*, defaults to 0): seed of the initialisation.

    Returns:
        `torch.FloatTensor` of shape `(num_clusters, channels)`: the centres.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.features import k_means

    >>> k_means(torch.tensor([[0.0], [9.0], [1.0], [11.0]]), 2).flatten().sort().values.tolist()
    [0.5, 10.0]

    ```
    """
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
    while len(centres) < num_clusters:
        # The next centre is drawn with weights of the squared distance to the nearest centre; uniformly if all are zero.
        weights = torch.cdist(points, centres).amin(1).square().cpu()
        weights = weights if weights.any() else torch.ones_like(weights)
        drawn = torch.multinomial(weights, 1, generator=generator).to(points.device)
        centres = torch.cat([centres, points[drawn]])
    previous = None
    for _ in range(_MAX_ITERATIONS):
        nearest = _nearest(points, centres)
        if previous is not None and torch.equal(nearest, previous):
            break
        member = F.one_hot(nearest, num_clusters).to(points.dtype)
        counts = member.sum(0)[:, None]
        # The centre of an empty cluster does not change.
        centres = torch.where(counts > 0, member.T @ points / counts.clamp(min=1), centres)
        previous = nearest
    return centres


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Returns the index of the nearest centre of each point."""
    return torch.cdist(points, centres).argmin(1)
