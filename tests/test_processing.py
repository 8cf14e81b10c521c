import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from published import SHARED
from safetensors.torch import load_file
from transformers import SiglipConfig, SiglipVisionConfig, SiglipVisionModel, VJEPA2Config
from transformers.utils import is_torchvision_available

from transformers_autogaze import (
    AutoGazeConfig,
    GazeGrid,
    GazeOutput,
    GreedyGazeSelector,
    frame_decoding_autogaze,
    video_processing_autogaze,
)
from transformers_autogaze.integrations import GazeVisionModel
from transformers_autogaze.processing_autogaze import AutoGazeProcessor
from transformers_autogaze.selection_autogaze import resize_frames
from transformers_autogaze.video import write_video
from transformers_autogaze.video_processing_autogaze import AutoGazeVideoProcessor


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def transformers_class(name: str):
    """A class of transformers, or a skip where it needs torchvision, which differs from version to version."""
    cls = getattr(transformers, name)
    if getattr(cls, "is_dummy", False):
        pytest.skip(f"{name} needs torchvision in this version of transformers")
    return cls


def image_processor(name: str = "SiglipImageProcessor", **kwargs):
    """An encoder's image processor that only scales to 0..1, so that its frames can be recognised."""
    options = {"do_resize": False, "do_center_crop": False, "do_normalize": False, "rescale_factor": 1 / 255}
    return transformers_class(name)(**{**options, **kwargs})


def run_without_the_package(script: str, folder: Path) -> str:
    """Runs a script in another interpreter that can load our code from checkpoints only."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys\nsys.modules['transformers_autogaze'] = None\n{script}"],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def gaze():
    """Two clips of two frames, gazed at on grids of 1x1 and 2x2; the first clip has padding inside its first frame."""
    return GazeOutput.from_ids(
        gazing_pos=torch.tensor([[3, 5, 0, 9], [4, 1, 2, 5]]),
        if_padded_gazing=torch.tensor([[False, True, False, False], [False, False, True, False]]),
        num_gazing_each_frame=torch.tensor([3, 1]),
        grid=GazeGrid([16, 32], patch_size=16),
    )


def test_without_an_encoder_it_does_what_the_video_processor_does():
    clip = noise(6, 40, 60, 3)
    ours = AutoGazeProcessor()(videos=clip, num_frames=3, return_tensors="pt", return_metadata=True)
    expected = AutoGazeVideoProcessor()(clip, num_frames=3, return_tensors="pt", return_metadata=True)
    assert ours.keys() == expected.keys() == {"pixel_values_videos", "video_metadata"}
    assert torch.equal(ours["pixel_values_videos"], expected["pixel_values_videos"])
    assert ours["video_metadata"] == expected["video_metadata"]
    assert ours["video_metadata"][0].frames_indices == [0, 2, 4]


def test_encoder_sees_the_same_frames_of_a_video_decoded_once(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", noise(20, 32, 48, 3), fps=10)
    frames, _ = frame_decoding_autogaze.read_video(path, fps=2)
    read = []

    def counting(*args):
        read.append(args)
        return frame_decoding_autogaze.read_video(*args)

    monkeypatch.setattr(video_processing_autogaze, "read_video", counting)
    processor = AutoGazeProcessor(encoder_processor=image_processor())
    out = processor(videos=[path, path], fps=2, return_tensors="pt")
    assert len(read) == 2, "once per video"
    assert out["pixel_values_videos"].shape == (2, 4, 3, 224, 336)
    assert out["encoder_pixel_values"].shape == (2, 4, 3, 32, 48)
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    for clip in out["encoder_pixel_values"]:
        torch.testing.assert_close(clip.float(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["SiglipImageProcessor", "VideoMAEImageProcessor", "VivitImageProcessor"])
def test_pictures_and_clips_are_grouped_by_video(name):
    processor = AutoGazeProcessor(encoder_processor=image_processor(name, offset=False))
    clips = [noise(3, 20, 24, 3, seed=i) for i in range(2)]
    out = processor(videos=clips, return_tensors="pt")
    expected = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3) / 255
    torch.testing.assert_close(out["encoder_pixel_values"].float(), expected, atol=1e-5, rtol=0)


def test_clips_of_unequal_length_are_listed():
    processor = AutoGazeProcessor(encoder_processor=image_processor())
    out = processor(videos=[noise(3, 20, 24, 3), noise(1, 10, 12, 3)])
    assert [len(clip) for clip in out["pixel_values_videos"]] == [3, 1]
    assert [[frame.shape for frame in clip] for clip in out["encoder_pixel_values"]] == [
        [(3, 20, 24)] * 3,
        [(3, 10, 12)],
    ]


def test_outputs_that_are_not_per_picture_are_only_renamed():
    encoder = transformers_class("Qwen2VLImageProcessor")(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    out = AutoGazeProcessor(encoder_processor=encoder)(videos=noise(3, 56, 56, 3), return_tensors="pt")
    assert out["encoder_image_grid_thw"].tolist() == [[[1, 4, 4]] * 3]
    assert out["encoder_pixel_values"].shape == (3 * 16, 3 * 2 * 14 * 14)


def test_video_processors_get_whole_clips():
    encoder = transformers_class("Qwen2VLVideoProcessor")(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    out = AutoGazeProcessor(encoder_processor=encoder)(
        videos=[noise(8, 56, 56, 3)] * 2, num_frames=4, return_tensors="pt"
    )
    assert out["pixel_values_videos"].shape == (2, 4, 3, 224, 224)
    assert out["encoder_video_grid_thw"].tolist() == [[2, 4, 4]] * 2
    assert out["encoder_pixel_values_videos"].shape == (2 * 2 * 16, 3 * 2 * 14 * 14)


def test_thin_frames_reach_the_encoder_upright():
    processor = AutoGazeProcessor(encoder_processor=image_processor())
    clip = noise(2, 5, 3, 3)
    out = processor(videos=clip, return_tensors="pt")
    torch.testing.assert_close(
        out["encoder_pixel_values"][0].float(), torch.from_numpy(clip).permute(0, 3, 1, 2) / 255, atol=1e-5, rtol=0
    )


def test_saved_processor_loads_with_its_encoder(tmp_path):
    transformers_class("AutoImageProcessor")
    clip = noise(5, 30, 40, 3)
    processor = AutoGazeProcessor(
        AutoGazeVideoProcessor(num_frames=2, size={"height": 20, "width": 24}), image_processor(do_normalize=True)
    )
    processor.save_pretrained(tmp_path)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")}
    assert written == {"processor_config.json", "encoder_processor/preprocessor_config.json"}
    again = AutoGazeProcessor.from_pretrained(tmp_path)
    assert (again.video_processor.num_frames, again.encoder_processor.do_resize) == (2, False)
    for key, value in processor(clip, return_tensors="pt").items():
        torch.testing.assert_close(again(clip, return_tensors="pt")[key], value)
    overridden = AutoGazeProcessor.from_pretrained(tmp_path, encoder_processor=image_processor(), num_frames=3)
    assert overridden(clip, return_tensors="pt")["encoder_pixel_values"].shape == (1, 3, 3, 30, 40)
    AutoGazeProcessor(processor.video_processor).save_pretrained(tmp_path)
    assert AutoGazeProcessor.from_pretrained(tmp_path).encoder_processor is None


def test_encoder_can_be_a_processor_for_several_modalities(tmp_path):
    encoder = AutoGazeProcessor(AutoGazeVideoProcessor(size={"height": 8, "width": 8}, do_normalize=False))
    AutoGazeProcessor(encoder_processor=encoder).save_pretrained(tmp_path)
    processor = AutoGazeProcessor.from_pretrained(tmp_path)
    out = processor(videos=noise(6, 20, 30, 3), num_frames=2, return_tensors="pt")
    assert out["pixel_values_videos"].shape == (1, 2, 3, 224, 336)
    assert out["encoder_pixel_values_videos"].shape == (1, 2, 3, 8, 8)


def test_published_folder_loads(tmp_path):
    published = {"size": {"shortest_edge": 64}, "offset": True, "image_processor_type": "AutoGazeImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    processor = AutoGazeProcessor.from_pretrained(tmp_path)
    assert processor(noise(1, 10, 20, 3), return_tensors="pt")["pixel_values_videos"].shape == (1, 1, 3, 64, 128)


def test_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(OSError, match="(?i)can't load video processor"):
        AutoGazeProcessor.from_pretrained(tmp_path)


def test_unknown_auto_class_in_the_configuration_is_refused(tmp_path):
    AutoGazeProcessor(encoder_processor=image_processor()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    config["encoder_processor_auto_class"] = "AutoModel"
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="must be AutoImageProcessor, AutoVideoProcessor or AutoProcessor, got 'AutoModel'"
    ):
        AutoGazeProcessor.from_pretrained(tmp_path)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_encoder_that_needs_torchvision_says_so(tmp_path):
    AutoGazeProcessor(encoder_processor=image_processor()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    config["encoder_processor_auto_class"] = "AutoVideoProcessor"
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="(?i)torchvision"):
        AutoGazeProcessor.from_pretrained(tmp_path)


def test_parts_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="`video_processor` must be an AutoGazeVideoProcessor"):
        AutoGazeProcessor(image_processor())
    with pytest.raises(TypeError, match="`encoder_processor` must be an image processor"):
        AutoGazeProcessor(encoder_processor="google/siglip-base-patch16-224")


@pytest.mark.parametrize("with_encoder", [False, True])
def test_saved_code_loads_through_the_auto_class_without_the_package(tmp_path, with_encoder):
    encoder = with_encoder and transformers_class("AutoImageProcessor") and image_processor()
    processor = AutoGazeProcessor(AutoGazeVideoProcessor(num_frames=2), encoder or None)
    processor.save_pretrained(tmp_path / "first")
    clip = noise(4, 30, 40, 3)
    np.save(tmp_path / "clip.npy", clip)
    # The loaded copy must be as good as the package: it saves itself again, and that is loaded, too.
    out = run_without_the_package(
        """
import numpy as np
from transformers import AutoProcessor
first = AutoProcessor.from_pretrained("first", trust_remote_code=True)
first.save_pretrained("second")
second = AutoProcessor.from_pretrained("second", trust_remote_code=True)
out = second(videos=np.load("clip.npy"), return_tensors="pt")
for key, value in out.items():
    np.save(f"{key}.npy", value.numpy())
print(type(second).__module__.split(".")[:2], type(second.video_processor).__module__.split(".")[:2])
""",
        tmp_path,
    )
    assert out.strip() == "['transformers_modules', 'second'] ['transformers_modules', 'second']"
    for key, value in processor(clip, return_tensors="pt").items():
        np.testing.assert_allclose(np.load(tmp_path / f"{key}.npy"), value, atol=1e-6)


def test_gaze_becomes_records_without_padding(gaze):
    records = AutoGazeProcessor().post_process_gaze(gaze, target_sizes=(100, 200))
    assert json.loads(json.dumps(records)) == [
        [
            {"frame": 0, "scale": 32, "id": 3, "box": [0.0, 50.0, 100.0, 100.0], "order": 0},
            {"frame": 0, "scale": 16, "id": 0, "box": [0.0, 0.0, 200.0, 100.0], "order": 1},
            {"frame": 1, "scale": 32, "id": 4, "box": [100.0, 50.0, 200.0, 100.0], "order": 0},
        ],
        [
            {"frame": 0, "scale": 32, "id": 4, "box": [100.0, 50.0, 200.0, 100.0], "order": 0},
            {"frame": 0, "scale": 32, "id": 1, "box": [0.0, 0.0, 100.0, 50.0], "order": 1},
            {"frame": 1, "scale": 16, "id": 0, "box": [0.0, 0.0, 200.0, 100.0], "order": 0},
        ],
    ]


def test_each_clip_can_have_its_own_size(gaze):
    processor = AutoGazeProcessor()
    both = processor.post_process_gaze(gaze, target_sizes=[(100, 200), (64, 32)])
    assert both[0] == processor.post_process_gaze(gaze, target_sizes=(100, 200))[0]
    assert both[1] == processor.post_process_gaze(gaze, target_sizes=torch.tensor([64, 32]))[1]
    for sizes in ((100,), [(1, 2)] * 3, (0, 5), 7):
        with pytest.raises(ValueError, match="`target_sizes` must be"):
            processor.post_process_gaze(gaze, target_sizes=sizes)


def test_rectangular_scales_are_written_as_lists():
    grid = GazeGrid([(16, 32)], patch_size=16)
    gaze = GazeOutput.from_masks([torch.tensor([[[False, True]]])], grid)
    assert AutoGazeProcessor().post_process_gaze(gaze, (10, 20))[0] == [
        {"frame": 0, "scale": [16, 32], "id": 1, "box": [10.0, 0.0, 20.0, 10.0], "order": 0}
    ]


@pytest.mark.skipif(not (SHARED / "fixtures" / "birds").exists(), reason="the published pixel values are not here")
def test_published_pixel_values_of_a_real_clip_are_reproduced():
    folder = SHARED / "fixtures" / "birds"
    published = load_file(folder / "official.safetensors")
    frames = [Image.open(folder / f"frame_0{index}.png") for index in range(2)]
    processor = AutoGazeProcessor()
    ours = processor(videos=frames, return_tensors="pt")["pixel_values_videos"]
    pixels = [processor.video_processor.to_pixels(values) for values in (ours, published["video"])]
    assert ours.shape == (1, 2, 3, 224, 398)
    assert (pixels[0] - pixels[1]).abs().max() <= 2 / 255
    torch.testing.assert_close(resize_frames(published["video"], 224), published["gazing_model_video"])


@pytest.mark.parametrize("encoder", ["SiglipImageProcessor", "CLIPImageProcessor"])
def test_matched_to_an_encoder_everything_fits_together(tmp_path, encoder):
    """No scale is computed by hand, and gaze and encoder see the same whole frame, a processor that crops included."""
    processor = AutoGazeProcessor(encoder_processor=transformers_class(encoder)())
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=384, patch_size=14
    )
    grid = processor.match_encoder(config)
    assert grid == GazeGrid([56, 112, 196, 392], patch_size=14)
    processor.save_pretrained(tmp_path)
    processor = AutoGazeProcessor.from_pretrained(tmp_path)
    assert processor.gaze_kwargs == {"target_scales": [56, 112, 196, 392], "target_patch_size": 14}

    frames = np.zeros((2, 60, 90, 3), dtype=np.uint8)
    frames[:, :, :45] = 255
    inputs = processor(videos=frames, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == inputs["encoder_pixel_values"].shape == (1, 2, 3, 392, 392)
    for pixels in (inputs["pixel_values_videos"], inputs["encoder_pixel_values"]):
        half = pixels[0, 0, 0].mean(0)
        assert half[:190].min() > half[-190:].max()
    gaze = GreedyGazeSelector().generate(inputs["pixel_values_videos"], gazing_ratio=0.01, **processor.gaze_kwargs)
    tower = GazeVisionModel(SiglipVisionModel(config), scales=grid.scales)
    with torch.no_grad():
        output = tower(inputs["encoder_pixel_values"], gaze)
    assert output.lengths.tolist() == gaze.num_real.tolist()


def test_match_encoder_finds_the_tower_in_a_larger_configuration():
    processor = AutoGazeProcessor()
    assert processor.gaze_kwargs == {}
    processor.match_encoder(SiglipConfig(vision_config={"image_size": 224, "patch_size": 16}))
    assert processor.gaze_kwargs == {"target_scales": [32, 64, 112, 224], "target_patch_size": 16}
    processor.match_encoder(VJEPA2Config(crop_size=256, patch_size=16), GazeGrid([16, 64], patch_size=16))
    assert processor.target_scales == [64, 256]
    with pytest.raises(ValueError, match="`config` must be that of a vision tower.*got AutoGazeConfig"):
        processor.match_encoder(AutoGazeConfig())
    with pytest.raises(ValueError, match="`target_scales` and `target_patch_size` must be given together"):
        AutoGazeProcessor(target_scales=[16])
