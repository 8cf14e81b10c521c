"""
Trains a gaze model on a folder of videos (stage 1): random clips, which are labelled by greedy search during training.

    python examples/finetune.py videos/ -o trained                        # from random weights
    python examples/finetune.py videos/ --model checkpoint -o trained     # from a checkpoint, a folder or a Hub repository
    python examples/finetune.py --tiny -o trained                         # a quick run: tiny model, rendered clips
"""

import argparse

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeVideoProcessor
from transformers_autogaze.training import (
    AutoGazeTrainer,
    AutoGazeTrainingArguments,
    BudgetSchedule,
    ClipAugmentation,
    GazeClipDataset,
)
from transformers_autogaze.video.demo import render_demo_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="?", help="a folder of videos")
    parser.add_argument("--model", help="checkpoint to start from (default: random weights)")
    parser.add_argument("-o", "--output", default="trained")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    options = parser.parse_args()
    if options.videos is None and not options.tiny:
        parser.error("name a folder of videos, or --tiny")

    processor, videos = AutoGazeVideoProcessor(), options.videos
    if options.tiny:
        decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = {"hidden_size": 32, "output_size": 32}
        config = AutoGazeConfig(scales=[32, 64], image_size=64, vision_config=vision, decoder_config=decoder)
        model = AutoGazeModel(config)
        videos = [render_demo_clip(8, 64, 64, seed) for seed in range(4)]
        options.num_frames, options.max_steps = 4, 3
    elif options.model is None:
        model = AutoGazeModel(AutoGazeConfig())
    else:
        model = AutoGazeModel.from_pretrained(options.model, dtype="float32")
        processor = AutoGazeVideoProcessor.from_pretrained(options.model)

    clips = {"config": model.config, "num_frames": options.num_frames, "processor": processor}
    arguments = AutoGazeTrainingArguments(
        options.output,
        max_steps=options.max_steps,
        per_device_train_batch_size=2 if options.tiny else 8,
        on_policy=0.5,  # the model sees its own choices in half of the batches
        logging_steps=1 if options.tiny else 10,
        report_to="none",
    )
    trainer = AutoGazeTrainer(
        model,
        arguments,
        processing_class=processor,
        train_dataset=GazeClipDataset(videos, schedule=BudgetSchedule(), augmentation=ClipAugmentation(), **clips),
        eval_dataset=GazeClipDataset(videos, schedule=BudgetSchedule(), **clips),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    trainer.save_model()


if __name__ == "__main__":
    main()
