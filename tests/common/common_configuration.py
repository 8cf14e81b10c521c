"""The library's common tests of configurations, for ours."""

import unittest

from tests.test_configuration_common import ConfigTester

from transformers_autogaze import AutoGazeConfig, FeatureGazeConfig, GreedyGazeConfig


class ConfigurationTest(unittest.TestCase):
    def run_common_tests(self, config_class, common_properties, **inputs):
        ConfigTester(
            self, config_class, has_text_modality=False, common_properties=common_properties, **inputs
        ).run_common_tests()

    def test_autogaze(self):
        self.run_common_tests(AutoGazeConfig, [], max_num_frames=8)

    def test_greedy(self):
        self.run_common_tests(GreedyGazeConfig, [], gazing_ratio=0.5)

    def test_features(self):
        self.run_common_tests(FeatureGazeConfig, [], feature_size=8)
