"""HLVid as a task: what it reads, shows and asks, and how answers count."""

import importlib.util

import pytest
from local_benchmark import FIELDS

from transformers_autogaze.lmms_harness import TASKS


HLVID = TASKS / "hlvid"


@pytest.fixture(scope="module")
def hlvid():
    spec = importlib.util.spec_from_file_location("hlvid_utils", HLVID / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_doc(number: int = 0, path: str = "clip_household_1.mp4", answer: str = "B") -> dict:
    return dict(zip(FIELDS, (number, "household", path, "What?\nA. x\nB. y\n", answer), strict=True))


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("The answer is (C).", "C"),
        ("D. a red cup", "D"),
        ("B or C", "B"),
        ("Because of the cup: A", "A"),
        ("b", None),
        ("ABCD", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_first_letter_that_stands_alone_is_the_answer(hlvid, response, letter):
    item = hlvid.process_results(make_doc(), [response])["accuracy"]
    assert item["letter"] == letter and item["score"] == float(letter == "B")


def test_accuracy_counts_questions_and_videos(hlvid):
    answers = [("one.mp4", "B"), ("one.mp4", "B"), ("one.mp4", "C"), ("two.mp4", "C")]
    items = [
        hlvid.process_results(make_doc(number, path), [response])["accuracy"]
        for number, (path, response) in enumerate(answers)
    ]
    assert hlvid.accuracy(items) == 50
    assert hlvid.accuracy_of_videos(items) == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_the_interval_is_over_videos_and_not_over_questions(hlvid):
    """Many questions about few videos say little more than few questions."""

    def interval(questions_each):
        items = [
            {"video_path": f"{video}.mp4", "score": float(video % 2)}
            for video in range(20)
            for _ in range(questions_each)
        ]
        return hlvid.accuracy_low(items), hlvid.accuracy_high(items)

    low, high = interval(1)
    assert 20 < low < 35 and 65 < high < 80  # 50 +- 1.96 * 100 * sqrt(0.25 / 20)
    assert interval(10) == (low, high)


def test_without_any_variation_the_interval_is_one_number(hlvid):
    items = [{"video_path": "one.mp4", "score": 1.0}, {"video_path": "two.mp4", "score": 1.0}]
    assert hlvid.accuracy_low(items) == hlvid.accuracy_high(items) == 100


def test_videos_are_found_in_the_folder_that_the_environment_names(hlvid, tmp_path, monkeypatch):
    monkeypatch.delenv("HLVID_VIDEOS", raising=False)
    with pytest.raises(ValueError, match="HLVID_VIDEOS must name the folder"):
        hlvid.doc_to_visual(make_doc())
    monkeypatch.setenv("HLVID_VIDEOS", str(tmp_path))
    with pytest.raises(ValueError, match="has no 'videos/clip.mp4'"):
        hlvid.doc_to_visual(make_doc(path="videos/clip.mp4"))
    (tmp_path / "clip.mp4").touch()
    assert hlvid.doc_to_visual(make_doc(path="videos/clip.mp4")) == [str(tmp_path / "clip.mp4")]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "clip.mp4").touch()
    assert hlvid.doc_to_visual(make_doc(path="videos/clip.mp4")) == [str(tmp_path / "videos" / "clip.mp4")]


def test_the_published_data_set_is_named():
    text = (HLVID / "hlvid.yaml").read_text()
    assert "dataset_path: bfshi/HLVid\ntest_split: test\n" in text
