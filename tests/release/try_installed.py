"""
Tests an installed package as a new user would, in an environment with nothing else.

    python tests/release/try_installed.py README.md

Run it outside a checkout, in a folder that can be written to. It runs the console script, the demo, the default weights, remote
code and the first example of a document.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path


# Loads a checkpoint where the package cannot be imported.
WITHOUT_PACKAGE = """
import sys
sys.modules["transformers_autogaze"] = None
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("checkpoint", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
processor = AutoProcessor.from_pretrained("checkpoint", trust_remote_code=True)
inputs = processor(videos="video.mp4", num_frames=4, return_tensors="pt")
gaze = model.generate(**inputs, clip_ratio=0.25)
torch.save(gaze.gazing_pos, "remote.pt")
"""


def run(*command: str) -> str:
    """Runs a command and gives what it prints."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout


def try_console_script() -> None:
    """The command is installed, knows its version and prunes a clip."""
    import transformers_autogaze

    script = str(Path(sys.executable).parent / "autogaze")
    version = run(script, "--version").strip()
    assert version.startswith(f"autogaze {transformers_autogaze.__version__} "), version
    print(version)
    print(run(script, "demo", "-o", "demo").strip().splitlines()[-1])
    written = {path.name for path in Path("demo").iterdir()}
    assert {"overlay.mp4", "contact_sheet.png", "gaze.json"} <= written, written
    assert transformers_autogaze.GazeFile.read("demo/gaze.json").gaze.batch_size == 1


def try_default_weights_and_remote_code() -> None:
    """The weights come with the package, and a saved checkpoint loads and gazes alike without the package."""
    import torch
    from transformers import AutoModel

    from transformers_autogaze import DEFAULT_SELECTOR, AutoGazeProcessor

    model, processor = AutoModel.from_pretrained(DEFAULT_SELECTOR).eval(), AutoGazeProcessor()
    gaze = model.generate(**processor(videos="video.mp4", num_frames=4, return_tensors="pt"), clip_ratio=0.25)
    assert int(gaze.num_real_each_frame.sum()) == 196
    model.save_pretrained("checkpoint")
    processor.save_pretrained("checkpoint")
    run(sys.executable, "-c", WITHOUT_PACKAGE)
    assert torch.equal(torch.load("remote.pt", weights_only=True), gaze.gazing_pos)
    print(f"default weights: {model.num_parameters():,} parameters; remote code gazes alike")


def try_first_example(document: Path) -> None:
    """The first example of a document runs as it stands."""
    example = re.search(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    Path("example.py").write_text(example, encoding="utf-8")
    print(run(sys.executable, "example.py").strip()[:100])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="Markdown file whose first Python example is run")
    document = parser.parse_args().document.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"

    import transformers_autogaze
    from transformers_autogaze import write_video
    from transformers_autogaze.video.demo import render_demo_clip

    assert "site-packages" in transformers_autogaze.__file__, transformers_autogaze.__file__
    write_video("video.mp4", render_demo_clip(num_frames=16, height=96, width=128), fps=15)
    try_console_script()
    try_default_weights_and_remote_code()
    try_first_example(document)
    print(f"all well on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
