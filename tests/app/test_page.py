"""The page in a browser, as visitors see it."""

import json
import re
import time
from contextlib import contextmanager

import pytest


PATIENCE = 240_000  # milliseconds that a slow machine may take for one step

pytest.importorskip("gradio")
pytest.importorskip("playwright")


class Visitor:
    """A visitor with a browser of its own, which notes what goes wrong in it."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda entry: self.errors.append(entry.text) if entry.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "request", lambda sent: self.foreign.append(sent.url) if not self._is_own(sent.url, url) else None
        )
        self.page.goto(url)
        self.button("Prune").wait_for()

    @staticmethod
    def _is_own(address: str, url: str) -> bool:
        return address.startswith((url, f"blob:{url}", "data:"))

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)

    def upload(self, path) -> None:
        self.page.locator("#video input[type=file]").first.set_input_files(path)

    def wait_for(self, text: str) -> None:
        self.page.locator("#status", has_text=re.compile(text)).wait_for()

    def choose(self, label: str, option: str) -> None:
        self.page.get_by_label(label, exact=True).click()
        choice = self.page.get_by_role("option", name=option, exact=True)
        choice.click()
        choice.wait_for(
            state="hidden"
        )  # the list closes with an animation, and the next list may have the same option

    def figures(self) -> dict[str, list[str]]:
        rows = self.page.locator("#figures tr").all()
        return {row.locator("th").first.inner_text(): row.locator("td").all_inner_texts() for row in rows}


@pytest.fixture
def visit(server, browser):
    @contextmanager
    def visit(**options):
        visitor = Visitor(browser, server.url, **options)
        try:
            yield visitor
        finally:
            visitor.context.close()
        assert visitor.errors == [] and visitor.foreign == []

    return visit


def test_a_video_is_uploaded_and_pruned_and_its_files_can_be_taken_home(visit, clips, tmp_path):
    with visit() as visitor:
        visitor.upload(clips["good"])
        visitor.wait_for(r"good\.mp4: 8 frames of 128x96, 1\.0 seconds")
        visitor.button("Prune").click()
        visitor.wait_for("Done in")
        figures = visitor.figures()
        # A quarter of 14x14 patches in 8 frames, and the new line of LLaVA-OneVision.
        assert figures["Patches kept"] == ["392, 49.0 a frame"]
        assert figures["Tokens for LLaVA-OneVision"] == ["393 of 1,569 (75% saved)"]
        assert visitor.page.locator("#timeline circle").count() == 8
        video = visitor.page.locator("#overlay-1 video")
        video.wait_for()
        visitor.page.wait_for_function("document.querySelector('#overlay-1 video').videoWidth > 3 * 128")
        with visitor.page.expect_download() as download:
            visitor.button("Download gaze.json").first.click()
        download.value.save_as(tmp_path / "gaze.json")
        with visitor.page.expect_download() as download:
            visitor.button("Download overlay.mp4").first.click()
        download.value.save_as(tmp_path / "overlay.mp4")
    known = json.loads((tmp_path / "gaze.json").read_text())
    assert known["video"] == "good.mp4" and known["selector"] == "features"
    assert "/" not in json.dumps({key: known[key] for key in known if isinstance(known[key], str)})
    assert (tmp_path / "overlay.mp4").stat().st_size > 1000


def test_two_selectors_are_compared_on_the_example(visit):
    with visit() as visitor:
        visitor.button("Take the example clip").click()
        visitor.wait_for("64 frames of 512x288")
        visitor.choose("Selector", "finest")
        visitor.choose("Compare with", "greedy")
        visitor.choose("Count tokens for", "Qwen2.5-VL")
        visitor.page.get_by_role("button", name="More choices").click()
        visitor.page.get_by_label("number input for Frames, evenly over the video").fill("4")
        visitor.page.keyboard.press("Tab")
        visitor.button("Prune").click()
        visitor.wait_for("Done in")
        figures = visitor.figures()
        assert figures["Patches kept"][0] == "196, 49.0 a frame" and len(figures["Patches kept"]) == 2
        # Both count of 18x10 units in 2 pairs of frames.
        assert all("of 360 (" in tokens for tokens in figures["Tokens for Qwen2.5-VL"])
        assert visitor.page.locator("#overlay-2 video").is_visible()
        assert visitor.page.locator("#timeline polyline").count() == 2


def test_work_can_be_cancelled_and_something_else_done(visit, clips, server):
    with visit() as visitor:
        visitor.upload(clips["large"])
        visitor.wait_for("16 frames of 960x720")
        visitor.page.get_by_role("button", name="More choices").click()
        visitor.page.get_by_label("Frames as large as they are").check()
        visitor.button("Prune").click()
        visitor.wait_for("features: ")
        assert visitor.button("Prune").is_disabled()
        visitor.button("Cancel").click()
        visitor.wait_for(r"Cancelled\.")
        assert visitor.button("Cancel").is_disabled() and not visitor.page.locator("#overlay-1").is_visible()
        visitor.page.get_by_label("Whole frames, resized").check()
        visitor.page.locator("#video").get_by_label("Clear").click()
        visitor.upload(clips["other"])
        visitor.wait_for(r"other\.mp4: 6 frames")
        visitor.button("Prune").click()
        visitor.wait_for("Done in")


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ("broken", r"broken\.mp4.* is not a video that FFmpeg can open"),
        ("long", "has 6[78] seconds and 61 frames. Videos of up"),
    ],
)
def test_what_is_wrong_with_a_video_is_said_before_any_work(visit, clips, server, clip, reason):
    with visit() as visitor:
        visitor.upload(clips[clip])
        visitor.wait_for(reason)
        status_text = visitor.page.locator("#status").inner_text()
        visitor.button("Prune").click()
        visitor.page.wait_for_timeout(500)
        visitor.wait_for(reason)
        assert str(server.temporary) not in status_text and "Traceback" not in status_text
        visitor.errors = [error for error in visitor.errors if "MEDIA" not in error.upper()]


def test_pruning_without_a_video_says_what_to_do(visit):
    with visit() as visitor:
        visitor.button("Prune").click()
        visitor.wait_for("Choose a video first")


def test_two_visitors_at_once_get_each_their_own(visit, clips):
    with visit() as one, visit() as two:
        one.upload(clips["good"])
        two.upload(clips["other"])
        one.wait_for("good")
        two.wait_for("other")
        one.button("Prune").click()
        two.button("Prune").click()
        one.wait_for("Done in")
        two.wait_for("Done in")
        assert one.figures()["Patches kept"] == ["392, 49.0 a frame"]
        assert two.figures()["Patches kept"] == ["294, 49.0 a frame"]


def test_the_files_of_a_visitor_go_with_the_visitor(visit, clips, server):
    with visit() as visitor:
        visitor.upload(clips["other"])
        visitor.wait_for("other")
        visitor.button("Prune").click()
        visitor.wait_for("Done in")
        assert {path.name for path in server.files()} >= {"other.mp4", "gaze.json", "overlay.mp4"}
    end = time.monotonic() + 60
    while server.files() and time.monotonic() < end:
        time.sleep(0.5)
    assert server.files() == []


def test_the_page_can_be_used_by_keyboard_alone(visit):
    with visit() as visitor:
        example = visitor.button("Take the example clip")
        visitor.page.keyboard.press("Tab")
        for _ in range(12):
            if example.evaluate("button => button === document.activeElement"):
                break
            visitor.page.keyboard.press("Tab")
        visitor.page.keyboard.press("Enter")
        visitor.wait_for("64 frames")
        reached = set()
        for _ in range(40):
            visitor.page.keyboard.press("Tab")
            reached.add(
                visitor.page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText.trim()")
            )
            if "Prune" in reached:
                break
        assert {"Prune", "Selector", "Compare with", "Count tokens for"} <= reached


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_of_the_window(visit, clips, mode, width, tmp_path):
    with visit(color_scheme=mode, viewport={"width": width, "height": 900}) as visitor:
        visitor.upload(clips["good"])
        visitor.wait_for("good")
        visitor.button("Prune").click()
        visitor.wait_for("Done in")
        page = visitor.page
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        background = page.evaluate("getComputedStyle(document.querySelector('body')).backgroundColor")
        level = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert level < 80 if mode == "dark" else level > 200
