"""The model card of a distilled selector, made from the facts of its run."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import EvalResult

from ..hub.model_cards import TASK, card_metadata
from .distillation_trainer import DistillationArguments


_TEXT = """# A selector distilled from {encoder}

A small network predicts the features of the vision encoder {encoder} at every place of a frame, and a search on the predictions
chooses the patches of a video that the encoder needs, before the encoder runs. Made by `autogaze distill` of
`transformers-autogaze`.

## Use

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("path/to/this/folder", trust_remote_code=True)
gaze = model.generate(**processor(videos="video.mp4", num_frames=16, return_tensors="pt"), clip_ratio=0.25)
```

## The network

| | |
| --- | --- |
| parameters | {parameters:,}, in float16 |
| channels and blocks of its stages | {hidden_sizes}; {depths} |
| scales | {scales} patches a side |
| vector of a place | {num_components} principal components of the encoder's last features, {explained:.1%} of their variance, each divided by its standard deviation to the power {whitening:g} |

## Training

| | |
| --- | --- |
| encoder | {encoder}, patches of {patch_size} pixels, every scale alone |
| files | {videos} videos, {pictures} pictures |
| crops | {train_crops} for training, {eval_crops} of {num_held_out} other files for evaluation |
| steps | {steps}, of {batch} crops |
| AdamW | learning rate {learning_rate:g}, {lr_scheduler_type}; weight decay {weight_decay:g} |
| weights of the loss | finest scale 1, each other scale {coarse_loss_weight:g}, change between two crops of a place {change_loss_weight:g} |
| precision | {precision} |
| time | {teacher_seconds:.0f} s for crops and features, {train_seconds:.0f} s of training, in the last run; processes: {processes}, threads of each: {threads}, device: {device} |
| seed | {seed} |

## Quality of the predictions

On the files that were not trained on ({held_out}), the network predicts this share of the variance of the encoder's features (R2):
{r2} at {scales} patches a side, and {change_r2:.3f} of the change between the two crops of a pair.

`task_loss_requirement` is the share of the encoder's feature variance that a frame may lose. The network's predictions of it are
corrected by the losses measured on whole clips with thresholds, at the finest scale only. Clips of files that were not trained on
and clips of the others have equal weight, so the loss can exceed the threshold on videos that differ from all of these:

| predicted | {knots_predicted} |
| --- |{rule}
| measured | {knots_measured} |
"""


def make_card(args: DistillationArguments, facts: Mapping[str, Any], credits: str | None = None) -> str:
    """
    Makes the model card, `README.md` of the checkpoint.

    Args:
        args ([`DistillationArguments`]): the arguments of the run.
        facts (`Mapping`): facts and results of the run.
        credits (`str`, *optional*): section on data and licences, in Markdown.

    Returns:
        `str`: the card in Markdown.
    """
    predicted, measured = zip(*facts["knots"], strict=True)
    text = _TEXT.format(
        **{
            **facts,
            **{name: getattr(args, name) for name in ("num_components", "whitening", "learning_rate", "weight_decay")},
            **{name: getattr(args, name) for name in ("coarse_loss_weight", "change_loss_weight", "seed")},
            **{name: ", ".join(map(str, getattr(args, name))) for name in ("hidden_sizes", "depths", "scales")},
            "lr_scheduler_type": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            "train_crops": facts["crops"][0],
            "eval_crops": facts["crops"][1],
            "num_held_out": len(facts["held_out"]),
            "held_out": ", ".join(facts["held_out"]),
            "batch": 2 * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "precision": "bfloat16 products" if args.bf16 else "float16 products" if args.fp16 else "float32",
            "processes": args.world_size,
            "threads": torch.get_num_threads(),
            "device": args.device.type,
            "r2": ", ".join(f"{value:.3f}" for value in facts["r2"]),
            "rule": " --- |" * len(predicted),
            "knots_predicted": " | ".join(f"{value:.3f}" for value in predicted),
            "knots_measured": " | ".join(f"{value:.3f}" for value in measured),
        }
    )
    if credits:
        text += f"\n## Data, licences and credits\n\n{credits.strip()}\n"
    encoder = facts["encoder"]
    metadata = card_metadata(
        f"A selector distilled from {encoder}",
        tags=["distillation"],
        base_model=encoder if "/" in encoder else None,  # otherwise it is the name of a folder
        results=_results(facts),
    )
    return f"{metadata}\n{text}"


def _results(facts: Mapping[str, Any]) -> list[EvalResult]:
    """Returns the results on the held-out files, in the Hub's format."""
    values = {
        "R2 of the encoder's features, finest scale": facts["r2"][-1],
        "R2 of what changes between two crops of a place": facts["change_r2"],
    }
    return [
        EvalResult(
            task_type=TASK,
            dataset_type="files",
            dataset_name=f"{len(facts['held_out'])} files that were not trained on",
            metric_type="r_squared",
            metric_name=name,
            metric_value=round(float(value), 3),
        )
        for name, value in values.items()
        if math.isfinite(value)
    ]
