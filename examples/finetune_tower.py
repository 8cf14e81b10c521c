"""
Fine-tunes a vision tower to classify videos by the mean feature of their gazed patches, with transformers' Trainer.

    python examples/finetune_tower.py videos/ -o classifier    # videos/<class>/<name>.mp4
    python examples/finetune_tower.py --tiny -o classifier     # a quick run: random weights, rendered clips

The tower and the head are trained; the default selector, on the tower's own patches, is not. Saves the tower with the names of the
classes, its processor, and the weights of the head, head.safetensors.
"""

import argparse
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from transformers_autogaze import DEFAULT_SELECTOR, AutoGazeProcessor
from transformers_autogaze.integrations import GazeVisionModel
from transformers_autogaze.video.demo import render_demo_clip


class GazedClassifier(nn.Module):
    def __init__(self, vision_model: nn.Module, processor: AutoGazeProcessor):
        super().__init__()
        self.selector = transformers.AutoModel.from_pretrained(DEFAULT_SELECTOR).requires_grad_(False)
        grid = processor.match_encoder(vision_model.config, self.selector.config.grid)
        self.tower, self.gaze_kwargs = GazeVisionModel(vision_model, grid.scales), processor.gaze_kwargs
        self.head = nn.Linear(self.tower.hidden_size, vision_model.config.num_labels)

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
        tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**size))
        image_processor, classes = transformers.SiglipImageProcessor(), ["upright", "upside down"]
        clips = [render_demo_clip(options.num_frames, 64, 64, seed) for seed in range(4)]
        videos = [(clip[:, ::-1].copy() if label else clip, label) for clip in clips for label in range(2)]
    else:
        tower = GazeVisionModel.from_pretrained(options.tower).vision_model
        image_processor = transformers.AutoImageProcessor.from_pretrained(options.tower)
        classes = sorted(folder.name for folder in options.videos.iterdir() if folder.is_dir())
        videos = [(str(p), k) for k, name in enumerate(classes) for p in sorted((options.videos / name).iterdir())]
    tower.config.id2label = dict(enumerate(classes))
    model = GazedClassifier(tower, processor := AutoGazeProcessor(encoder_processor=image_processor))

    def collate(examples: list[tuple]) -> dict[str, torch.Tensor]:
        clips, labels = zip(*examples, strict=True)
        inputs = processor(videos=list(clips), num_frames=options.num_frames, return_tensors="pt")
        return {**inputs, "labels": torch.tensor(labels)}

    rate = {"per_device_train_batch_size": 4, "learning_rate": 1e-3 if options.tiny else 2e-5, "logging_steps": 1}
    arguments = transformers.TrainingArguments(options.output, remove_unused_columns=False, report_to="none", **rate)
    transformers.Trainer(model, arguments, train_dataset=videos, data_collator=collate).train()
    tower.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    save_file(model.head.state_dict(), Path(options.output) / "head.safetensors")
    print(f"{type(model.selector).__name__}; tower, head and processor in {options.output}")


if __name__ == "__main__":
    main()
