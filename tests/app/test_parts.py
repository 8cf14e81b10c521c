"""The parts of the page that need no browser and no Gradio."""

import threading
import time

import pytest
import torch

from transformers_autogaze import GazeGrid, GazeOutput, prune_video
from transformers_autogaze.app import launch
from transformers_autogaze.app.choices import Choices
from transformers_autogaze.app.jobs import Cancelled, JobQueue
from transformers_autogaze.app.limits import Limits
from transformers_autogaze.app.mllm_tokens import LLAVA_PLACES, NVILA_TILE, count_mllm_tokens, unit_grid
from transformers_autogaze.app.uploads import VisitorFiles
from transformers_autogaze.app.work import Selectors, prune_for_page


GOOD = {
    "selectors": ("finest",),
    "budget": "Share of the whole clip",
    "ratio": 0.25,
    "threshold": None,
    "num_frames": 16,
    "patches": "The selector's own",
    "tiles": "Whole frames, resized",
    "max_tiles": 4,
    "mllm": "LLaVA-OneVision",
}
UPLOADED = "a" * 64


@pytest.fixture(scope="module")
def loaded():
    return Selectors()


def run(clips, loaded, folder, clip="good", **changes):
    reports: list[str] = []
    choices = Choices(**{**GOOD, **changes})
    results = prune_for_page(
        clips[clip], "clip.mp4", choices, Limits(), loaded, folder / "results", lambda *stage: reports.append(stage)
    )
    return results, reports


def test_the_page_keeps_what_prune_video_keeps(clips, loaded, tmp_path):
    (result,), reports = run(clips, loaded, tmp_path)
    pruning = prune_video(str(clips["good"]), *loaded("finest"), num_frames=8, clip_ratio=0.25)
    saved = GazeOutput.load(result.gaze_file)
    assert torch.equal(saved.gazing_pos, pruning.gaze.gazing_pos)
    assert result.statistics == pruning.statistics and result.times == pruning.frame_times
    assert result.overlay.stat().st_size > 1000 and 0 < result.gazing_seconds < result.seconds
    assert ("finest: reading frames", 8, 8) in reports and ("finest: drawing", 8, 8) in reports


def test_merge_units_are_kept_in_the_share_that_was_asked_for(clips, loaded, tmp_path):
    (result,), _ = run(clips, loaded, tmp_path, patches="The MLLM's own", mllm="Qwen2.5-VL", num_frames=7)
    # 128x96 pixels are 5x3 units, in 3 pairs of frames, as a last frame has no other.
    assert tuple(result.tokens) == (round(45 * 0.25), 45)
    assert result.statistics["num_frames"] == 3 and len(result.times) == 3


@pytest.mark.parametrize(("max_tiles", "tiles"), [(1, 1), (4, 4)])
def test_tiles_of_nvila_are_gazed_at_in_its_own_patches(clips, loaded, tmp_path, max_tiles, tiles):
    given = {
        "patches": "The MLLM's own",
        "mllm": "NVILA-HD-Video",
        "selectors": ("greedy",),
        "ratio": 0.02,
        "num_frames": 2,
    }
    (result,), _ = run(clips, loaded, tmp_path, **given, max_tiles=max_tiles)
    kept, whole = result.tokens
    assert whole == 2 * 1060 * (tiles + 1) and kept == result.statistics["num_patches"] + 2 * 1060


def test_tokens_of_llava_onevision_are_those_of_its_wrapper():
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    from transformers_autogaze.integrations.mllm import GazeVideoLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    published = LlavaOnevisionConfig().vision_config
    vision = SiglipVisionConfig(**small, image_size=published.image_size, patch_size=published.patch_size)
    text = Qwen2Config(**small, num_key_value_heads=1, vocab_size=152_000)
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text)
    model = GazeVideoLM(LlavaOnevisionForConditionalGeneration(config))
    assert model.grid == LLAVA_PLACES
    mask = torch.rand(1, 5, 196, generator=torch.Generator().manual_seed(0)) < 0.3
    gaze = GazeOutput.from_masks([mask], LLAVA_PLACES)
    assert [tuple(count_mllm_tokens("LLaVA-OneVision", gaze, 90, 160))] == model.count_tokens(gaze)
    # The default selector's 14x14 patches lie where the places lie.
    same = GazeOutput.from_masks([mask], GazeGrid([224], 16))
    assert count_mllm_tokens("LLaVA-OneVision", same, 90, 160)[0] == int(mask.sum()) + 1


@pytest.mark.parametrize("size", [(288, 512), (1080, 1920), (1920, 1080), (96, 128), (20, 500), (1, 1)])
def test_merge_units_are_laid_out_as_the_processor_of_qwen_resizes(size):
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    height, width = processing.smart_resize(*size, factor=28, min_pixels=1, max_pixels=256 * 28 * 28)
    assert list(unit_grid(*size).sizes) == [(max(height, 28), max(width, 28))]


def test_nvila_counts_the_slots_that_its_processor_fills():
    grid = GazeGrid([(tall, 2 * wide) for tall, wide in NVILA_TILE.sizes], NVILA_TILE.patch_size)
    masks = [torch.zeros(1, 3, count, dtype=torch.bool) for count in grid.num_patches_each_scale]
    masks[0][0, 0, :5] = masks[3][0, 2, 7] = True
    gaze = GazeOutput.from_masks(masks, grid)
    assert tuple(count_mllm_tokens("NVILA-HD-Video", gaze, 90, 160)) == (6 + 3 * 1060, 3 * 1060 * 3)
    # Four quarters of AutoGaze's own size are one tile.
    quarters = GazeGrid([64, 128, 224, 448], 16)
    assert tuple(count_mllm_tokens("NVILA-HD-Video", GazeOutput.full(quarters, 1, 2), 90, 90)) == (2 * 2120, 2 * 2120)
    assert count_mllm_tokens("NVILA-HD-Video", GazeOutput.full(GazeGrid([224]), 1, 2), 90, 90) is None
    with pytest.raises(ValueError, match="`mllm` must be one of 'LLaVA-OneVision'"):
        count_mllm_tokens("GPT", gaze, 90, 160)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"selectors": ("/etc",)}, "Selector 1 must be one of features"),
        ({"budget": "all"}, "Budget must be one of"),
        ({"patches": None}, "Patches must be one of"),
        ({"tiles": "many"}, "Frames are seen as must be one of"),
        ({"mllm": "GPT"}, "MLLM must be one of"),
        ({"ratio": 0}, "share must be a number above 0 and up to 1, got 0"),
        ({"ratio": float("nan")}, "share must be a number"),
        ({"ratio": "1"}, "share must be a number"),
        ({"threshold": "low"}, "threshold must be a number, or empty"),
        ({"num_frames": 2.5}, "Frames must be a whole number"),
        ({"num_frames": True}, "Frames must be a whole number"),
        ({"max_tiles": 0}, "Tiles must be a whole number"),
        ({"budget": "None: threshold alone"}, "there must be a threshold"),
    ],
)
def test_choices_out_of_range_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        Choices(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "limits", "reason"),
    [
        ({"num_frames": 65}, {}, "Frames must be 64 at most, got 65"),
        ({"tiles": "Frames as large as they are"}, {"gazed_pixels": 60_000}, "8 frames are too many .* Take 4 frames"),
        ({}, {"seconds": 0.5}, r"clip.mp4 has 1 seconds and 8 frames. Videos of up to 0.5 seconds"),
        ({}, {"pixels": 100 * 100}, r"clip.mp4 has 128x96 pixels. Videos of up to"),
        ({}, {"megabytes": 0}, r"clip.mp4 has 0 MB. Videos of up to"),
        ({"num_frames": 1, "patches": "The MLLM's own", "mllm": "Qwen2.5-VL"}, {}, "2 frames at least"),
    ],
)
def test_limits_are_said_before_a_selector_gazes(clips, loaded, tmp_path, changes, limits, reason):
    reports = []
    with pytest.raises(ValueError, match=reason):
        prune_for_page(
            clips["good"],
            "clip.mp4",
            Choices(**{**GOOD, **changes}),
            Limits(**limits),
            loaded,
            tmp_path / "results",
            lambda *stage: reports.append(stage),
        )
    assert not any("reading" in stage or "choosing" in stage for stage, _, _ in reports)


def test_work_ends_where_it_is_cancelled(clips, loaded, tmp_path):
    def report(stage, done, total):
        if "drawing" in stage and done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        prune_for_page(clips["good"], "clip.mp4", Choices(**GOOD), Limits(), loaded, tmp_path / "results", report)
    assert not list((tmp_path / "results").rglob("*.mp4"))


def test_a_visitor_has_one_job_and_the_next_one_waits():
    queue, go = JobQueue(max_running=1, max_waiting=1), threading.Event()
    first = queue.start("Ada", lambda job: go.wait(10))
    with pytest.raises(ValueError, match="still being worked on"):
        queue.start("Ada", lambda job: None)
    second = queue.start("Bob", lambda job: "Bob's")
    assert queue.num_ahead(second) == 1 and not second.is_done
    with pytest.raises(ValueError, match="Too many videos are waiting"):
        queue.start("Cy", lambda job: None)
    go.set()
    assert first.result() is True and second.result() == "Bob's"
    assert queue.start("Ada", lambda job: "again").result() == "again"


def test_jobs_are_cancelled_where_they_report_and_while_they_wait():
    queue, started = JobQueue(), threading.Event()

    def work(job):
        started.set()
        for number in range(1000):
            job.report("counting", number, 1000)
            time.sleep(0.01)

    running, waiting = queue.start("Ada", work), queue.start("Bob", work)
    started.wait(10)
    queue.cancel("Bob")
    queue.cancel("Ada")
    for job in (waiting, running):
        with pytest.raises(Cancelled):
            job.result()
    assert running.stage == "counting" and waiting.stage == ""
    last = queue.start("Ada", work)
    queue.close()
    with pytest.raises(Cancelled):
        last.result()


def test_only_uploads_are_taken(tmp_path):
    files = VisitorFiles(tmp_path / "files")
    folder = files.folder / UPLOADED
    folder.mkdir(parents=True)
    (folder / "clip.mp4").write_bytes(b"")
    (tmp_path / "secret.mp4").write_bytes(b"")
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    results = files.new_results("Ada")
    (results / "overlay.mp4").write_bytes(b"")
    assert files.check_upload(str(folder / "clip.mp4")) == folder / "clip.mp4"
    assert files.check_upload(str(files.example())).name == "demo.mp4"
    bad = ["/etc/passwd", folder / "link.mp4", folder, folder / "..", folder / "../../secret.mp4", "clip.mp4"]
    bad += [results / "overlay.mp4", f"file://{folder}/clip.mp4", f"{folder}/clip.mp4\0", "http://127.0.0.1/clip.mp4"]
    for name in [*map(str, bad), 7, ["x"]]:
        with pytest.raises(ValueError, match="Only a video that was uploaded here"):
            files.check_upload(name)
    with pytest.raises(ValueError, match="Upload it again"):
        files.check_upload(str(folder / "gone.mp4"))
    with pytest.raises(ValueError, match="Choose a video first"):
        files.check_upload(None)


def test_files_go_with_their_visitor_or_when_they_are_old(tmp_path):
    files = VisitorFiles(tmp_path, max_age=3600)
    shared, own = (files.folder / (letter * 64) / "clip.mp4" for letter in "ab")
    for path in (shared, own):
        path.parent.mkdir()
        path.write_bytes(b"12345")
    files.remember("Ada", shared)
    files.remember("Ada", own)
    files.remember("Bob", shared)
    first, second = files.new_results("Ada"), files.new_results("Ada")
    assert not first.exists() and second.exists() and files.size() == 10
    files.forget("Ada")
    assert shared.exists() and not own.exists() and not second.exists()
    files.sweep()
    assert shared.exists()
    VisitorFiles(tmp_path, max_age=-1).sweep()
    assert not shared.exists()


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_out_of_range_is_refused(port):
    with pytest.raises(ValueError, match=f"`--port` must be in 1..65535, got {port}"):
        launch(port=port)


def test_the_limits_are_said_in_words():
    assert str(Limits()) == "Videos of up to 60 seconds, 100 MB and 1920x1080 pixels."
