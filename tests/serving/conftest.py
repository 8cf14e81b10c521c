"""Fixtures of the tests with vLLM. `make vllm-test` makes an environment with vLLM and runs them."""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from transformers_autogaze.hub.checkpoints import load_selector
from transformers_autogaze.integrations import GazeQwenVL


HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

# To be set before vLLM is imported: a small cache, all cores, and no usage statistics.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

ENGINE = {
    "dtype": "float32",
    "max_model_len": 2048,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"video": 2, "image": 1},
    "max_num_batched_tokens": 64,  # less than the prompts have, so that they are prefilled in chunks
    "max_num_seqs": 4,
}
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TOKENS = 12
Video = tuple[np.ndarray, dict]


def make_video(frames: int = 8, height: int = 112, width: int = 112, seed: int = 0) -> Video:
    """Makes a video as vLLM takes it: a rectangle of noise that moves over a static background of noise."""
    generator = np.random.default_rng(seed)
    ground = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
    video = np.repeat(ground[None], frames, axis=0)
    for frame in range(frames):
        left = 8 * frame % (width - 32)
        video[frame, 24:56, left : left + 32] = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    metadata = {
        "fps": 2.0,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "duration": frames / 2,
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return video, metadata


def make_prompt(*parts: str) -> str:
    """Makes a prompt of a user's message with these parts."""
    return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


@cache
def _selector(name: str):
    return load_selector(name)


class Reference:
    """Answers of [`GazeQwenVL`] in transformers, which those of vLLM are compared with."""

    def __init__(self, folder: Path):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.mllm = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, prompt: str, videos: list[Video], images: list = (), gaze_model: str = "features", **settings):
        """Gives the length of the prompt that the language model reads and the tokens of the answer."""
        media = {
            "videos": [torch.from_numpy(frames).permute(0, 3, 1, 2) for frames, _ in videos],
            "video_metadata": [
                VideoMetadata(**{key: value for key, value in metadata.items() if key != "do_sample_frames"})
                for _, metadata in videos
            ],
            "do_sample_frames": False,
        }
        media = media if videos else {}
        inputs = self.processor(text=[prompt], images=list(images) or None, **media, return_tensors="pt")
        options = {"max_new_tokens": TOKENS, "do_sample": False}
        length = inputs["input_ids"].shape[1]
        if not settings:
            return length, self.mllm.generate(**inputs, **options)[0, length:].tolist()
        selector, processor = _selector(gaze_model)
        model = GazeQwenVL(self.mllm, selector, self.processor, processor.video_processor)
        left = model.prepare_inputs(**inputs, **settings).input_ids.shape[1]
        return left, model.generate(**inputs, **settings, **options)[0, length:].tolist()


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def qwen_folder(request, tmp_path_factory) -> Path:
    """A tiny MLLM in a folder."""
    import tiny_mllms

    folder = tmp_path_factory.mktemp(request.param)
    getattr(tiny_mllms, f"write_{request.param}")(folder)
    return folder


@pytest.fixture(scope="session")
def reference(qwen_folder) -> Reference:
    return Reference(qwen_folder)


@contextmanager
def run_engine(folder: Path, **settings) -> Iterator:
    """Runs vLLM in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(folder), **{**ENGINE, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def plain_logprobs(qwen_folder, tmp_path_factory) -> list[list[float]]:
    """Log probabilities of vLLM without the plug-in for the request of [`dense_request`]."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # vLLM loads plug-ins once in a process; the registration is undone here
    config = AutoConfig.from_pretrained(qwen_folder)
    (name,) = config.architectures
    gazing = ModelRegistry.models[name]
    ModelRegistry.register_model(name, f"vllm.model_executor.models.{config.model_type}:{name}")
    # In another folder, as vLLM caches the model class of each folder.
    folder = shutil.copytree(qwen_folder, tmp_path_factory.mktemp("plain") / "model")
    try:
        with run_engine(folder) as engine:
            assert not has_plugin(engine)
            return find_logprobs(engine, dense_request())
    finally:
        ModelRegistry.models[name] = gazing


@pytest.fixture(scope="session")
def engine(qwen_folder, plain_logprobs) -> Iterator:
    """The tiny MLLM in vLLM, with the plug-in; after `plain_logprobs`, as a process can have one engine at a time."""
    with run_engine(qwen_folder) as engine:
        yield engine


def run_documented_block(number: int, replaced: dict[str, str] | None = None, **names) -> dict:
    """Runs a Python block of docs/serving.md, with other words in the place of some, and gives its names."""
    document = Path(__file__).parents[2] / "docs" / "serving.md"
    code = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)[number]
    for word, other in (replaced or {}).items():
        assert word in code
        code = code.replace(word, other)
    exec(compile(code, str(document), "exec"), names)
    return names


def has_plugin(engine) -> bool:
    """Whether an engine's processor can gaze."""
    return hasattr(engine.renderer.mm_processor, "can_gaze")


def dense_request() -> dict:
    """Makes a request about a video without gazing."""
    return {"prompt": make_prompt(VIDEO, "What?"), "multi_modal_data": {"video": [make_video(seed=7)]}}


def find_logprobs(engine, request: dict) -> list[list[float]]:
    """Gives the highest log probabilities at each token of the answer."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=5)
    output = engine.generate([request], options, use_tqdm=False)[0].outputs[0]
    return [sorted(entry.logprob for entry in place.values()) for place in output.logprobs]


transformers.logging.set_verbosity_error()
