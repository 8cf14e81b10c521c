"""
What of Gradio's API visitors may call, and which files they may name there.

Gradio serves more than this page needs: it fetches files from URLs that a call names, and streams foreign URLs. The guard stands
before it and passes on what a browser on this page sends, and nothing else.
"""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .uploads import VisitorFiles


_API = "/gradio_api/"
_CALLS = {"queue/join", "cancel", "reset"}
_READS = re.compile(
    r"info|startup-events|app_id|theme\.css|queue/(data|status)|upload_progress|heartbeat/\w+|file=.*|login_check|token|user"
)
_LONGEST_CALL = 2**16  # bytes

Message = MutableMapping[str, Any]


class UploadGuard:
    """
    An ASGI middleware that refuses what this page does not need.

    Args:
        app: what to pass calls on to.
        files ([`VisitorFiles`]): the files that may be named.
        max_upload (`int`): bytes of an upload.
        max_total (`int`): bytes of all files together.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], files: VisitorFiles, max_upload: int, max_total: int):
        self.app, self.files, self.max_upload, self.max_total = app, files, max_upload, max_total

    async def __call__(self, scope: Message, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_API):
            return await self.app(scope, receive, send)
        name = scope["path"].removeprefix(_API).rstrip("/")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            is_file = name.startswith("file=")
            if not _READS.fullmatch(name) or (is_file and not self.files.holds(name.removeprefix("file="))):
                return await _refuse(send, 403, "This is not served here.")
            return await self.app(scope, receive, send)
        if name == "upload":
            if (refusal := self._refuse_upload(scope)) is not None:
                return await _refuse(send, *refusal)
            return await self.app(scope, receive, send)
        if name not in _CALLS:
            return await _refuse(send, 403, "This is not served here.")
        body = await _read(receive)
        if body is None:
            return await _refuse(send, 413, "The call is too long.")
        if not self._names_own_files(body):
            return await _refuse(send, 403, "Only files that were uploaded here can be named.")

        async def receive_again() -> Message:
            # Once the body was given, the next message is that the visitor has gone.
            nonlocal body
            if body is None:
                return await receive()
            given, body = body, None
            return {"type": "http.request", "body": given, "more_body": False}

        return await self.app(scope, receive_again, send)

    def _refuse_upload(self, scope: Message) -> tuple[int, str] | None:
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "An upload must tell its length."
        # The form around a file takes some bytes, too.
        if int(length) > self.max_upload + _LONGEST_CALL:
            return 413, f"The file is larger than {self.max_upload / 1e6:.0f} MB."
        self.files.sweep()
        if self.files.size() + int(length) > self.max_total:
            return 507, "There is no room for more videos now. Try again later."
        return None

    def _names_own_files(self, body: bytes) -> bool:
        try:
            return self._may_name(json.loads(body))
        except (ValueError, RecursionError):
            return False

    def _may_name(self, value: Any) -> bool:
        """Tells whether every file that is named anywhere in a call lies in the visitors' folder."""
        if isinstance(value, list):
            return all(map(self._may_name, value))
        if not isinstance(value, dict):
            return True
        # A dictionary with any of these is a file to Gradio.
        if value.keys() & {"path", "is_stream", "orig_name", "mime_type"} or "FileData" in str(value.get("meta")):
            path = value.get("path")
            if not isinstance(path, str) or not self.files.holds(path) or value.get("is_stream"):
                return False
        return all(map(self._may_name, value.values()))


async def _read(receive: Callable) -> bytes | None:
    """Reads the body of a call; `None` if it is too long."""
    body, more = b"", True
    while more and len(body) <= _LONGEST_CALL:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body if len(body) <= _LONGEST_CALL else None


async def _refuse(send: Callable, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
