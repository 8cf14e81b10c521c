"""
A middleware that limits which routes of Gradio's API can be called, and which files a call can name.

Gradio's API does more than this page needs: it downloads files from URLs in a call, and forwards streams from other servers. The
middleware passes on the requests that this page sends, and refuses all others.
"""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .uploads import VisitorFiles


_API = "/gradio_api/"
_POST_ROUTES = {"queue/join", "cancel", "reset"}
_GET_ROUTES = re.compile(
    r"info|startup-events|app_id|theme\.css|queue/(data|status)|upload_progress|heartbeat/\w+|file=.*|login_check|token|user"
)
_MAX_BODY = 2**16  # bytes

Message = MutableMapping[str, Any]


class UploadGuard:
    """
    An ASGI middleware that refuses requests which this page does not send.

    Args:
        app: the ASGI application that gets the accepted requests.
        files ([`VisitorFiles`]): the files that a call can name.
        max_upload (`int`): maximum size of an upload in bytes.
        max_total (`int`): maximum size of all files together in bytes.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], files: VisitorFiles, max_upload: int, max_total: int):
        self.app, self.files, self.max_upload, self.max_total = app, files, max_upload, max_total

    async def __call__(self, scope: Message, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_API):
            return await self.app(scope, receive, send)
        name = scope["path"].removeprefix(_API).rstrip("/")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            is_file = name.startswith("file=")
            if not _GET_ROUTES.fullmatch(name) or (is_file and not self.files.holds(name.removeprefix("file="))):
                return await _refuse(send, 403, "This is not served here.")
            return await self.app(scope, receive, send)
        if name == "upload":
            if (refusal := self._refuse_upload(scope)) is not None:
                return await _refuse(send, *refusal)
            return await self.app(scope, receive, send)
        if name not in _POST_ROUTES:
            return await _refuse(send, 403, "This is not served here.")
        body = await _read(receive)
        if body is None:
            return await _refuse(send, 413, "The call is too long.")
        if not self._names_own_files(body):
            return await _refuse(send, 403, "Only files that were uploaded here can be named.")

        async def receive_again() -> Message:
            # The body comes once; the next message after it is `http.disconnect`.
            nonlocal body
            if body is None:
                return await receive()
            content, body = body, None
            return {"type": "http.request", "body": content, "more_body": False}

        return await self.app(scope, receive_again, send)

    def _refuse_upload(self, scope: Message) -> tuple[int, str] | None:
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "An upload must have a Content-Length header."
        # The multipart form around the file adds some bytes.
        if int(length) > self.max_upload + _MAX_BODY:
            return 413, f"The file is larger than {self.max_upload / 1e6:.0f} MB."
        self.files.sweep()
        if self.files.size() + int(length) > self.max_total:
            return 507, "The server has no space for more videos now. Try again later."
        return None

    def _names_own_files(self, body: bytes) -> bool:
        try:
            return self._has_only_own_files(json.loads(body))
        except (ValueError, RecursionError):
            return False

    def _has_only_own_files(self, value: Any) -> bool:
        """Whether every file named anywhere in a call is inside the folder of the visitors' files."""
        if isinstance(value, list):
            return all(map(self._has_only_own_files, value))
        if not isinstance(value, dict):
            return True
        # Gradio takes a dictionary with any of these keys for a file.
        if value.keys() & {"path", "is_stream", "orig_name", "mime_type"} or "FileData" in str(value.get("meta")):
            path = value.get("path")
            if not isinstance(path, str) or not self.files.holds(path) or value.get("is_stream"):
                return False
        return all(map(self._has_only_own_files, value.values()))


async def _read(receive: Callable) -> bytes | None:
    """Reads the body of a call; `None` if it is too long."""
    body, more = b"", True
    while more and len(body) <= _MAX_BODY:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body if len(body) <= _MAX_BODY else None


async def _refuse(send: Callable, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
