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
    GreedyGazeConfig,
    GreedyGazeSelector,
)


class ModelTest(ModelTesterMixin):
    """The library's tests of a model, but for those that do not apply."""

    test_resize_embeddings = False  # ids are the patches of a grid
    reasons: dict[str, str] = {}
    """By the start of the name of a test: why it does not apply."""

    def setUp(self):
        for name, reason in self.reasons.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)


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


class AutoGazeModelTest(ModelTest, unittest.TestCase):
    all_model_classes = (AutoGazeModel,)

    reasons = {
        "test_batching_equivalence": _ONE_BATCH,
        "test_eager_matches_sdpa_inference": _ONE_BATCH,
        "test_model_outputs_equivalence": _KEPT,
        "test_capture_outputs_decorator": _KEPT,
        "test_tp_plan_matches_params": "the plan is that of the decoder's own class, which is a part of this model",
    }

    def setUp(self):
        super().setUp()
        self.model_tester = AutoGazeTester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:
            inputs["labels"] = inputs["gazing_pos"].clone()
            inputs["task_loss_labels"] = torch.full(inputs["labels"].shape, 0.5, device=torch_device)
        return inputs


class SelectorTester:
    """For selectors whose `forward` is `generate`."""

    batch_size, is_training = 2, False

    def __init__(self, config):
        self.config = config

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        videos = torch.randn(self.batch_size, 2, 3, 32, 32, generator=generator).to(torch_device)
        return self.config, {"pixel_values_videos": videos}


_CHOICE = "calling it gives a choice of patches: no hidden states, and no gradient"
_FLAGS = "subtracts outputs, of which some are flags; tests/test_feature_gaze.py and tests/test_greedy.py compare them"


class FeatureGazeModelTest(ModelTest, unittest.TestCase):
    all_model_classes = (FeatureGazeModel,)
    has_attentions = False

    reasons = {
        "test_batching_equivalence": _FLAGS,
        "test_model_outputs_equivalence": _FLAGS,
        "test_hidden_states_output": _CHOICE,
        "test_retain_grad_hidden_states_attentions": _CHOICE,
        "test_model_get_set_embeddings": "a network of convolutions looks at pixels; there are no tokens to embed",
    }

    def setUp(self):
        super().setUp()
        self.model_tester = SelectorTester(
            FeatureGazeConfig(hidden_sizes=[8, 16, 32], depths=[1, 1, 1], feature_size=8)
        )


class GreedyGazeSelectorTest(ModelTest, unittest.TestCase):
    all_model_classes = (GreedyGazeSelector,)
    has_attentions = False

    reasons = {
        **FeatureGazeModelTest.reasons,
        "test_init_weights_can_init_buffers": "its one buffer has no content: it tells the device and the precision",
        "test_load_save_without_tied_weights": "there are no weights, and so no file of them",
    }

    def setUp(self):
        super().setUp()
        self.model_tester = SelectorTester(GreedyGazeConfig())


if __name__ == "__main__":
    unittest.main()
