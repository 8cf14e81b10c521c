"""The library's common tests of models, for ours."""

import unittest

import torch
from tests.test_modeling_common import ModelTesterMixin
from transformers.testing_utils import torch_device

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeOutput,
    GreedyGazeSelector,
)


class AutoGazeTester:
    batch_size, num_hidden_layers = 2, 2
    seq_length = 4 * 2 + 6  # four vision tokens of each of two frames, and three slots of each
    is_training = True
    hidden_size, num_attention_heads = 16, 2

    def get_config(self) -> AutoGazeConfig:
        return AutoGazeConfig(
            scales=[16, 32],
            image_size=32,
            vision_config={"hidden_size": 16, "output_size": 16},
            decoder_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": 2,
                "num_multi_token_pred": 2,
            },
        )

    def prepare_config_and_inputs_for_common(self):
        config, generator = self.get_config(), torch.Generator().manual_seed(0)
        ids = torch.tensor([[0, 2, 4, 6, 7, 9]] * self.batch_size)
        gaze = GazeOutput.from_ids(ids, torch.zeros_like(ids).bool(), torch.tensor([3, 3]), config.grid)
        inputs = {
            "pixel_values_videos": torch.randn(self.batch_size, 2, 3, 32, 32, generator=generator),
            "gazing_pos": gaze.gazing_pos,
            "if_padded_gazing": gaze.if_padded_gazing,
            "num_gazing_each_frame": gaze.num_gazing_each_frame,
        }
        return config, {name: value.to(torch_device) for name, value in inputs.items()}


_ONE_BATCH = (
    "`num_gazing_each_frame` is of all clips, so the test cannot cut or pad the batch; tests/test_modeling.py compares"
)
_KEPT = (
    "sdpa keeps no attentions, and the model says so instead of giving none; tests/test_model_outputs.py has eager's"
)


class AutoGazeModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (AutoGazeModel,)
    test_resize_embeddings = False  # ids are the patches of a grid

    # By the start of the name of a test: why it does not apply.
    reasons = {
        "test_batching_equivalence": _ONE_BATCH,
        "test_eager_matches_sdpa_inference": _ONE_BATCH,
        "test_model_outputs_equivalence": _KEPT,
        "test_capture_outputs_decorator": _KEPT,
        "test_tp_plan_matches_params": "the plan is that of the decoder's own class, which is a part of this model",
    }

    def setUp(self):
        for name, reason in self.reasons.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        self.model_tester = AutoGazeTester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:
            inputs["labels"] = inputs["gazing_pos"].clone()
            inputs["task_loss_labels"] = torch.full(inputs["labels"].shape, 0.5, device=torch_device)
        return inputs


class SelectorTester:
    """For selectors that only gaze."""

    is_training = False

    def __init__(self, config):
        self.config = config

    def prepare_config_and_inputs_for_common(self):
        return self.config, {"pixel_values_videos": torch.zeros(1, 2, 3, 32, 32, device=torch_device)}


class FeatureGazeModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (FeatureGazeModel,)
    test_resize_embeddings = False
    has_attentions = False

    # The others call the model: it has `generate` alone, which tests/test_feature_gaze.py tests.
    applies = (
        "test_can_init_all_missing_weights",
        "test_config_",
        "test_correct_missing_keys",
        "test_from_pretrained_no_checkpoint",
        "test_init_weights_can_init_buffers",
        "test_initialization",
        "test_keep_in_fp32_modules",
        "test_load_save_without_tied_weights",
        "test_model_is_small",
        "test_save_load_keys_to_ignore_on_save",
        "test_tied_weights_keys",
        "test_torch_save_load",
    )

    def setUp(self):
        if not self._testMethodName.startswith(self.applies):
            self.skipTest("calls the model, which has `generate` alone; tests/test_feature_gaze.py tests that")
        self.model_tester = SelectorTester(
            FeatureGazeConfig(hidden_sizes=[8, 16, 32], depths=[1, 1, 1], feature_size=8)
        )


class GreedyGazeSelectorTest(FeatureGazeModelTest):
    all_model_classes = (GreedyGazeSelector,)

    def setUp(self):
        self.skipTest("it has no weights and no `forward`; tests/test_greedy.py tests it")


if __name__ == "__main__":
    unittest.main()
