"""The library's common tests of processors and video processors, for ours."""

import unittest

from tests.test_processing_common import ProcessorTesterMixin
from tests.test_video_processing_common import VideoProcessingTestMixin
from transformers.utils import is_torchvision_available

from transformers_autogaze import AutoGazeProcessor, AutoGazeVideoProcessor


class VideoProcessorTester:
    """What the common tests ask of a tester: made videos, and the shape that they become."""

    batch_size, num_frames, num_channels, min_resolution, max_resolution = 3, 4, 3, 30, 80

    def __init__(self):
        self.video_processor_dict = {
            "size": {"shortest_edge": 20},
            "crop_size": {"height": 18, "width": 18},
            "do_center_crop": True,
        }

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, 18, 18

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        from tests.test_video_processing_common import prepare_video_inputs

        return prepare_video_inputs(
            self.batch_size,
            self.num_frames,
            self.num_channels,
            self.min_resolution,
            self.max_resolution,
            equal_resolution,
            return_tensors,
        )


class AutoGazeVideoProcessorTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = AutoGazeVideoProcessor

    # By the start of the name of a test: why it does not apply.
    reasons = {
        "test_call_numpy_4_channels": "pixels with transparency become RGB, as the model sees three channels",
        "test_valid_kwargs_set": "its arguments are AutoGazeVideosKwargs, and not named after the class",
    }
    if not is_torchvision_available():
        reasons["test_video_processor_save_load_with_autovideoprocessor"] = "AutoVideoProcessor needs torchvision"

    def setUp(self):
        for name, reason in self.reasons.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        super().setUp()
        self.video_processor_tester = VideoProcessorTester()

    @property
    def video_processor_dict(self):
        return self.video_processor_tester.video_processor_dict


class AutoGazeProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = AutoGazeProcessor

    # By the start of the name of a test: why it does not apply.
    reasons = {
        "test_flat_kwarg_applied_when_modality_dict_lacks_it": "there is no text, so arguments for text are refused by name",
        "test_processor_from_and_save_pretrained": "what is loaded says where its code is (`auto_map`), what is new does "
        "not; tests/test_processing.py compares the rest",
    }

    def setUp(self):
        for name, reason in self.reasons.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)

    @classmethod
    def _setup_video_processor(cls):
        return AutoGazeVideoProcessor()


if __name__ == "__main__":
    unittest.main()
