"""The README and the pages of the site: Python blocks run, commands are accepted, names exist, figures are those of the results."""

import importlib
import re
import runpy
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from published import FIXTURES
from test_nvila import StandInProcessor
from transformers import AutoModel, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import is_torchvision_available

from transformers_autogaze import (
    DEFAULT_SELECTOR,
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    GazeVideoMAE,
    GreedyGazeSelector,
    prune_video,
    write_video,
)
from transformers_autogaze.integrations.vision_adapters import ADAPTERS
from transformers_autogaze.reconstruction import GazeVideoMAEConfig
from transformers_autogaze.video.demo import render_demo_clip
from transformers_autogaze_cli import _parser


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HLVID = ROOT / "src" / "transformers_autogaze" / "lmms_harness" / "tasks" / "hlvid" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", HLVID, *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
ENGINES = {"serving.md"}  # pages whose blocks need vLLM; tests/serving runs them
FIGURES = runpy.run_path(str(DOCS / "mkdocs" / "figures.py"))
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def blocks(page: Path, language: str) -> list[str]:
    """Gives the code blocks of a page in a language."""
    return [text for name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with(language: str) -> list:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder with the videos that pages name, and what stands in the place of models of the Hub: tiny ones, random weights."""
    folder = tmp_path_factory.mktemp("documentation")
    write_video(folder / "video.mp4", render_demo_clip(num_frames=32, height=96, width=128), fps=15)
    (folder / "videos").mkdir()
    shutil.copy(folder / "video.mp4", folder / "videos" / "clip.mp4")
    torch.manual_seed(0)
    models = folder / "models"
    execute = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))
    places = execute["save_tiny_models"](models)
    SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=384, patch_size=14)).save_pretrained(models / "large")
    SiglipImageProcessor(size={"height": 384, "width": 384}).save_pretrained(models / "large")
    AutoGazeModel(AutoGazeConfig()).save_pretrained(models / "autogaze")
    shutil.copy(FIXTURES / "processor" / "preprocessor_config.json", models / "autogaze")
    AutoModel.from_pretrained(DEFAULT_SELECTOR).save_pretrained(models / "distilled")
    AutoGazeProcessor().save_pretrained(models / "distilled")
    decoder = {f"decoder_{key}": value for key, value in SMALL.items()}
    GazeVideoMAE(GazeVideoMAEConfig(**SMALL, **decoder)).save_pretrained(models / "reconstruction")
    places |= {
        "google/siglip2-so400m-patch14-384": str(models / "large"),
        "nvidia/AutoGaze": str(models / "autogaze"),
        "path/to/this/folder": str(models / "distilled"),
        "path/to/reconstruction": str(models / "reconstruction"),
        "gazing_ratio=0.1, beam=16": "gazing_ratio=0.01, beam=2",
        'labeller, "labels.json"': 'labeller, "labels.json", num_frames=2',
    }
    if is_torchvision_available():
        import tiny_mllms

        tiny_mllms.write_qwen2_5_vl(models / "qwen")
        tiny_mllms.write_llava_onevision(models / "llava")
        places |= {"Qwen/Qwen2.5-VL-3B-Instruct": str(models / "qwen"), execute["MLLM"]: str(models / "llava")}
    return folder, places


def prepare(page: Path, folder: Path) -> dict[str, object]:
    """Gives what a page's blocks find beside the videos: files in the folder, and names."""
    if page.name == "gaze_file.md":
        (folder / "outputs" / "demo").mkdir(parents=True)
        pruning = prune_video("video.mp4", GreedyGazeSelector(), task_loss_requirement=0.7)
        pruning.write_gaze_file(folder / "outputs" / "demo" / "gaze.json")
    if page.name == "scale.md":
        shards = pytest.importorskip("transformers_autogaze.dataset_pruning.shards")
        rows = pytest.importorskip("transformers_autogaze.dataset_pruning")
        row = rows.prune_to_row("clip.mp4", "video.mp4", GreedyGazeSelector(), rows.PruneSettings("greedy"))
        with shards.PrunedFolder(folder / "pruned", {}) as pruned:
            shards.write_row(pruned.unfinished, row)
            shards.write_shard(folder / "pruned", 0, ["clip.mp4"])
    return {"processor": StandInProcessor()} if page.name == "integrations.md" else {}


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run_one_after_the_other(page, workshop, tmp_path, monkeypatch):
    if getattr(transformers.SiglipImageProcessor, "is_dummy", False):
        pytest.skip("this version's image processors need torchvision")
    folder, places = workshop
    for name in ("video.mp4", "videos"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers_autogaze.integrations.vision_adapters.ADAPTERS", dict(ADAPTERS))
    monkeypatch.setattr("transformers_autogaze.AUTOGAZE_SELECTOR", places["nvidia/AutoGaze"])
    names = prepare(page, tmp_path)
    for block in blocks(page, "python"):
        for hub, place in places.items():
            block = block.replace(hub, place)
        code = compile(block, name_of(page), "exec")
        if page.name in ENGINES:
            continue
        if "needs torchvision" in block and not is_torchvision_available():
            pytest.skip("torchvision is not installed")
        exec(code, names)


def commands(page: Path) -> list[list[str]]:
    """Gives the commands of a page's shell blocks, word by word."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "1"), comments=True)
            # What starts several processes, and variables before a command.
            if "transformers_autogaze.cli" in words:
                words = ["autogaze", *words[words.index("transformers_autogaze.cli") + 1 :]]
            while words and "=" in words[0]:
                words = words[1:]
            found.append([word for word in words if word != ".."])
    return [words for words in found if words]


@cache
def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = ", table, flags=re.MULTILINE))


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_have_the_options_that_they_are_given(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command, *words in commands(page):
        if command == "autogaze":
            _parser(words[0]).parse_args(words)  # raises a ValueError where a word is not accepted
        elif command == "make":
            assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE), words
        elif command == "python" and words[0].endswith(".py"):
            assert (ROOT / words[0]).is_file(), words
        elif command == "pip":
            named = re.search(r"\[([\w,-]+)\]", " ".join(words))
            assert set(named[1].split(",") if named else []) <= extras(), words


def test_every_extra_is_named_where_it_is_needed():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {extra for extra in extras() if f"[{extra}]" not in text} == set()


def documented() -> list[str]:
    return [
        name
        for page in sorted((DOCS / "api").glob("*.md"))
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    ]


def test_the_api_reference_has_every_public_name_once():
    names = documented()
    assert len(names) == len(set(names))
    for module in ("", ".training", ".evaluation", ".reconstruction", ".integrations", ".dataset_pruning"):
        package = importlib.import_module(f"transformers_autogaze{module}")
        public = {name for name in package.__all__}
        assert public <= {name.rpartition(".")[2] for name in names}, module


@pytest.mark.parametrize("name", documented())
def test_a_name_of_the_api_reference_exists(name):
    path, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(path)
        assert hasattr(module, attribute)
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pyarrow", "vllm"):
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("name", FIGURES["TABLES"])
def test_tables_have_the_figures_of_the_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert FIGURES["update_tables"](name, text, FIGURES["read_rows"]()) == text


def test_a_table_with_other_figures_is_filled_anew():
    name, rows = "README.md", FIGURES["read_rows"]()
    text = (ROOT / name).read_text(encoding="utf-8")
    assert FIGURES["update_tables"](name, re.sub(r"(?<=[ *])0\.\d{3}(?=[ *])", "0.000", text), rows) == text
    with pytest.raises(ValueError, match="must have rows of"):
        FIGURES["update_tables"](name, text, rows[:1])
