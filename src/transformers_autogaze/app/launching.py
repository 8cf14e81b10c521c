"""Serves the page; uploads and results are in a temporary folder that is removed when the server stops."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any


_MAX_PORT = 65535
_CSS = Path(__file__).parent / "page.css"
_MAX_STORED_UPLOADS = 20  # of the maximum size; limits the size of the temporary folder


def launch(host: str | None = None, port: int | None = None, device: str | None = None) -> None:
    """
    Serves the page until the process is stopped.

    Args:
        host (`str`, *optional*): address to listen at; the environment variable `GRADIO_SERVER_NAME` or 127.0.0.1 by default.
        port (`int`, *optional*): port to listen at, 1..65535; the environment variable `GRADIO_SERVER_PORT` or the first free
            port from 7860 on by default.
        device (`str`, *optional*): device to compute on; CUDA if it is available, otherwise the CPU, by default.

    Raises:
        ImportError: if Gradio is not installed.
        OSError: if the port is in use.
        ValueError: if `port` is out of range, or torch cannot compute on `device`.
    """
    if port is not None and not 1 <= port <= _MAX_PORT:
        raise ValueError(f"`--port` must be in 1..{_MAX_PORT}, got {port}")
    try:
        import gradio  # noqa: F401
        from starlette.middleware import Middleware
    except ImportError as error:
        raise ImportError('the page needs Gradio: pip install "transformers-autogaze[app]"') from error

    from ..hub.checkpoints import check_device
    from .guard import UploadGuard
    from .jobs import JobQueue
    from .limits import Limits
    from .page import Page
    from .uploads import VisitorFiles
    from .work import Selectors

    selectors, queue = Selectors(check_device(device)), JobQueue()
    _stop_at_sigterm()
    with tempfile.TemporaryDirectory(prefix="autogaze-app-", ignore_cleanup_errors=True) as folder:
        files, limits = VisitorFiles(Path(folder)), Limits()
        # Gradio reads these variables when the page is built.
        os.environ |= {"GRADIO_TEMP_DIR": str(files.folder), "GRADIO_ANALYTICS_ENABLED": "False"}
        blocks = Page(files, limits, selectors, queue).build()
        max_upload = limits.megabytes * 10**6
        guard = Middleware(UploadGuard, files=files, max_upload=max_upload, max_total=_MAX_STORED_UPLOADS * max_upload)
        try:
            blocks.launch(
                server_name=host,
                server_port=port,
                theme=_theme(),
                css=_CSS.read_text(encoding="utf-8"),
                max_file_size=max_upload,
                app_kwargs={"middleware": [guard]},
                footer_links=[],
                run_history=False,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
            )
        finally:
            queue.close()


def _theme() -> Any:
    """Gradio's default theme with system fonts, which need no download, and with enough contrast for small text and buttons."""
    import gradio as gr

    colours = {
        "body_text_color_subdued": "*neutral_600",
        "body_text_color_subdued_dark": "*neutral_400",
        "block_info_text_color": "*neutral_600",
        "block_info_text_color_dark": "*neutral_400",
        "block_title_text_color": "*neutral_700",
        "block_title_text_color_dark": "*neutral_200",
        # White text on these has a contrast of 5 to 1.
        "button_primary_background_fill": "*primary_700",
        "button_primary_background_fill_hover": "*primary_800",
        "button_primary_background_fill_dark": "*primary_700",
        "button_primary_background_fill_hover_dark": "*primary_800",
    }
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(**colours)


def _stop_at_sigterm() -> None:
    """Ends the process at SIGTERM as at Ctrl+C, so that the folder is removed."""

    def stop(*_: Any) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
