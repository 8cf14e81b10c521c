"""The README's examples run as they stand, one after the other."""

import re
import shutil
from pathlib import Path

from conftest import FIXTURES

from transformers_autogaze import write_video
from transformers_autogaze.demo import render_demo_clip


README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("video.mp4", render_demo_clip(num_frames=32, height=96, width=128), fps=15)
    published = tmp_path / "path" / "to" / "published"
    shutil.copytree(FIXTURES / "tiny-1", published)
    shutil.copy(FIXTURES / "processor" / "preprocessor_config.json", published)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        # The two on gazes for others go on with the model of their own sizes, not with the small published one.
        if "GazeCache" in block:
            names["model"], names["processor"] = names["own_model"], names["own_processor"]
        exec(compile(block, str(README), "exec"), names)
        if "random weights" in block:
            names["own_model"], names["own_processor"] = names["model"], names["processor"]
    assert names["cache"].num_frames == 16
    assert names["patches"].shape[2:] == (3, 14, 14)
