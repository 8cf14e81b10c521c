"""
Encodes a video with a SigLIP tower that sees only the gazed patches.

    python examples/encode_with_siglip.py video.mp4
    python examples/encode_with_siglip.py --tiny    # a quick run: random weights, rendered clip

Any tower of docs/integrations.md can replace SigLIP. The default selector chooses the tower's own patches and keeps a quarter of the
clip's tokens; --gaze-model names another selector, such as the published AutoGaze.
"""

import argparse

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from transformers_autogaze import DEFAULT_SELECTOR, AutoGazeProcessor
from transformers_autogaze.integrations import GazeVisionModel
from transformers_autogaze.video.demo import render_demo_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="a path or an http(s) URL")
    parser.add_argument("--tower", default="google/siglip2-base-patch16-224")
    parser.add_argument("--gaze-model", default=DEFAULT_SELECTOR)
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--clip-ratio", type=float, help="share of the tokens to keep (default: the selector's own)")
    parser.add_argument("--tiny", action="store_true", help="a tiny tower with random weights")
    options = parser.parse_args()
    if options.video is None and not options.tiny:
        parser.error("name a video, or --tiny")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower, image_processor = tiny_tower() if options.tiny else load_tower(options.tower)
    selector = AutoModel.from_pretrained(options.gaze_model).eval().to(device)
    # The processor makes the inputs of selector and tower, at the scales that fit the tower.
    processor = AutoGazeProcessor(encoder_processor=image_processor)
    grid = processor.match_encoder(tower.config, selector.config.grid)
    tower = GazeVisionModel(tower, grid.scales).eval().to(device)

    video = render_demo_clip(options.num_frames) if options.video is None else options.video
    inputs = processor(videos=video, num_frames=options.num_frames, return_tensors="pt").to(device)
    gaze = selector.generate(inputs["pixel_values_videos"], clip_ratio=options.clip_ratio, **processor.gaze_kwargs)
    with torch.no_grad():
        output = tower(inputs["encoder_pixel_values"], gaze)

    kept, factor = int(gaze.num_real[0]), float(gaze.reduction_factor[0])
    print(f"{type(selector).__name__}: {kept} patches, {factor:.1f} times fewer than the tower's own")
    print(f"features: {tuple(output.last_hidden_state.shape)}")
    for token in range(min(5, len(output.ids))):
        scale, box = tower.grid.scales[output.scale[token]], [round(side, 2) for side in output.boxes[token].tolist()]
        print(f"  token {token}: frame {int(output.frame[token])}, scale {scale}, box {box} of the frame")


def load_tower(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    return GazeVisionModel.from_pretrained(name).vision_model, AutoImageProcessor.from_pretrained(name)


def tiny_tower() -> tuple[PreTrainedModel, BaseImageProcessor]:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SiglipVisionModel(SiglipVisionConfig(**size, image_size=224)), SiglipImageProcessor()


if __name__ == "__main__":
    main()
