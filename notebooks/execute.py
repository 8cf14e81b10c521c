"""
Runs notebooks offline: models of the Hub are replaced by tiny ones with random weights.

    python notebooks/execute.py notebooks/quickstart.ipynb

It needs nbclient and ipykernel, and writes the outputs, with pictures reduced in size, into the notebook. The tests run the cells
without these two packages.
"""

import base64
import io
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel


TOWER, MLLM = "google/siglip2-base-patch16-224", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
_EXAMPLE = Path(__file__).parents[1] / "examples" / "llava_onevision_video_qa.py"
_COLOURS = 256  # of a picture among the outputs


def save_tiny_models(folder: Path) -> dict[str, str]:
    """Saves tiny models; returns their folders by the Hub names that they replace."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**size)).save_pretrained(folder / "tower")
    SiglipImageProcessor().save_pretrained(folder / "tower")
    mllm, tokenizer = runpy.run_path(str(_EXAMPLE))["tiny_mllm"]()
    mllm.save_pretrained(folder / "mllm")
    tokenizer.save_pretrained(folder / "mllm")
    return {TOWER: str(folder / "tower"), MLLM: str(folder / "mllm")}


def code_of(notebook: dict[str, Any], names: dict[str, str]) -> list[tuple[dict[str, Any], str]]:
    """Returns the code cells and the code to run for each, without cells that install packages."""
    cells = [(cell, "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for name, other in names.items():
        cells = [(cell, code.replace(name, other)) for cell, code in cells]
    return [(cell, code) for cell, code in cells if not code.startswith("%pip")]


def main(path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        cells = code_of(notebook, save_tiny_models(Path(folder)))
        copy = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for _, code in cells])
        # Progress bars and loading warnings would only clutter the outputs.
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        NotebookClient(copy, resources={"metadata": {"path": folder}}).execute()
    for number, ((cell, _), ran) in enumerate(zip(cells, copy.cells, strict=True), 1):
        outputs = [output for output in ran.outputs if output.get("name") != "stderr"]
        for output in outputs:
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _shrink(output["data"]["image/png"])
                output["data"].pop("image/jpeg", None)
        cell["execution_count"], cell["outputs"] = number, json.loads(json.dumps(outputs))
        for output in cell["outputs"]:
            output |= {"execution_count": number} if output["output_type"] == "execute_result" else {}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _shrink(picture: str) -> str:
    shrunk = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        image.convert("RGB").quantize(_COLOURS).save(shrunk, "PNG", optimize=True)
    return base64.b64encode(shrunk.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(Path(name))
