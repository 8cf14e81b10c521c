"""Positions of gazed videos in the language model: those that vLLM counts in the whole prompt."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.multimodal.inputs import PlaceholderRange

from transformers_autogaze.serving.vllm_models import _GazeModel
from transformers_autogaze.serving.vllm_processing import KEPT


IMAGE, VIDEO, START, END = 46, 47, 48, 49
VISION = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
CONFIG = SimpleNamespace(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    vision_config=VISION,
)


def make_model(family: type) -> _GazeModel:
    """Makes a model without weights, which can only compute positions."""
    kind = type("Gaze", (_GazeModel, family), {"config": CONFIG, "__init__": lambda self: None})
    return kind.__new__(kind)


def make_feature(modality: str, grid: tuple, offset: int, length: int, is_kept: torch.Tensor | None = None):
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    fields = {f"{modality}_grid_thw": torch.tensor(grid)}
    if modality == "video":
        fields |= {"second_per_grid_ts": torch.tensor(1.5)} | ({} if is_kept is None else {KEPT: is_kept})
    data = {name: SimpleNamespace(data=value) for name, value in fields.items()}
    return MultiModalFeatureSpec(data, modality, "name", PlaceholderRange(offset, length))


def write(family: type, kept: list[torch.Tensor], leaves_out: bool) -> tuple[list[int], list, torch.Tensor]:
    """Gives a prompt of text, a picture and videos of 4x4x6 patches, its features, and which tokens of the whole prompt are left."""
    tokens, is_left, features = [1, 2, START, *[IMAGE] * 4, END, 3], [True] * 9, []
    features.append(make_feature("image", (1, 4, 4), 3, 4))
    for is_kept in kept:
        tokens, is_left = [*tokens, START], [*is_left, True]
        frames = is_kept.view(4, 6).tolist()
        video, left = [], []
        for number, units in enumerate(frames):
            if family is Qwen3VLForConditionalGeneration:
                video, left = [*video, 30 + number, START], [*left, True, True]
            video, left = [*video, *[VIDEO] * 6], [*left, *units]
            if family is Qwen3VLForConditionalGeneration:
                video, left = [*video, END], [*left, True]
        place = sum(is_left) if leaves_out else len(tokens)
        length = sum(left) if leaves_out else len(video)
        features.append(make_feature("video", (4, 4, 6), place, length, is_kept if leaves_out else None))
        tokens, is_left = [*tokens, *video, END, 5, 6], [*is_left, *left, True, True, True]
    mask = torch.tensor(is_left)
    return torch.tensor(tokens)[mask].tolist() if leaves_out else tokens, features, mask


@pytest.mark.parametrize("family", [Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration])
def test_what_is_left_keeps_its_position_in_the_whole_prompt(family):
    generator = torch.Generator().manual_seed(0)
    kept = [torch.rand(24, generator=generator) < 0.3 for _ in range(2)]
    kept[0][6:12] = False  # a pair of frames of which nothing is kept
    whole, features, is_left = write(family, kept, leaves_out=False)
    expected, delta = make_model(family).get_mrope_input_positions(whole, features)
    left, features, _ = write(family, kept, leaves_out=True)
    positions, left_delta = make_model(family).get_mrope_input_positions(left, features)
    assert torch.equal(positions, expected[:, is_left])
    assert len(left) + left_delta == len(whole) + delta  # where the answer goes on
