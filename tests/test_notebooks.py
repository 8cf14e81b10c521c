"""The notebooks run from the first cell to the last, with tiny weights, and have outputs."""

import json
import runpy
from pathlib import Path

import pytest
import transformers


NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_the_cells_run_in_order(path, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    if getattr(transformers.SiglipImageProcessor, "is_dummy", False):
        pytest.skip("this version's image processors need torchvision")
    matplotlib.use("Agg")
    execute = runpy.run_path(str(NOTEBOOKS / "execute.py"))
    models = tmp_path / "models"
    cells = execute["code_of"](read(path), execute["save_tiny_models"](models))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, (_, code) in enumerate(cells):
        exec(compile(code, f"{path.name}[{number}]", "exec"), names)
    assert names["pruning"].gaze.num_frames == 16
    assert names["features"].last_hidden_state.shape == (16 * 196 // 4, 16)
    assert names["tokens"] == 99 and names["whole"] == 785
    quality = [point["psnr"] for point in names["curve"]]
    assert quality == sorted(quality)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_outputs_are_there_small_and_of_no_other_machine(path):
    notebook, text = read(path), path.read_text(encoding="utf-8")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:])
    kinds = [kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2 and "text/html" in kinds
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert len(text) < 500_000
    assert "/root" not in text and "/tmp" not in text and "/home" not in text
