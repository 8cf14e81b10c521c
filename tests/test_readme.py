"""The README's examples run as they stand, one after the other."""

import re
import shutil
from pathlib import Path

from conftest import FIXTURES
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from transformers_autogaze import write_video
from transformers_autogaze.video.demo import render_demo_clip


README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("video.mp4", render_demo_clip(num_frames=32, height=96, width=128), fps=15)
    published = tmp_path / "published"
    shutil.copytree(FIXTURES / "tiny-1", published)
    shutil.copy(FIXTURES / "processor" / "preprocessor_config.json", published)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 7
    encoder = tmp_path / "encoder"
    SiglipVisionModel(
        SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(encoder)
    SiglipImageProcessor().save_pretrained(encoder)
    names: dict[str, object] = {}
    for block in blocks:
        block = block.replace("google/siglip2-base-patch16-224", str(encoder)).replace(
            "nvidia/AutoGaze", str(published)
        )
        exec(compile(block, str(README), "exec"), names)
    assert names["cache"].num_frames == 16
    assert names["patches"].shape[2:] == (3, 14, 14)
    assert names["features"].last_hidden_state.shape == (16 * 196 // 8, 16)
