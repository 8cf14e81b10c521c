"""
The measures of `quality` as a metric of the `evaluate` library, which `evaluate.load` loads from this file.

It imports nothing else of the package, so that both files can be loaded without installing it.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch

from .quality import efficiency, l1, psnr, ssim


_DESCRIPTION = "Quality of video frames that are reconstructed from kept patches, and the number of patches."
_INPUTS = """
Args:
    predictions: reconstructed frames, each `(3, height, width)`, pixels in 0..1.
    references: the original frames, in the same format.
    num_patches (*optional*): kept patches of each frame.
    dense_patches (*optional*, 196): patches of a frame for a dense encoder.
    threshold (*optional*): loss that frames should not exceed; losses are `(40 - PSNR) / 20`.
    predicted_losses, measured_losses (*optional*): predicted and measured loss after each kept patch.
    random_loss, greedy_loss (*optional*): mean losses of random patches and of greedy search, for equal numbers of patches.
Returns:
    `psnr` (dB), `ssim`, `l1`, `task_loss`: means over the frames; and for the optional arguments
    `patches_per_frame`, `reduction_factor`, `threshold_share`, `predicted_loss_error` and `efficiency`.
"""
_CITATION = "AutoGaze, arXiv 2603.12254"


class GazeQuality(evaluate.Metric):
    """
    Quality of frames that are reconstructed from kept patches, and the number of patches.

    Example:

    ```python
    >>> import evaluate
    >>> from transformers_autogaze.evaluation import metrics

    >>> metric = evaluate.load(metrics.__file__)  # a path such as src/transformers_autogaze/evaluation/metrics.py
    >>> frames = np.full((2, 3, 16, 16), 0.5, dtype=np.float32)
    >>> result = metric.compute(
    ...     predictions=frames + 0.1, references=frames, num_patches=[7, 21], random_loss=1.5, greedy_loss=0.5
    ... )
    >>> [round(result[key], 4) for key in ("psnr", "task_loss", "l1", "reduction_factor", "efficiency")]
    [20.0, 1.0, 0.1, 14.0, 0.5]

    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        frame = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": frame, "references": frame}),
        )

    def _compute(
        self,
        predictions: Sequence,
        references: Sequence,
        num_patches: Sequence[int] | None = None,
        dense_patches: int = 196,
        threshold: float | None = None,
        predicted_losses: Sequence[float] | None = None,
        measured_losses: Sequence[float] | None = None,
        random_loss: float | None = None,
        greedy_loss: float | None = None,
    ) -> dict[str, float]:
        for one, other in (("predicted_losses", "measured_losses"), ("random_loss", "greedy_loss")):
            if (locals()[one] is None) != (locals()[other] is None):
                raise ValueError(f"`{one}` and `{other}` must be given together")
        if num_patches is not None and len(num_patches) != len(predictions):
            raise ValueError(
                f"`num_patches` must be one number for each of {len(predictions)} frames, got {num_patches}"
            )
        if predicted_losses is not None and len(predicted_losses) != len(measured_losses):
            raise ValueError(
                f"`predicted_losses` must be as many as `measured_losses`, got {len(predicted_losses)} and "
                f"{len(measured_losses)}"
            )

        # Frames may differ in size, so they are measured one by one.
        pairs = [(_frame(rebuilt), _frame(frame)) for rebuilt, frame in zip(predictions, references, strict=True)]
        result = {
            measure.__name__: float(torch.stack([measure(*pair) for pair in pairs]).double().mean())
            for measure in (psnr, ssim, l1)
        }
        losses = [(40 - float(psnr(*pair))) / 20 for pair in pairs]
        result["task_loss"] = float(np.mean(losses))
        if num_patches is not None:
            result["patches_per_frame"] = float(np.mean(num_patches))
            result["reduction_factor"] = dense_patches / result["patches_per_frame"]
        if threshold is not None:
            result["threshold_share"] = float(np.mean([loss <= threshold for loss in losses]))
        if predicted_losses is not None:
            error = np.asarray(predicted_losses, float) - np.asarray(measured_losses, float)
            result["predicted_loss_error"] = float(np.abs(error).mean())
        if random_loss is not None:
            result["efficiency"] = efficiency(result["task_loss"], random_loss, greedy_loss)
        return result


def _frame(values: Sequence) -> torch.Tensor:
    return torch.from_numpy(
        np.stack([np.stack([np.asarray(row, np.float32) for row in channel]) for channel in values])
    )
