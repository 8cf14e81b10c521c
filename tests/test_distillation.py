import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    set_seed,
)

from transformers_autogaze import AutoGazeProcessor, GazeGrid
from transformers_autogaze.cli import main
from transformers_autogaze.feature_network_autogaze import FeatureGazeConfig, FeatureGazeNetwork
from transformers_autogaze.training import DistillationArguments, DistillationTrainer, distill
from transformers_autogaze.training.augmentation import vary_light
from transformers_autogaze.training.calibration import ascending_knots, keep_to_threshold
from transformers_autogaze.training.crops import Source, cut_pairs, find_sources
from transformers_autogaze.training.distill import choose_held_out
from transformers_autogaze.training.distillation_trainer import CropPairDataset
from transformers_autogaze.training.teacher_features import Components, TeacherFeatures
from transformers_autogaze.training.teachers import FeatureTeacher, load_teacher
from transformers_autogaze.video import write_video
from transformers_autogaze.video.demo import render_demo_clip


SMALL = (
    "--scales 2 4 --num-components 8 --hidden-sizes 8 8 16 --depths 1 1 1 --crops-per-video 8 --crops-per-picture 4"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two short videos and two pictures, one of them in a folder inside."""
    folder = tmp_path_factory.mktemp("files")
    for seed in range(2):
        write_video(folder / f"clip{seed}.mp4", render_demo_clip(6, 64, 96, seed), fps=6)
    (folder / "inside").mkdir()
    for name, seed in (("a.png", 2), ("inside/b.webp", 3)):
        Image.fromarray(render_demo_clip(2, 96, 120, seed)[0]).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny DINOv2, whose weights are large enough that its features depend on what it sees."""
    folder = tmp_path_factory.mktemp("encoder")
    set_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    set_seed(0)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor().save_pretrained(folder)
    return folder


def save_qwen(folder, family):
    """Saves a tiny Qwen-VL, whose merge units have 8 pixels a side."""
    set_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 32}
    text = {**tiny, "vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {**tiny, "depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).save_pretrained(
            folder
        )
    else:
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=64**2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen2_5_vl(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


def run(encoder, inputs, output, *arguments):
    settings = f"{SMALL} --max-steps 2 --use-cpu --report-to none --disable-tqdm True"
    return main(
        ["distill", str(encoder), *map(str, inputs), "-o", str(output), *settings.split(), *map(str, arguments)]
    )


def filled(encoder, files, folder=None, scales=(2, 4), num_pairs=4, **kwargs):
    sources = find_sources([files])
    teacher = load_teacher(encoder, scales)
    return TeacherFeatures(teacher, sources, [num_pairs] * len(sources), 8, folder, **kwargs)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_qwen_teacher_returns_the_features_of_its_tower(request, family):
    folder = request.getfixturevalue(family)
    teacher = load_teacher(folder, [2, 4])
    assert teacher.grid == GazeGrid([16, 32], patch_size=8)
    levels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    features = teacher(levels)
    assert features.shape == (2, 4 + 16, 24)
    mllm = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = Qwen2VLImageProcessor.from_pretrained(folder)(list(levels), return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    with torch.no_grad():
        expected = mllm.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    expected = getattr(expected, "pooler_output", None) if not isinstance(expected, tuple) else expected[0]
    torch.testing.assert_close(features[:, 4:].flatten(0, 1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(teacher(levels, [1]), features[:, 4:], atol=1e-5, rtol=1e-5)
    is_kept = torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(teacher.encode_kept(levels, is_kept), expected, atol=1e-4, rtol=1e-4)
    is_kept[1, 3:] = False  # units of the second frame attend to those of the first at places without a kept unit
    kept = teacher.encode_kept(levels, is_kept)
    assert kept.shape == (19, 24) and not torch.allclose(kept[16:], expected[16:19], atol=1e-4)
    torch.testing.assert_close(kept[:16], expected[:16], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["encoder", "siglip", "qwen2_5_vl", "qwen3_vl"])
def test_a_selector_can_be_distilled_from_any_encoder(request, files, tmp_path, family):
    pytest.importorskip("accelerate")
    (tmp_path / "credits.md").write_text("Thanks to all.")
    inputs = [files / "clip*.mp4", files / "inside", files / "a.png"]
    assert run(request.getfixturevalue(family), inputs, tmp_path / "out", "--credits", tmp_path / "credits.md") == 0
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == torch.float32
    processor = AutoGazeProcessor.from_pretrained(tmp_path / "out")
    gaze = model.generate(**processor(videos=str(files / "clip0.mp4"), return_tensors="pt"), clip_ratio=0.5)
    assert int(gaze.num_real.sum()) == 6 * 16 // 2
    config = model.config
    assert config.scale_factors == [0.5, 1.0] and config.feature_size == 8
    for of_knots in zip(*config.loss_knots, strict=True):
        assert list(of_knots) == sorted(set(of_knots))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 videos, 2 pictures" in card and "| steps | 2, of 24 crops |" in card and "Thanks to all." in card
    for _, measured in config.loss_knots:
        assert f" {measured:.3f} |" in card


def test_a_selector_can_be_distilled_from_pictures_alone(encoder, files, tmp_path):
    pytest.importorskip("accelerate")
    assert run(encoder, [files / "a.png", files / "inside"], tmp_path / "out") == 0
    assert len(AutoModel.from_pretrained(tmp_path / "out").config.loss_knots) > 1
    assert "0 videos, 2 pictures" in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_output_is_an_error(encoder, files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    assert main(["distill", str(encoder), str(files), *SMALL.split(), "--max-steps", "1", "--use-cpu"]) == 2
    assert "`--output` must name a folder to write to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_is_resumed_bit_equal(encoder, files, tmp_path):
    pytest.importorskip("accelerate")
    arguments = ["--cache-dir", tmp_path / "cache", "--save-steps", "1"]
    assert run(encoder, [files], tmp_path / "one", *arguments) == 0
    resumed = ["--resume-from-checkpoint", tmp_path / "one" / "checkpoint-1"]
    assert run(encoder, [files], tmp_path / "two", *arguments, *resumed) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_loss_falls_and_bfloat16_learns_the_same(encoder, files, tmp_path):
    pytest.importorskip("accelerate")
    features = filled(encoder, files).fill()
    losses = {}
    for bf16 in (False, True):
        set_seed(0)
        arguments = {"scales": [2, 4], "num_components": 8, "hidden_sizes": [16, 16, 32], "depths": [1, 1, 1]}
        args = DistillationArguments(
            str(tmp_path),
            max_steps=25,
            warmup_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            bf16=bf16,
            learning_rate=5e-3,
            save_strategy="no",
            **arguments,
        )
        pairs = CropPairDataset(features, range(4))
        trainer = DistillationTrainer(
            FeatureGazeNetwork(args.network_config()), args, train_dataset=pairs, eval_dataset=pairs
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses[bf16] = trainer.evaluate()["eval_loss"] / before
    assert losses[False] < 0.8 and losses[True] == pytest.approx(losses[False], abs=0.1)


def test_features_are_computed_once_and_resumed(encoder, files, tmp_path, monkeypatch):
    complete = filled(encoder, files, num_pairs=6).fill()
    seen = []
    call = FeatureTeacher.__call__

    def count(self, levels):
        seen.append(len(levels))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return call(self, levels)

    monkeypatch.setattr(FeatureTeacher, "__call__", count)
    with pytest.raises(KeyboardInterrupt):
        filled(encoder, files, tmp_path, num_pairs=6).fill()
    assert sum(seen) == 4 * 8 + 2 * 4
    features = filled(encoder, files, tmp_path, num_pairs=6).fill()
    assert sum(seen) == len(features) + 4
    for name in ("levels", "features"):
        np.testing.assert_allclose(getattr(features, name), getattr(complete, name), atol=2e-3)
    again = len(seen)
    np.testing.assert_array_equal(filled(encoder, files, tmp_path, num_pairs=6).fill().features, features.features)
    assert len(seen) == again


def test_two_processes_compute_the_features_of_one(encoder, files, tmp_path):
    """Each its part of the sources; in turn here, so the second opens what the first has made."""
    one = filled(encoder, files).fill()
    first, second = (filled(encoder, files, tmp_path, process=(number, 2)) for number in (0, 1))
    for index in (1, 3):  # The first process needs these rows for the components.
        second._fill_source(0, index, _NoProgress())
        second.done[0, index] = 1
    first.fill()
    np.testing.assert_allclose(second.fill().features, one.features, atol=2e-3)


class _NoProgress:
    def update(self, count):
        pass


def test_a_cache_of_another_encoder_or_setting_is_an_error(encoder, siglip, files, tmp_path):
    filled(encoder, files, tmp_path / "cache")
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="features of another run: encoder is .* give another folder, or delete"):
        filled(siglip, files, tmp_path / "cache")
    with pytest.raises(ValueError, match="encoder"):
        filled(other, files, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"grids is \[\[2, 2\], \[4, 4\]\] there"):
        filled(encoder, files, tmp_path / "cache", scales=[4])
    with pytest.raises(ValueError, match="inputs"):
        filled(encoder, files / "inside", tmp_path / "cache")
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        filled(encoder, files, tmp_path / "cache", seed=1)
    with pytest.raises(ValueError, match="`cache_size_gb` is 0.0001, but 32 crops of 64x64 pixels and their features"):
        filled(encoder, files, tmp_path / "small", max_gigabytes=1e-4)
    assert not (tmp_path / "small").exists()


def test_vectors_have_length_one_and_keep_the_order_of_distances(encoder, files):
    features = filled(encoder, files, num_pairs=8).fill()
    pairs = CropPairDataset(features, range(4), whitening=0.0)
    vectors = torch.stack([pairs[index]["vectors"] for index in range(len(pairs))]).flatten(0, 1)
    assert vectors.shape == (64, 2, 8, 4, 4)
    assert float(vectors[:, -1].square().sum(1).mean()) == pytest.approx(1, abs=0.25)
    # All places of a coarse patch have the same vector.
    assert torch.equal(vectors[:, 0, :, 0, 0], vectors[:, 0, :, 1, 1])
    assert not torch.equal(vectors[:, 0, :, 0, 0], vectors[:, 0, :, 2, 2])
    # Compared with the encoder.
    levels = torch.from_numpy(np.array(features.levels[:1])).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(levels, (56, 56), mode="bilinear", antialias=True)
    expected = features.components(features.teacher(resized))[0, 4:] * features.components.weights(0.0)
    got = vectors[0, -1].flatten(1).T
    assert float((got - expected).square().sum() / expected.square().sum()) < 0.2


def test_components_are_the_principal_ones():
    set_seed(0)
    features = torch.randn(4000, 3) * torch.tensor([1.0, 4.0, 2.0]) + 5
    components = Components.find(features, 2)
    torch.testing.assert_close(components.axes.abs(), torch.eye(3)[[1, 2]], atol=0.05, rtol=0)
    torch.testing.assert_close(components.variances, torch.tensor([16.0, 4.0, 1.0]), atol=0.8, rtol=0)
    assert components.explained == pytest.approx(20 / 21, abs=0.01)
    for whitening, ratio in ((0, 4.0), (0.5, 2.0), (1, 1.0)):
        vectors = components(features) * components.weights(whitening)
        assert float(vectors.square().sum(1).mean()) == pytest.approx(1, abs=1e-3)
        assert float(vectors[:, 0].square().mean() / vectors[:, 1].square().mean()) == pytest.approx(ratio, rel=0.1)


def test_crops_of_a_video_share_their_box_and_those_of_a_picture_are_close(files):
    still = np.broadcast_to(np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), dtype=np.uint8), (6, 8, 8, 3))
    write_video(files.parent / "still.mp4", np.kron(still, np.ones((1, 8, 8, 1), dtype=np.uint8)), fps=6)
    sizes = [(28, 28), (32, 32)]
    of_video = list(cut_pairs(Source(str(files.parent / "still.mp4"), True, 6), 3, sizes, [0]))
    assert [tuple(part.shape) for part in of_video[0]] == [(2, 3, 28, 28), (2, 3, 32, 32)]
    for pair in of_video:
        assert float((pair[0][0].float() - pair[0][1].float()).abs().mean()) < 12
    assert not torch.equal(of_video[0][0], of_video[1][0])
    picture = Source(str(files / "a.png"), False, 1)
    once, again = (list(cut_pairs(picture, 3, sizes, [4])) for _ in range(2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0][0][0], once[0][0][1])


def test_light_varies_equally_in_every_other_pair():
    pixels = torch.rand(1, 3, 8, 8).expand(8, -1, -1, -1)
    varied = vary_light(pixels, torch.Generator().manual_seed(0))
    assert float(varied.min()) >= 0 and float(varied.max()) <= 1
    apart = (varied[0::2] - varied[1::2]).abs().mean((1, 2, 3))
    assert float(apart[[0, 2]].max()) < 0.05 and not torch.allclose(varied[2], varied[3], atol=0.05)
    assert torch.equal(varied, vary_light(pixels, torch.Generator().manual_seed(0)))


def test_videos_and_pictures_are_held_out():
    sources = [Source(f"{number}", number < 10, 5) for number in range(14)]
    held_out = choose_held_out(sources, 0.2)
    assert sum(number < 10 for number in held_out) == 2 and len(held_out) == 3
    assert choose_held_out(sources, 0.2) == held_out
    with pytest.raises(ValueError, match="at least two videos or two pictures"):
        choose_held_out(sources[9:11], 0.2)


def test_a_threshold_keeps_the_fewest_places_that_meet_it():
    set_seed(0)
    vectors = torch.randn(3, 10, 4)
    kept = keep_to_threshold(vectors, 1.5)
    canvas = torch.zeros(10, 4)
    for frame, is_kept in zip(vectors, kept, strict=True):
        errors = (frame - canvas).square().sum(1)
        remaining = errors.masked_fill(is_kept, 0).sum() / 10
        assert float(remaining) <= 1.5 < float(remaining + errors[is_kept].min() / 10)
        assert float(errors[is_kept].min()) >= float(errors[~is_kept].max())
        canvas = torch.where(is_kept[:, None], frame, canvas)


def test_knots_always_ascend():
    knots = ascending_knots([0.1, 0.2, 0.3, 0.4, 0.5], [0.3, 0.2, 0.1, 0.5, 0.4])
    assert knots == [[0.0, 0.0], [0.2, 0.2], [0.45, 0.45]]
    assert FeatureGazeConfig(loss_knots=knots).loss_knots == knots
    alike = ascending_knots([0.1, 0.5, 0.7], [0.512131, 0.512132, 1.2])
    assert alike == [[0.0, 0.0], [0.3, 0.51213], [0.7, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{encoder}", "nowhere"], "no file or folder matches 'nowhere'"),
        (["{encoder}", "{empty}"], "must hold videos"),
        (["{encoder}", "{text}"], "that can be read, found none"),
        (["{encoder}", "{files}/a.png"], "at least two videos or two pictures"),
        (
            ["no/such/one", "{files}"],
            "`ENCODER` must be a checkpoint's folder or Hub repository, but the config.json of 'no/such/one'",
        ),
        (
            ["{bert}", "{files}"],
            "`ENCODER` must be an encoder of one of the families siglip_vision_model, clip_vision_model",
        ),
        (["{bert}", "{files}"], "qwen2_5_vl, qwen3_vl, but"),
        (["{videomae}", "{files}"], "videomae', whose tokens cover 2 frames"),
        (["{encoder}", "{files}", "--scales", "4", "2"], "`scales` must be rows of patches"),
        (["{encoder}", "{files}", "--num-components", "33"], "`num_components` must lie in 1..32"),
        (
            ["{encoder}", "{files}", "--num-components", "0"],
            "`num_components` must be a whole number of at least 1, got 0",
        ),
        (
            ["{encoder}", "{files}", "--learning-rate", "nan"],
            "`learning_rate` must be a number of at least 0, got nan",
        ),
        (
            ["{encoder}", "{files}", "--per-device-train-batch-size", "0"],
            "`per_device_train_batch_size` must be at least 1, got 0",
        ),
        (["{encoder}", "{files}", "--cache-dir", "{files}/a.png"], "`cache_dir` must be a folder"),
        (["{encoder}", "{files}", "--push-to-hub"], "`push_to_hub` must be False"),
        (["{encoder}", "{files}", "--whitening", "2"], "`whitening` must lie in 0..1"),
        (["{encoder}", "{files}", "--crops-per-video", "3"], "`crops_per_video` must be an even number"),
        (["{encoder}", "{files}", "--eval-share", "1"], "`eval_share` must lie above 0 and below 1"),
        (["{encoder}", "{files}", "--cache-size-gb", "0.00001"], "`cache_size_gb` is 1e-05, but"),
    ],
)
def test_invalid_input_is_an_error_before_any_work(encoder, files, tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "broken.png").write_text("no picture")
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    VideoMAEConfig().save_pretrained(tmp_path / "videomae")
    places = {"encoder": encoder, "files": files} | {
        name: tmp_path / name for name in ("empty", "text", "bert", "videomae")
    }
    arguments = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr("transformers_autogaze.training.teachers.FeatureTeacher.__call__", None)
    assert run(arguments[0], [arguments[1]], tmp_path / "out", *arguments[2:]) == 2
    assert message in capsys.readouterr().err


def test_unreadable_files_are_left_out_with_a_warning(files, tmp_path):
    shutil.copytree(files, tmp_path / "files")
    (tmp_path / "files" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "files" / "broken.mp4").write_bytes(b"no video")
    picture = (tmp_path / "files" / "a.png").read_bytes()
    (tmp_path / "files" / "cut.png").write_bytes(picture[: len(picture) // 2])
    (tmp_path / "files" / "damaged.png").write_bytes(picture[:100] + bytes(8) + picture[108:])
    Image.new("1", (20_000, 10_000)).save(tmp_path / "files" / "huge.png")  # more pixels than Pillow reads
    (tmp_path / "files" / "again.png").symlink_to(tmp_path / "files" / "a.png")
    with pytest.warns(UserWarning, match="5 files are left out"):
        sources = find_sources([tmp_path / "files"])
    assert [source.is_video for source in sources].count(True) == 2 and len(sources) == 4


def test_the_trainer_accepts_only_its_own_arguments(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="must be DistillationArguments, got TrainingArguments"):
        DistillationTrainer(None, TrainingArguments(str(tmp_path)))
    assert callable(distill)


def test_a_finished_run_that_is_resumed_makes_no_further_step(encoder, files, tmp_path):
    pytest.importorskip("accelerate")
    arguments = ["--cache-dir", tmp_path / "cache", "--save-steps", "1", "--per-device-train-batch-size", 1]
    assert run(encoder, [files], tmp_path / "one", *arguments) == 0
    resumed = ["--resume-from-checkpoint", tmp_path / "one" / "checkpoint-2"]
    assert run(encoder, [files], tmp_path / "two", *arguments, *resumed) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "| steps | 2, of " in (tmp_path / "two" / "README.md").read_text()
    assert not (tmp_path / "two" / "checkpoint-3").exists()
