"""
Fine-tunes a vision tower to classify videos by their gazed patches, with transformers' Trainer.

    python examples/finetune_tower.py videos/ -o classifier    # videos/<class>/<name>.mp4
    python examples/finetune_tower.py --tiny -o classifier     # random weights and drawn clips, to see it run

The tower learns, the selector does not. What is saved is the tower as transformers loads it.
"""

import argparse
from pathlib import Path

import torch
import transformers
from torch import nn

from transformers_autogaze import DEFAULT_SELECTOR, AutoGazeProcessor
from transformers_autogaze.demo import render_demo_clip
from transformers_autogaze.integrations import GazeVisionModel


class GazedClassifier(nn.Module):
    """Classifies a clip by the mean of its kept patches' features."""

    def __init__(self, tower: GazeVisionModel, selector: nn.Module, num_classes: int, gaze_kwargs: dict):
        super().__init__()
        self.tower, self.head = tower, nn.Linear(tower.hidden_size, num_classes)
        self.selector, self.gaze_kwargs = selector.requires_grad_(False), gaze_kwargs

    def forward(self, pixel_values_videos, encoder_pixel_values, labels):
        gaze = self.selector.generate(pixel_values_videos, clip_ratio=0.25, **self.gaze_kwargs)
        features = self.tower(encoder_pixel_values, gaze).split()
        logits = self.head(torch.stack([feature.mean(0) for feature in features]))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="?", type=Path, help="a folder with one folder of videos for each class")
    parser.add_argument("-o", "--output", default="classifier")
    parser.add_argument("--tower", default="google/siglip2-base-patch16-224")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a tiny tower with random weights")
    options = parser.parse_args()
    if options.videos is None and not options.tiny:
        parser.error("name a folder of videos, or --tiny")

    if options.tiny:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision_model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**size))
        image_processor, learning_rate, num_classes = transformers.SiglipImageProcessor(), 1e-3, 2
        clips = [render_demo_clip(options.num_frames, 64, 64, seed) for seed in range(4)]
        videos = [(clip if label else clip[:, ::-1].copy(), label) for clip in clips for label in range(2)]
    else:
        vision_model = GazeVisionModel.from_pretrained(options.tower).vision_model
        image_processor = transformers.AutoImageProcessor.from_pretrained(options.tower)
        classes = sorted(folder for folder in options.videos.iterdir() if folder.is_dir())
        videos = [(str(path), label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]
        learning_rate, num_classes = 2e-5, len(classes)
    processor = AutoGazeProcessor(encoder_processor=image_processor)
    selector = transformers.AutoModel.from_pretrained(DEFAULT_SELECTOR)
    tower = GazeVisionModel(vision_model, processor.match_encoder(vision_model.config, selector.config.grid).scales)

    def collate(examples: list[tuple]) -> dict[str, torch.Tensor]:
        clips, labels = zip(*examples, strict=True)
        inputs = processor(videos=list(clips), num_frames=options.num_frames, return_tensors="pt")
        return {**inputs, "labels": torch.tensor(labels)}

    arguments = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": learning_rate}
    arguments = {**arguments, "remove_unused_columns": False, "report_to": "none", "logging_steps": 1}
    arguments = transformers.TrainingArguments(options.output, **arguments)
    model = GazedClassifier(tower, selector, num_classes, processor.gaze_kwargs)
    transformers.Trainer(model, arguments, train_dataset=videos, data_collator=collate).train()
    tower.vision_model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
