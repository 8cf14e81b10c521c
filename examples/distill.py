"""
Distils a selector from any vision encoder: a small network learns to predict the encoder's features.

    python examples/distill.py facebook/dinov2-small videos/ pictures/ -o gaze   # 2,000 steps
    python examples/distill.py --tiny -o gaze                                    # a quick run: tiny encoder, rendered clips
"""

import argparse
from pathlib import Path

from transformers import AutoModel, Dinov2Config, Dinov2Model

from transformers_autogaze import AutoGazeProcessor, write_video
from transformers_autogaze.training import DistillationArguments, distill
from transformers_autogaze.video.demo import render_demo_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", nargs="?", help="an image tower, a folder or a Hub repository")
    parser.add_argument("inputs", nargs="*", help="videos and pictures, or folders of them")
    parser.add_argument("-o", "--output", default="gaze")
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--bf16", action="store_true", help="two to three times faster where the hardware has it")
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder with random weights")
    options = parser.parse_args()
    if options.tiny == bool(options.inputs) or (options.tiny and options.encoder):
        parser.error("name an encoder and videos or pictures, or --tiny alone")

    arguments = {"output_dir": options.output, "max_steps": options.max_steps, "bf16": options.bf16}
    if options.tiny:
        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
        )
        folder = Path(options.output, "tiny")
        options.encoder = folder / "encoder"
        Dinov2Model(config).save_pretrained(options.encoder)
        options.inputs = [
            write_video(folder / f"clip{seed}.mp4", render_demo_clip(8, 64, 96, seed), fps=8) for seed in range(3)
        ]
        arguments |= {"scales": [2, 4], "num_components": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1]}
        arguments |= {"crops_per_video": 8, "max_steps": min(3, options.max_steps), "logging_steps": 1}

    distill(options.encoder, options.inputs, DistillationArguments(report_to="none", **arguments))

    model = AutoModel.from_pretrained(options.output).eval()
    processor = AutoGazeProcessor.from_pretrained(options.output)
    inputs = processor(videos=options.inputs[0], num_frames=8, return_tensors="pt")
    gaze = model.generate(**inputs, clip_ratio=0.25)
    print(
        f"{type(model).__name__}: kept {gaze.statistics()['num_patches']} patches of {inputs['pixel_values_videos'].shape[1]} frames"
    )


if __name__ == "__main__":
    main()
