"""Measures of the quality of reconstructed frames, as functions of tensors."""

import math

import torch
from torch.nn import functional as F


_MIN_MSE = 1e-10
_WINDOW, _DEVIATION = 11, 1.5  # pixels
_LUMA = (0.299, 0.587, 0.114)
_STABILISERS = (0.01**2, 0.03**2)  # for pixels in 0..1


def psnr(rebuilt: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of each frame.

    Args:
        rebuilt, frames (`torch.FloatTensor` of shape `(.., channels, height, width)`): pixels in 0..1.

    Returns:
        `torch.FloatTensor` of shape `(..)`, in dB, at most 100.
    """
    mse = (rebuilt - frames).square().mean((-3, -2, -1))
    return -10 * mse.clamp(min=_MIN_MSE).log10()


def l1(rebuilt: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """
    Mean absolute error of each frame.

    Args:
        rebuilt, frames (`torch.FloatTensor` of shape `(.., channels, height, width)`): pixels in 0..1.

    Returns:
        `torch.FloatTensor` of shape `(..)`.
    """
    return (rebuilt - frames).abs().mean((-3, -2, -1))


def ssim(rebuilt: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """
    Structural similarity of each frame's luma (Wang et al., 2004; luma as in BT.601): Gaussian window of 11 pixels and
    standard deviation 1.5, K of 0.01 and 0.03, mean over the windows that lie inside the frame.

    Args:
        rebuilt, frames (`torch.FloatTensor` of shape `(.., 3, height, width)`):
            RGB pixels in 0..1, with a height and width of at least 11.

    Returns:
        `torch.FloatTensor` of shape `(..)`, 1 for equal frames.

    Raises:
        ValueError: if a frame is smaller than the window.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.quality import ssim

    >>> frame = torch.rand(3, 32, 32)
    >>> round(float(ssim(frame, frame)), 4), bool(ssim(1 - frame, frame) < 0)
    (1.0, True)

    ```
    """
    if min(frames.shape[-2:]) < _WINDOW:
        raise ValueError(f"`frames` must be at least {_WINDOW} pixels high and wide, got {tuple(frames.shape[-2:])}")
    rows, cols = (_smoothing(length, frames) for length in frames.shape[-2:])

    def smooth(images: torch.Tensor) -> torch.Tensor:
        return rows @ images @ cols.T

    x, y = (torch.einsum("...chw,c->...hw", images, images.new_tensor(_LUMA)) for images in (rebuilt, frames))
    mean_x, mean_y = smooth(x), smooth(y)
    variances = smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = _STABILISERS
    similarity = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    similarity = similarity * (2 * covariance + c2) / (variances + c2)
    return similarity.mean((-2, -1))


def _smoothing(length: int, like: torch.Tensor) -> torch.Tensor:
    """
    Returns the Gaussian window along one axis as a matrix, `(length - 10, length)`.

    Matrix products are several times faster on a CPU than a convolution.
    """
    distance = torch.arange(_WINDOW, dtype=like.dtype, device=like.device) - _WINDOW // 2
    window = (-(distance**2) / (2 * _DEVIATION**2)).exp()
    return torch.stack(
        [F.pad(window / window.sum(), (start, length - _WINDOW - start)) for start in range(length - _WINDOW + 1)]
    )


def efficiency(loss: float, random_loss: float, greedy_loss: float) -> float:
    """
    Gain of a selector over random patches, as a share of the gain of greedy search, for equal numbers of patches.

    Args:
        loss, random_loss, greedy_loss (`float`): mean reconstruction losses of the selector, of random patches and of
            greedy search.

    Returns:
        `float`: `(random - selector) / (random - greedy)`: 1 is as good as greedy search, 0 no better than random patches; NaN if
        both have the same loss.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.quality import efficiency

    >>> efficiency(0.25, random_loss=1.0, greedy_loss=0.0)
    0.75

    ```
    """
    if random_loss == greedy_loss:
        return math.nan
    return (random_loss - loss) / (random_loss - greedy_loss)
