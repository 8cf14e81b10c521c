"""The page: its components and event handlers."""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from transformers_autogaze_cli.prune import SELECTORS

from ..pruning.video_pruning import GAZE_FILE, OVERLAY
from .choices import BUDGETS, OF_MLLM, PATCHES, TILES, Choices
from .jobs import Cancelled, Job, JobQueue
from .limits import Limits
from .mllm_tokens import MLLMS, NVILA
from .reports import caption_of, describe_error, figures, message, progress, timeline
from .uploads import VisitorFiles
from .work import Result, Selectors, prune_for_page


logger = logging.getLogger(__name__)

NO_SECOND = "none"
_POLL_INTERVAL = 0.3  # seconds between two status updates of a job
_ABOUT = """# AutoGaze
Keep only the patches of a video that matter, before it reaches a vision encoder. Drop a video or record one, choose how much to \
keep, and see which patches are kept and how many tokens that saves."""
_SELECTORS_INFO = (
    "features: distilled from DINOv2, the default. finest, greedy: greedy search on pixels, at one scale or four. autogaze: the "
    "published weights, downloaded from the Hub (no commercial use), which need a share of every frame or a threshold alone."
)


class Page:
    """
    The page's components and event handlers.

    Args:
        files ([`VisitorFiles`]): the files of visitors.
        limits ([`Limits`]): limits on videos and on the work.
        selectors ([`Selectors`]): loads the selectors.
        queue ([`JobQueue`]): runs the jobs.
    """

    def __init__(self, files: VisitorFiles, limits: Limits, selectors: Selectors, queue: JobQueue):
        self.files, self.limits, self.selectors, self.queue = files, limits, selectors, queue

    def build(self) -> gr.Blocks:
        """Lays out the components and connects the event handlers."""
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
        # With sound: Gradio would need FFmpeg's command line to remove it.
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
            # Not a `gr.Number`, which turns an empty field into 0.
            self.threshold = gr.Textbox(
                label="Threshold",
                placeholder="none",
                max_length=20,
                info="Loss at which no more patches of a frame are chosen. features: share of the encoder's variance, 0 to 1; others: (40 - PSNR) / 20.",
            )
            self.num_frames = gr.Slider(1, self.limits.frames, value=16, step=1, label="Frames, evenly over the video")
            self.patches = gr.Radio(
                list(PATCHES),
                value=PATCHES[0],
                label="Patches to choose from",
                info="Qwen2.5-VL's own are merge units: 28x28 pixels of two frames.",
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
                # Side by side if the window is wide enough for three panels each, otherwise below each other.
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
        choices = [self.selector, self.second, self.budget, self.ratio, self.threshold, self.num_frames]
        choices += [self.patches, self.tiles, self.max_tiles, self.mllm]
        results = [self.start, self.cancel, self.status, self.timeline, self.figures, *self.columns, *self.captions]
        results += self.overlays
        results += [button for files in self.downloads for button in files]
        # Private: these handlers are no public API.
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        self.start.click(self.prune, [self.video, *choices], results, **options)
        self.cancel.click(self.stop, None, self.cancel, **options)
        self.example.click(self.take_example, None, self.video, **options)
        self.video.change(self.describe_video, self.video, self.status, **options)
        for component in (self.patches, self.tiles, self.mllm):
            component.change(
                show_tiles, [self.patches, self.tiles, self.mllm], [self.tiles, self.max_tiles], **options
            )
        self.budget.change(
            lambda budget: gr.update(visible=BUDGETS.get(budget) is not None), self.budget, self.ratio, **options
        )
        # With this attribute screen readers announce changes of the status.
        blocks.load(None, js="() => document.getElementById('status').setAttribute('aria-live', 'polite')")
        blocks.unload(self.leave)

    def take_example(self) -> str:
        """Returns the example clip, which becomes the video to prune."""
        return str(self.files.example())

    def describe_video(self, video: str | None, request: gr.Request) -> str:
        """Checks a video as soon as it is uploaded, and returns its size and length or an error message."""
        if not video:
            return message("Nothing is pruned yet.")
        try:
            path = self.files.check_upload(video)
            self.files.remember(request.session_hash, path)
            metadata = self.limits.open(path, path.name).metadata
        except (OSError, ValueError) as error:
            return message(describe_error(error, {video: Path(video).name}), is_error=True)
        size = f"{metadata.total_num_frames} frames of {metadata.width}x{metadata.height}"
        seconds = "" if metadata.duration is None else f", {metadata.duration:.1f} seconds"
        return message(f"{path.name}: {size}{seconds}.")

    async def prune(self, request: gr.Request, video: str | None, *settings: Any) -> AsyncIterator[dict[Any, Any]]:
        """Prunes a video, and yields updates of the components: the progress, then the results."""
        visitor = request.session_hash
        try:
            path = self.files.check_upload(video)
            choices = _read_choices(*settings)
            self.files.remember(visitor, path)
            job = self.queue.start(visitor, partial(self._work, path, choices, visitor))
        except ValueError as error:
            yield {self.status: message(describe_error(error, {}), is_error=True)}
            return
        yield {
            self.start: gr.update(interactive=False),
            self.cancel: gr.update(interactive=True),
            **self._clear_results(),
        }
        try:
            async for status in self._poll(job):
                yield {self.status: status}
            results = self._show_results(job, choices, path)
        finally:
            # Not done here: the visitor has closed the page, or Gradio stops.
            if not job.is_done:
                job.cancel()
        yield {self.start: gr.update(interactive=True), self.cancel: gr.update(interactive=False), **results}

    async def _poll(self, job: Job) -> AsyncIterator[str]:
        """Yields the status of a job whenever it changes, until the job has ended."""
        last = None
        while not job.is_done:
            ahead = self.queue.num_ahead(job)
            if job.is_cancelled:
                now = message("Cancelling.")
            elif not job.stage and ahead:
                now = progress(f"Waiting for {ahead} other video{'s' * (ahead > 1)}", 0, 0)
            else:
                now = progress(job.stage or "Starting", job.done, job.total)
            if now != last:
                yield now
            last = now
            await asyncio.sleep(_POLL_INTERVAL)

    def _work(self, path: Path, choices: Choices, visitor: str, job: Job) -> list[Result]:
        self.files.sweep()
        folder = self.files.new_results(visitor)
        return prune_for_page(path, path.name, choices, self.limits, self.selectors, folder, job.report)

    def _show_results(self, job: Job, choices: Choices, path: Path) -> dict[Any, Any]:
        """Returns updates of the components for a job that has ended."""
        try:
            results = job.result()
        except Cancelled:
            return {self.status: message("Cancelled.")}
        except (ImportError, OSError, ValueError) as error:
            return {self.status: message(describe_error(error, {str(path): path.name}), is_error=True)}
        except Exception:
            logger.exception("A job failed")
            return {self.status: message("Pruning failed because of an internal error.", is_error=True)}
        updates: dict[Any, Any] = {
            self.status: message(f"Done in {sum(result.seconds for result in results):.1f} s."),
            self.timeline: timeline(results),
            self.figures: figures(results, choices),
        }
        parts = zip(results, self.columns, self.captions, self.overlays, self.downloads, strict=False)
        for result, column, caption, overlay, files in parts:
            updates[column] = gr.update(visible=True)
            updates[caption] = caption_of(result)
            updates[overlay] = gr.update(value=str(result.overlay))
            for button, file in zip(files, (result.overlay, result.gaze_file), strict=True):
                updates[button] = gr.update(value=str(file))
        return updates

    def _clear_results(self) -> dict[Any, Any]:
        """Returns updates of the components that hide earlier results."""
        updates: dict[Any, Any] = {column: gr.update(visible=False) for column in self.columns}
        updates |= {overlay: gr.update(value=None) for overlay in self.overlays}
        return updates | {self.timeline: "", self.figures: ""}

    def stop(self, request: gr.Request) -> dict[str, Any]:
        """Cancels a visitor's job."""
        self.queue.cancel(request.session_hash)
        return gr.update(interactive=False)

    def leave(self, request: gr.Request) -> None:
        """Cancels the job and removes the files of a visitor who closes the page."""
        self.queue.cancel(request.session_hash)
        self.files.forget(request.session_hash)


def show_tiles(patches: str, tiles: str, mllm: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hides the settings of tiles that are ignored with the other settings."""
    is_of_mllm = patches == OF_MLLM
    is_grid = mllm == NVILA if is_of_mllm else TILES.get(tiles) == "grid"
    return gr.update(visible=not is_of_mllm), gr.update(visible=is_grid)


def _read_choices(
    selector: str, second: str, budget: str, ratio: float, threshold: str | None, num_frames: int, *others: Any
) -> Choices:
    selectors = (selector,) if second == NO_SECOND else (selector, second)
    # Gradio sends `None` for a field that was never visible.
    threshold = (threshold or "").strip()
    try:
        loss = float(threshold) if threshold else None
    except ValueError as error:
        raise ValueError(f"The threshold must be a number, or empty, got {threshold!r}.") from error
    return Choices(selectors, budget, ratio, loss, num_frames, *others)
