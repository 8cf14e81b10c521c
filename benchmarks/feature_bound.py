"""
Computes an upper bound on the similarity to an encoder's features for any choice of a number of patches.

The optimal choice is made from the encoder's features of whole frames and maximises their cosine similarity (see `ClipSchedule`;
between two prices the bound is linear). Prints means over the clips of `autogaze evaluate --encoder`: `bound`, where kept patches
have their features from whole frames; `canvas`, for the same patches without the others (`attention="canvas"`); `pixels`, for
patches chosen by pixels, with the features of whole frames; and `evs`.

    python benchmarks/feature_bound.py --encoder dinov2-small --videos val/*.mp4 -o feature_bound.json
"""

import argparse
import json
from pathlib import Path

import torch
from measurement import DTYPES
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from transformers_autogaze import FINEST_SELECTOR, AutoGazeVideoProcessor, GazeOutput, GazeSelector
from transformers_autogaze.clip_schedule_autogaze import ClipSchedule
from transformers_autogaze.evaluation.feature_clips import SAMPLINGS, encoder_normalization, read_clips
from transformers_autogaze.evaluation.feature_comparison import FeatureComparison
from transformers_autogaze.evaluation.features import FeatureMeasure, canvas_features, dense_features, keep_dissimilar
from transformers_autogaze.grid_autogaze import GazeGrid
from transformers_autogaze.integrations import GazeVisionModel


UNIT = 2**-28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--videos", type=Path, nargs="+", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1 / 12, 1 / 8, 1 / 4, 1 / 3])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("-o", "--output", type=Path, default=Path("feature_bound.json"))
    options = parser.parse_args()

    tower = GazeVisionModel.from_pretrained(options.encoder, dtype=DTYPES[options.dtype], attention="canvas").eval()
    size = 14 * tower.grid.patch_size
    tower = GazeVisionModel(tower.vision_model, [size], attention="canvas").requires_grad_(False)
    processor = encoder_normalization(options.encoder, AutoConfig.from_pretrained(options.encoder).model_type)
    pixels = AutoModel.from_pretrained(FINEST_SELECTOR)
    rows = []
    for sampling in SAMPLINGS:
        clips = [clip for video in options.videos for clip in read_clips(video, size, sampling)]
        mean = FeatureComparison(tower.vision_model, processor, {}, size).feature_statistics(clips)[sampling].mean
        for clip in clips:
            values = processor.to_pixel_values(clip.levels)
            choices = choose_by_pixels(pixels, clip.levels, tower.grid, options.budgets)
            measured = measure(tower, values, torch.tensor(mean), choices)
            rows += [{"clip": clip.name, "sampling": sampling, **row} for row in measured]
        for budget in options.budgets:
            of_budget = [row for row in rows if (row["sampling"], row["budget"]) == (sampling, budget)]
            means = {
                key: sum(row[key] for row in of_budget) / len(of_budget)
                for key in ("bound", "canvas", "pixels", "evs")
            }
            print(f"{sampling:<12} {budget:.4f} ", *(f"{key} {value:.4f}" for key, value in means.items()), flush=True)
    options.output.write_text(json.dumps({"dtype": options.dtype, "rows": rows}, indent=1) + "\n")


@torch.no_grad()
def choose_by_pixels(
    selector: GazeSelector, levels: torch.Tensor, grid: GazeGrid, budgets: list[float]
) -> dict[float, GazeOutput]:
    """Chooses patches of a clip by pixels, for every budget."""
    values = AutoGazeVideoProcessor().to_pixel_values(levels)[None]
    count = len(levels) * grid.num_patches
    target = {"target_scales": grid.scales, "target_patch_size": grid.patch_size}
    return {
        budget: selector.generate(values, tokens_per_clip=int(budget * count + 1e-6), **target) for budget in budgets
    }


@torch.no_grad()
def measure(
    tower: GazeVisionModel, values: torch.Tensor, mean: torch.Tensor, by_pixels: dict[float, GazeOutput]
) -> list[dict[str, float]]:
    """Measures one clip at every budget."""
    dense = dense_features(tower, values)
    score = FeatureMeasure(dense, mean)
    # For unit vectors, the cosine is 1 minus half the squared distance; before anything is kept, it is 0.
    unit_features = F.normalize(dense - score.mean, dim=-1)
    start = torch.zeros_like(unit_features[:1])
    schedule = ClipSchedule([*unit_features[:, None]], start, torch.full(start.shape[:2], 1 / UNIT).double(), UNIT)

    def keep(price: float) -> torch.Tensor:
        return schedule.gains(torch.tensor([price / UNIT]).double())[0] > -torch.inf

    def cosine(gaze: GazeOutput, features: torch.Tensor | None = None) -> float:
        features = dense[gaze.gazing_mask[-1][0]] if features is None else features
        return score(canvas_features(features, gaze, score.mean)).cosine

    rows = []
    for budget, pixels in by_pixels.items():
        count = int(budget * dense.shape[0] * dense.shape[1] + 1e-6)
        low, high = 0.0, 4.0 * len(dense)
        for _ in range(30):
            price = (low + high) / 2
            low, high = (price, high) if int(keep(price).sum()) > count else (low, price)
        kept = keep(high)
        gaze = GazeOutput.from_masks([kept[None]], tower.grid)
        spare = (count - int(kept.sum())) * high / 2 / kept.numel()
        rows.append(
            {
                "budget": budget,
                "bound": cosine(gaze) + spare,
                "canvas": cosine(gaze, tower(values[None], gaze).last_hidden_state.float()),
                # The gaze is in the order of places, like the features.
                "pixels": cosine(GazeOutput.from_masks(pixels.gazing_mask, tower.grid)),
                "evs": cosine(keep_dissimilar(dense, count, tower.grid)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
