import json
from pathlib import Path

import pytest
from published import FIXTURES
from transformers import AutoConfig

import transformers_autogaze
from transformers_autogaze import AutoGazeConfig, GreedyGazeConfig
from transformers_autogaze.configuration_autogaze import CODE_FILES
from transformers_autogaze.reconstruction.video_mae import GazeVideoMAEConfig


def test_the_published_layout_is_read():
    config = AutoConfig.from_pretrained(FIXTURES / "tiny-1")
    assert isinstance(config, AutoGazeConfig)
    assert config.scales == [16, 32, 64] and config.patch_size == 16 and config.image_size == 64
    assert config.decoding_positions == "frame_tail"
    assert config.vision_config.num_blocks == 2 and config.vision_config.hidden_size == 24
    assert config.decoder_config.num_multi_token_pred == 3 and config.decoder_config.num_key_value_heads == 2
    assert config.decoder_config.rope_parameters["rope_theta"] == 500000
    assert config.task_loss_requirement_config["fixed"] == {"task_loss_requirement": 0.7}


def test_saving_writes_our_layout_and_reads_back_equal(tmp_path):
    config = AutoConfig.from_pretrained(FIXTURES / "tiny-1")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "gaze_model_config" not in written and written["scales"] == [16, 32, 64]
    again = AutoGazeConfig.from_pretrained(tmp_path).to_dict()
    assert {**again, "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_all_modules_that_travel_are_written_with_the_configuration(tmp_path):
    AutoGazeConfig().save_pretrained(tmp_path)
    modules = {path.name for path in Path(transformers_autogaze.__file__).parent.glob("*_autogaze.py")}
    assert {path.name for path in tmp_path.glob("*.py")} == modules == set(CODE_FILES)


def test_the_defaults_are_the_published_sizes():
    config = AutoGazeConfig()
    assert (config.grid.num_patches, config.end_id, config.num_vision_tokens) == (265, 265, 196)
    assert config.decoder_config.vocab_size == 266
    assert config.decoding_positions == "sequential"


def test_an_installed_package_needs_no_remote_pipeline():
    assert AutoGazeConfig().custom_pipelines == {}
    assert "video-token-pruning" in AutoGazeConfig().to_dict()["custom_pipelines"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": [32, 100]}, r"`scales\[1\]` must be a positive multiple of the patch size 16, got 100"),
        ({"image_size": 225}, "`image_size` must be a positive multiple of `vision_config.patch_size`=16, got 225"),
        ({"decoding_positions": "tail"}, "`decoding_positions` must be one of .*'frame_tail'.*, got 'tail'"),
        ({"max_num_frames": 0}, "`max_num_frames` must be a positive integer, got 0"),
        ({"decoder_config": {"vocab_size": 265}}, "`decoder_config.vocab_size` must be 266"),
        ({"decoder_config": {"num_multi_token_pred": 0}}, "`decoder_config.num_multi_token_pred`"),
        ({"vision_config": {"output_size": 96}}, "`vision_config.output_size` must equal"),
        ({"vision_config": {"spatial_kernel_size": 2}}, "`vision_config.spatial_kernel_size` must be odd, got 2"),
        ({"vision_config": {"hidden_size": -1}}, "`vision_config.hidden_size` must be a positive integer, got -1"),
        (
            {"gazing_ratio_config": {"sample_strategy_during_training": "beta"}},
            "must be one of .*'fixed'.*, got 'beta'",
        ),
        ({"gazing_ratio_config": {"fixed": {}}}, "must hold .'gazing_ratio'."),
        ({"task_loss_requirement_config": {"loss": {}}}, "must hold the strategies"),
    ],
)
def test_bad_parts_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoGazeConfig(**arguments)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (AutoGazeConfig, {"scales": [32, 64], "image_size": 64}),
        (GreedyGazeConfig, {"scales": [16, 32, 64]}),
        (GreedyGazeConfig, {"clip_ratio": 0.5}),
        (GazeVideoMAEConfig, {"hidden_size": 32}),
    ],
)
def test_configurations_are_equal_when_they_say_the_same(kind, change):
    assert kind() == kind() and kind(**change) == kind(**change)
    assert kind() != kind(**change) and kind() != object()
