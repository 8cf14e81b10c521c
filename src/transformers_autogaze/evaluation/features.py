"""
What an encoder keeps: features of kept patches, laid on a map of the frame, against those of all patches.

This module owns the measure and what it is made of; it knows nothing of selectors, videos or files. "Places" are the rows
and columns of the finest scale, row by row.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..integrations.vision import GazeVisionModel


_MOST_ROUNDS = 100  # of k-means, which ends by itself long before


class FeatureScore(NamedTuple):
    """
    How well laid features stand for dense ones; means over all places and frames.

    Args:
        cosine (`float`): cosine of laid and dense feature, both minus the mean dense feature.
        agreement (`float`): share of places whose laid feature falls to the same cluster as the dense one.
        loss (`float`): squared distance of laid and dense feature, as a share of the variance of dense features.
    """

    cosine: float
    agreement: float
    loss: float


@torch.no_grad()
def dense_features(tower: GazeVisionModel, frames: torch.Tensor) -> torch.Tensor:
    """
    Encodes every frame alone, with all patches of the finest scale: what a tower makes of a video without a selector.

    Args:
        tower ([`GazeVisionModel`]): the tower, an image tower.
        frames (`torch.FloatTensor` of shape `(frames, channels, height, width)`): one clip, normalised for the tower.

    Returns:
        `torch.FloatTensor` of shape `(frames, places, hidden)`: in float32 at least.
    """
    features = tower(frames[None], attention="frame").last_hidden_state
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features.view(len(frames), -1, features.shape[-1])


def lay_features(features: torch.Tensor, gaze: GazeOutput, start: torch.Tensor) -> torch.Tensor:
    """
    Lays the features of kept patches on a map of places, frame by frame, coarse to fine.

    A place belongs to the patch that its centre lies in. What is not kept keeps what stood there.

    Args:
        features (`torch.FloatTensor` of shape `(tokens, hidden)`):
            What a tower made of the kept patches, in the order of the gaze's slots.
        gaze ([`GazeOutput`]): the kept patches of one clip.
        start (`torch.FloatTensor` of shape `(hidden,)`): what stands at every place before the first frame.

    Returns:
        `torch.FloatTensor` of shape `(frames, places, hidden)`: the map after each frame.

    Raises:
        ValueError: if the gaze is of several clips or `features` are not as many as its kept patches.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid, GazeOutput
    >>> from transformers_autogaze.evaluation.features import lay_features

    >>> masks = [torch.tensor([[[True], [False]]]), torch.tensor([[[False] * 4, [True, False, False, False]]])]
    >>> gaze = GazeOutput.from_masks(masks, GazeGrid([16, 32], patch_size=16))
    >>> lay_features(torch.tensor([[1.0], [2.0]]), gaze, start=torch.zeros(1)).squeeze(-1).tolist()
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
    # Tokens are numbered from 1 on, in order of time, so the latest one at a place has the highest number.
    number = finest.new_zeros(gaze.num_frames, gaze.num_vision_tokens_each_frame)
    number[frame, ids] = torch.arange(1, len(ids) + 1, device=ids.device)
    shown = torch.where(finest >= 0, number.gather(1, finest.clamp(min=0)), 0)
    latest = shown.cummax(0).values
    return torch.cat([start[None].to(features), features])[latest.to(features.device)]


class FeatureMeasure:
    """
    Measures maps of laid features of one clip against its dense features.

    Clusters are found once, by [`k_means`] on the dense features of the clip.

    Args:
        dense (`torch.FloatTensor` of shape `(frames, places, hidden)`): see [`dense_features`].
        mean (`torch.FloatTensor` of shape `(hidden,)`, *optional*):
            The mean dense feature: of all clips that are compared, or that of this one by default.
        variance (`float`, *optional*):
            Mean squared distance of dense features from that mean: of all clips, or that of this one by default.
        num_clusters (`int`, *optional*, defaults to 6): clusters of the dense features.
        seed (`int`, *optional*, defaults to 0): where the random numbers of k-means start.

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
        """`torch.FloatTensor` of shape `(hidden,)`: the mean dense feature, which maps start from."""
        self._centred = dense - self.mean
        self._variance = float(self._centred.square().sum(-1).mean()) if variance is None else variance
        self._centres = k_means(self._centred.flatten(0, 1), num_clusters, seed)
        self._clusters = _nearest(self._centred.flatten(0, 1), self._centres)

    def __call__(self, laid: torch.Tensor) -> FeatureScore:
        """
        Measures one map.

        Args:
            laid (`torch.FloatTensor` of shape `(frames, places, hidden)`): see [`lay_features`].

        Returns:
            [`FeatureScore`]
        """
        if laid.shape != self.dense.shape:
            raise ValueError(
                f"`laid` must have the shape {tuple(self.dense.shape)} of the dense features, got {tuple(laid.shape)}"
            )
        laid = laid.to(self._centred) - self.mean
        cosine = F.cosine_similarity(laid, self._centred, dim=-1).mean()
        agreement = (_nearest(laid.flatten(0, 1), self._centres) == self._clusters).float().mean()
        error = float((laid - self._centred).square().sum(-1).mean())
        return FeatureScore(float(cosine), float(agreement), error / max(self._variance, 1e-12))


def keep_dissimilar(dense: torch.Tensor, num_tokens: int, grid: GazeGrid) -> GazeOutput:
    """
    Drops tokens of a whole tower the way of EVS (Efficient Video Sampling, as vLLM has it), after it has run.

    The first frame stays whole. Of all others, the tokens stay whose cosine similarity to the token of the same place in
    the frame before is lowest; ties go to the earlier one.

    Args:
        dense (`torch.FloatTensor` of shape `(frames, places, hidden)`): see [`dense_features`].
        num_tokens (`int`): tokens of the clip that stay; one frame at least does.
        grid (`GazeGrid`): the scales of the tower, of which the finest is meant.

    Returns:
        [`GazeOutput`]: the tokens that stay, as patches of the finest scale of one clip.

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
    Finds cluster centres: k-means, started by k-means++. The same points and seed give the same centres.

    Args:
        points (`torch.FloatTensor` of shape `(points, channels)`): what to cluster.
        num_clusters (`int`): clusters, at least 1.
        seed (`int`, *optional*, defaults to 0): where the random numbers start.

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
        # The next centre is drawn by squared distance to the nearest so far; from all points where none has any.
        weights = torch.cdist(points, centres).amin(1).square().cpu()
        weights = weights if weights.any() else torch.ones_like(weights)
        drawn = torch.multinomial(weights, 1, generator=generator).to(points.device)
        centres = torch.cat([centres, points[drawn]])
    before = None
    for _ in range(_MOST_ROUNDS):
        nearest = _nearest(points, centres)
        if before is not None and torch.equal(nearest, before):
            break
        member = F.one_hot(nearest, num_clusters).to(points.dtype)
        counts = member.sum(0)[:, None]
        # A centre that no point is nearest to stays where it is.
        centres = torch.where(counts > 0, member.T @ points / counts.clamp(min=1), centres)
        before = nearest
    return centres


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centre of each point."""
    return torch.cdist(points, centres).argmin(1)
