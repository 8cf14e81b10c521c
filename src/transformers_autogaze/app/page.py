"""The page: what visitors see and choose, and what happens when they ask for something."""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from transformers_autogaze_cli.prune import SELECTORS

from ..pruning import GAZE_FILE, OVERLAY
from .choices import BUDGETS, OF_MLLM, PATCHES, TILES, Choices
from .jobs import Cancelled, Job, JobBoard
from .limits import Limits
from .mllm_tokens import MLLMS, NVILA
from .reports import caption_of, describe_error, figures, message, progress, timeline
from .uploads import VisitorFiles
from .work import Result, Selectors, prune_for_page


logger = logging.getLogger(__name__)

NO_SECOND = "none"
_LOOK_AGAIN = 0.3  # seconds between two looks at a job
_ABOUT = """# AutoGaze
Keep the patches of a video that matter, before a vision encoder sees it. Drop a video or record one, choose how much is kept, and \
see which patches that are, and what they save."""
_SELECTORS_INFO = (
    "features: distilled from DINOv2, the default. finest, greedy: search on pixels, of one scale or four. autogaze: the published "
    "weights, fetched from the Hub (no commercial use); it needs a share of every frame, or a threshold alone."
)


class Page:
    """
    The page and what it works with.

    Args:
        files ([`VisitorFiles`]): where the files of visitors lie.
        limits ([`Limits`]): what visitors may ask for.
        selectors ([`Selectors`]): what chooses.
        board ([`JobBoard`]): what runs their jobs.
    """

    def __init__(self, files: VisitorFiles, limits: Limits, selectors: Selectors, board: JobBoard):
        self.files, self.limits, self.selectors, self.board = files, limits, selectors, board

    def build(self) -> gr.Blocks:
        """Lays out the page and connects it."""
        max_age = int(self.files.max_age)
        with gr.Blocks(
            title="AutoGaze", analytics_enabled=False, delete_cache=(600, max_age), fill_width=True
        ) as blocks:
            gr.Markdown(f"{_ABOUT}\n\n{self.limits} Files are removed when you leave the page.")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._lay_out_choices()
                with gr.Column(scale=3, min_width=320):
                    self._lay_out_results()
            self._connect(blocks)
        return blocks

    def _lay_out_choices(self) -> None:
        # With its sound, as taking it out would need FFmpeg's command line.
        self.video = gr.Video(
            label="Video",
            sources=["upload", "webcam"],
            include_audio=True,
            height=320,
            webcam_options=gr.WebcamOptions(mirror=False),
            elem_id="video",
        )
        self.example = gr.Button("Take the example clip", size="sm")
        self.selector = gr.Dropdown(list(SELECTORS), value=SELECTORS[0], label="Selector", info=_SELECTORS_INFO)
        self.second = gr.Dropdown([NO_SECOND, *SELECTORS], value=NO_SECOND, label="Compare with")
        self.budget = gr.Radio(list(BUDGETS), value=next(iter(BUDGETS)), label="Budget")
        self.ratio = gr.Slider(0.01, 1, value=0.25, step=0.01, label="Share to keep")
        self.mllm = gr.Dropdown(list(MLLMS), value=MLLMS[0], label="Count tokens for")
        with gr.Accordion("More choices", open=False):
            # No number field, which makes a zero of nothing.
            self.threshold = gr.Textbox(
                label="Threshold",
                placeholder="none",
                max_length=20,
                info="Loss at which a frame is good enough. features: share of the encoder's variance, 0 to 1; the others: (40 - PSNR) / 20.",
            )
            self.num_frames = gr.Slider(1, self.limits.frames, value=16, step=1, label="Frames, evenly over the video")
            self.patches = gr.Radio(
                list(PATCHES),
                value=PATCHES[0],
                label="Patches to choose from",
                info="Of Qwen2.5-VL these are merge units, 28x28 pixels in two frames.",
            )
            self.tiles = gr.Radio(list(TILES), value=next(iter(TILES)), label="Frames are seen as")
            self.max_tiles = gr.Slider(1, 12, value=4, step=1, label="Tiles of a frame at most", visible=False)
        with gr.Row():
            self.start = gr.Button("Prune", variant="primary", elem_id="start")
            self.cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")

    def _lay_out_results(self) -> None:
        self.status = gr.HTML(message("Nothing is pruned yet."), elem_id="status", container=False, padding=False)
        self.columns, self.captions, self.overlays, self.downloads = [], [], [], []
        with gr.Row():
            for number in (1, 2):
                # Side by side where there is room for three panels each, else below each other.
                with gr.Column(visible=False, min_width=480) as column:
                    self.captions.append(gr.HTML(container=False, padding=False))
                    overlay = gr.Video(
                        interactive=False,
                        autoplay=True,
                        loop=True,
                        buttons=[],
                        show_label=False,
                        elem_classes="autogaze-overlay",
                        elem_id=f"overlay-{number}",
                    )
                    with gr.Row():
                        names = OVERLAY, GAZE_FILE
                        files = [gr.DownloadButton(f"Download {name}", size="sm", min_width=140) for name in names]
                self.columns.append(column)
                self.overlays.append(overlay)
                self.downloads.append(files)
        self.timeline = gr.HTML(elem_id="timeline", container=False, padding=False)
        self.figures = gr.HTML(elem_id="figures", container=False, padding=False)

    def _connect(self, blocks: gr.Blocks) -> None:
        chosen = [self.selector, self.second, self.budget, self.ratio, self.threshold, self.num_frames]
        chosen += [self.patches, self.tiles, self.max_tiles, self.mllm]
        shown = [self.start, self.cancel, self.status, self.timeline, self.figures, *self.columns, *self.captions]
        shown += self.overlays
        shown += [button for files in self.downloads for button in files]
        # The calls are the page's own; what they take is nobody's interface.
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        self.start.click(self.prune, [self.video, *chosen], shown, **quiet)
        self.cancel.click(self.stop, None, self.cancel, **quiet)
        self.example.click(self.take_example, None, self.video, **quiet)
        self.video.change(self.look_at, self.video, self.status, **quiet)
        for part in (self.patches, self.tiles, self.mllm):
            part.change(show_tiles, [self.patches, self.tiles, self.mllm], [self.tiles, self.max_tiles], **quiet)
        self.budget.change(
            lambda budget: gr.update(visible=BUDGETS.get(budget) is not None), self.budget, self.ratio, **quiet
        )
        # Screen readers say what changes there.
        blocks.load(None, js="() => document.getElementById('status').setAttribute('aria-live', 'polite')")
        blocks.unload(self.leave)

    def take_example(self) -> str:
        """Puts the example where a visitor's video goes."""
        return str(self.files.example())

    def look_at(self, video: str | None, request: gr.Request) -> str:
        """Says what a video is as soon as it is there, and what is wrong with it."""
        if not video:
            return message("Nothing is pruned yet.")
        try:
            path = self.files.check_upload(video)
            self.files.remember(request.session_hash, path)
            known = self.limits.open(path, path.name).metadata
        except (OSError, ValueError) as error:
            return message(describe_error(error, {video: Path(video).name}), is_error=True)
        seconds = "" if known.duration is None else f", {known.duration:.1f} seconds"
        return message(f"{path.name}: {known.total_num_frames} frames of {known.width}x{known.height}{seconds}.")

    async def prune(self, request: gr.Request, video: str | None, *chosen: Any) -> AsyncIterator[dict[Any, Any]]:
        """Prunes a video and tells how far it is."""
        visitor = request.session_hash
        try:
            path = self.files.check_upload(video)
            choices = _read_choices(*chosen)
            self.files.remember(visitor, path)
            job = self.board.start(visitor, partial(self._work, path, choices, visitor))
        except ValueError as error:
            yield {self.status: message(describe_error(error, {}), is_error=True)}
            return
        yield {self.start: gr.update(interactive=False), self.cancel: gr.update(interactive=True), **self._hidden()}
        try:
            async for told in self._watch(job):
                yield {self.status: told}
            shown = self._show(job, choices, path)
        finally:
            # The visitor has gone, or Gradio stops.
            if not job.is_done:
                job.cancel()
        yield {self.start: gr.update(interactive=True), self.cancel: gr.update(interactive=False), **shown}

    async def _watch(self, job: Job) -> AsyncIterator[str]:
        """Tells how far a job is until it has ended."""
        last = None
        while not job.is_done:
            before = self.board.num_before(job)
            if job.is_cancelled:
                now = message("Cancelling.")
            elif not job.stage and before:
                now = progress(f"Waiting for {before} other video{'s' * (before > 1)}", 0, 0)
            else:
                now = progress(job.stage or "Starting", job.done, job.total)
            if now != last:
                yield now
            last = now
            await asyncio.sleep(_LOOK_AGAIN)

    def _work(self, path: Path, choices: Choices, visitor: str, job: Job) -> list[Result]:
        self.files.sweep()
        folder = self.files.new_results(visitor)
        return prune_for_page(path, path.name, choices, self.limits, self.selectors, folder, job.report)

    def _show(self, job: Job, choices: Choices, path: Path) -> dict[Any, Any]:
        """Gives what the page shows of a job that has ended."""
        try:
            results = job.result()
        except Cancelled:
            return {self.status: message("Cancelled.")}
        except (ImportError, OSError, ValueError) as error:
            return {self.status: message(describe_error(error, {str(path): path.name}), is_error=True)}
        except Exception:
            logger.exception("A job failed")
            return {self.status: message("That did not work; the fault is on our side.", is_error=True)}
        shown = {
            self.status: message(f"Done in {sum(result.seconds for result in results):.1f} s."),
            self.timeline: timeline(results),
            self.figures: figures(results, choices),
        }
        parts = zip(results, self.columns, self.captions, self.overlays, self.downloads, strict=False)
        for result, column, caption, overlay, files in parts:
            shown[column] = gr.update(visible=True)
            shown[caption] = caption_of(result)
            shown[overlay] = gr.update(value=str(result.overlay))
            for button, file in zip(files, (result.overlay, result.gaze_file), strict=True):
                shown[button] = gr.update(value=str(file))
        return shown

    def _hidden(self) -> dict[Any, Any]:
        """Takes away what is shown of an earlier video."""
        hidden: dict[Any, Any] = {column: gr.update(visible=False) for column in self.columns}
        hidden |= {overlay: gr.update(value=None) for overlay in self.overlays}
        return hidden | {self.timeline: "", self.figures: ""}

    def stop(self, request: gr.Request) -> dict[str, Any]:
        """Cancels a visitor's job."""
        self.board.cancel(request.session_hash)
        return gr.update(interactive=False)

    def leave(self, request: gr.Request) -> None:
        """Ends and removes what belongs to a visitor who leaves."""
        self.board.cancel(request.session_hash)
        self.files.forget(request.session_hash)


def show_tiles(patches: str, tiles: str, mllm: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shows the choices of tiles where they matter."""
    of_mllm = patches == OF_MLLM
    is_grid = mllm == NVILA if of_mllm else TILES.get(tiles) == "grid"
    return gr.update(visible=not of_mllm), gr.update(visible=is_grid)


def _read_choices(
    selector: str, second: str, budget: str, ratio: float, threshold: str | None, num_frames: int, *others: Any
) -> Choices:
    selectors = (selector,) if second == NO_SECOND else (selector, second)
    # A field that was never shown sends nothing.
    threshold = (threshold or "").strip()
    try:
        loss = float(threshold) if threshold else None
    except ValueError as error:
        raise ValueError(f"The threshold must be a number, or empty, got {threshold!r}.") from error
    return Choices(selectors, budget, ratio, loss, num_frames, *others)
