"""
Trains a gaze model on gazes that it samples itself (stage 2), with rewards for good reconstructions.

    python examples/grpo.py checkpoint videos/ -o trained    # a checkpoint of stage 1, a folder of videos
    python examples/grpo.py --tiny -o trained                # a quick run: random weights, rendered clips

Rewards come from the closed-form reconstruction; the trainer's argument `reconstruction` sets another one.
"""

import argparse

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeVideoProcessor
from transformers_autogaze.training import ClipAugmentation, GazeClipDataset
from transformers_autogaze.training.grpo import AutoGazeGRPOConfig, AutoGazeGRPOTrainer
from transformers_autogaze.video.demo import render_demo_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub repository of a gaze model")
    parser.add_argument("videos", nargs="?", help="a folder of videos")
    parser.add_argument("-o", "--output", default="trained")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    options = parser.parse_args()
    if options.videos is None and not options.tiny:
        parser.error("name a checkpoint and a folder of videos, or --tiny")

    if options.tiny:
        decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = {"hidden_size": 32, "output_size": 32}
        config = AutoGazeConfig(scales=[32, 64], image_size=64, vision_config=vision, decoder_config=decoder)
        model, processor = AutoGazeModel(config), AutoGazeVideoProcessor()
        videos = [render_demo_clip(8, 64, 64, seed) for seed in range(4)]
        options.num_frames, options.max_steps = 4, 2
    else:
        model = AutoGazeModel.from_pretrained(options.model, dtype="float32")
        processor = AutoGazeVideoProcessor.from_pretrained(options.model)
        videos = options.videos
    clips = {"config": model.config, "num_frames": options.num_frames, "processor": processor}

    arguments = AutoGazeGRPOConfig(
        options.output,
        max_steps=options.max_steps,
        per_device_train_batch_size=1,  # clips, each with a group of gazes
        gradient_accumulation_steps=4,
        ratio_min=0.25,
        ratio_max=0.25,
        logging_steps=1 if options.tiny else 10,
        report_to="none",
    )
    trainer = AutoGazeGRPOTrainer(
        model,
        arguments,
        processing_class=processor,
        train_dataset=GazeClipDataset(videos, augmentation=ClipAugmentation(), **clips),
        eval_dataset=GazeClipDataset(videos, **clips),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"reconstruction loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    trainer.save_model()


if __name__ == "__main__":
    main()
