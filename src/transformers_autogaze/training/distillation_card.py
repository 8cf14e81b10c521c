"""The card of a distilled selector: what it was made from and how, and what it is worth, from the facts of the run."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import EvalResult

from ..hub.model_cards import TASK, card_metadata
from .distillation import DistillationArguments


_TEXT = """# A selector distilled from {encoder}

A small network that foresees what the vision encoder {encoder} would make of every place of a frame, and a search on what it
foresees: it tells which patches of a video the encoder needs to see, before the encoder runs. Made by `autogaze distill` of
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
| vector of a place | {num_components} principal components of the encoder's last features, {explained:.1%} of their variance, each divided by its deviation to the power {whitening:g} |

## Training

| | |
| --- | --- |
| encoder | {encoder}, patches of {patch_size} pixels, every scale alone |
| files | {videos} videos, {pictures} pictures |
| crops | {train_crops} to train on, {eval_crops} of {num_held_out} other files to measure on |
| steps | {steps}, of {batch} crops |
| AdamW | learning rate {learning_rate:g}, {lr_scheduler_type}; weight decay {weight_decay:g} |
| loss | finest scale 1, each other {coarse_loss_weight:g}, change between two crops of a place {change_loss_weight:g} |
| precision | {precision} |
| time | {teacher_seconds:.0f} s for crops and features, {train_seconds:.0f} s of training; {processes} processes of {threads} threads on {device} |
| seed | {seed} |

## What it foresees

On the files that were not trained on ({held_out}): the share of the encoder's variance (R2) that the network foresees is
{r2} at {scales} patches a side; of what changes between the two crops of a pair, {change_r2:.3f}.

`task_loss_requirement` is the share of the encoder's feature variance that a frame may lose. What the network foretells of it
is corrected by what the encoder lost on whole clips, gazed at with thresholds, finest scale only. Clips of the files that were not
trained on count half, those of the others the other half, so on videos unlike all of these more may be lost than is named:

| foretold | {knots_foretold} |
| --- |{rule}
| measured | {knots_measured} |
"""


def make_card(args: DistillationArguments, facts: Mapping[str, Any], credits: str | None = None) -> str:
    """
    Makes the card, `README.md` of the checkpoint.

    Args:
        args ([`DistillationArguments`]): the arguments of the run.
        facts (`Mapping`): what the run found out.
        credits (`str`, *optional*): what it says of data and licences, in Markdown.

    Returns:
        `str`: the card in Markdown.
    """
    foretold, measured = zip(*facts["knots"], strict=True)
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
            "rule": " --- |" * len(foretold),
            "knots_foretold": " | ".join(f"{value:.3f}" for value in foretold),
            "knots_measured": " | ".join(f"{value:.3f}" for value in measured),
        }
    )
    if credits:
        text += f"\n## Data, licences and credits\n\n{credits.strip()}\n"
    encoder = facts["encoder"]
    metadata = card_metadata(
        f"A selector distilled from {encoder}",
        tags=["distillation"],
        base_model=encoder if "/" in encoder else None,  # the name of a folder is no repository
        results=_results(facts),
    )
    return f"{metadata}\n{text}"


def _results(facts: Mapping[str, Any]) -> list[EvalResult]:
    """Returns what was measured on the held-out files, in the form of the Hub."""
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
