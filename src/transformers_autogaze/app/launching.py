"""Serving the page, from a temporary folder that goes with it."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any


_CSS = Path(__file__).parent / "page.css"
_ROOM = 20  # uploads of the largest size that fit into the folder


def launch(host: str | None = None, port: int | None = None, device: str | None = None) -> None:
    """
    Serves the page until the process is stopped.

    Args:
        host (`str`, *optional*): address to listen at; this machine alone by default, or the environment variable
            `GRADIO_SERVER_NAME`.
        port (`int`, *optional*): port to listen at; the first that is free from 7860 on by default, or the environment variable
            `GRADIO_SERVER_PORT`.
        device (`str`, *optional*): where to compute; CUDA where there is one, or else the CPU, by default.

    Raises:
        ImportError: if Gradio is not installed.
        OSError: if the port is not free.
        ValueError: if torch cannot compute there.
    """
    try:
        import gradio  # noqa: F401
        from starlette.middleware import Middleware
    except ImportError as error:
        raise ImportError('the page needs Gradio: pip install "transformers-autogaze[app]"') from error

    from ..checkpoints import check_device
    from .guard import UploadGuard
    from .jobs import JobBoard
    from .limits import Limits
    from .page import Page
    from .uploads import VisitorFiles
    from .work import Selectors

    selectors, board = Selectors(check_device(device)), JobBoard()
    _stop_at_sigterm()
    with tempfile.TemporaryDirectory(prefix="autogaze-app-", ignore_cleanup_errors=True) as folder:
        files, limits = VisitorFiles(Path(folder)), Limits()
        # Gradio reads them when the page is built.
        os.environ |= {"GRADIO_TEMP_DIR": str(files.folder), "GRADIO_ANALYTICS_ENABLED": "False"}
        blocks = Page(files, limits, selectors, board).build()
        max_upload = limits.megabytes * 10**6
        guard = Middleware(UploadGuard, files=files, max_upload=max_upload, max_total=_ROOM * max_upload)
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
            board.close()


def _theme() -> Any:
    """Gradio's own colours with fonts of the visitor's machine, and small print that is dark enough to read."""
    import gradio as gr

    small_print = {
        "body_text_color_subdued": "*neutral_600",
        "body_text_color_subdued_dark": "*neutral_400",
        "block_info_text_color": "*neutral_600",
        "block_info_text_color_dark": "*neutral_400",
        "block_title_text_color": "*neutral_700",
        "block_title_text_color_dark": "*neutral_200",
        # White on it has a contrast of 5 to 1.
        "button_primary_background_fill": "*primary_700",
        "button_primary_background_fill_hover": "*primary_800",
        "button_primary_background_fill_dark": "*primary_700",
        "button_primary_background_fill_hover_dark": "*primary_800",
    }
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(**fonts).set(**small_print)


def _stop_at_sigterm() -> None:
    """Ends the process at SIGTERM as at Ctrl+C, so that the folder is removed."""

    def stop(*_: Any) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
