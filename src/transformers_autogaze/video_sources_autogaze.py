"""
Sources of videos: a path, a URL, bytes, a file object, a row of a dataset or a list of pictures.

Videos are opened with PyAV; formats that refer to other files are refused.
"""

import errno
import inspect
import os
import re
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO, TextIOBase
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any, NamedTuple, TypeGuard
from urllib.parse import quote, unquote_to_bytes, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, url2pathname

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps


PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of picture files; a list of such files is a video."""

# FFmpeg's flags of a still picture, such as the cover of a song, and of the default stream.
_COVER_PICTURE, _DEFAULT = 0x400, 0x1
# Metadata that are not UTF-8 are no reason to refuse a file. PyAV 19 accepts them and has no such option.
_METADATA_OPTIONS: dict[str, Any] = (
    {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}
)
# Pixels that FFmpeg's command line adds to the size of the default stream when it compares streams.
_DEFAULT_BONUS = 5_000_000
# Self-contained formats. Those that refer to other files or addresses (concat, hls, dash, imf, sdp, rtsp, mlv, vobsub,
# image2 ..), run scripts or read devices are left out; a list of those would miss new ones.
_FORMATS = ",".join(
    """
    mov matroska avi flv live_flv kux mpegts mpeg mpegvideo ogg asf asf_o mxf mxg nut nuv ivf gxf wtv rm ivr dv nsv pva
    swf gif apng lxf moflex dhav viv vivo ifv msnwctcp mpjpeg smjpeg mjpeg mjpeg_2000 ingenient
    h261 h263 h264 hevc vvc evc av1 obu m4v vc1 vc1test avs avs2 avs3 cavsvideo dirac dnxhd apv ipu yuv4mpegpipe
    cine r3d ser pdv fits filmstrip frm iv8 lmlm4 lvf sga 4xm anm bethsoftvid bfi bink bmv c93 cdg cdxl dfa dsicin dxa
    ea ea_cdata film_cpk flic gdv hnm idcin ipmovie jv mm mtv mv mvi nc paf psxstr rl2 roq rpl siff smk smush thp
    tiertexseq tmv usm vividas vmd wc3movie wsvqa xmv yop ico
    bmp_pipe dds_pipe dpx_pipe exr_pipe gem_pipe gif_pipe hdr_pipe j2k_pipe jpeg_pipe jpegls_pipe jpegxl_pipe
    jpegxl_anim pam_pipe pbm_pipe pcx_pipe pfm_pipe pgm_pipe pgmyuv_pipe pgx_pipe phm_pipe png_pipe ppm_pipe psd_pipe
    qdraw_pipe qoi_pipe sgi_pipe sunrast_pipe svg_pipe tiff_pipe vbn_pipe webp_pipe xbm_pipe xpm_pipe xwd_pipe
    wav w64 mp3 flac aac ac3 eac3 aiff amr au caf ape wv tta mpc mpc8 dts dtshd truehd mlp oma qcp loas tak tty
    """.split()
)
_DOWNLOAD_LIMIT, _DOWNLOAD_VARIABLE = 2**30, "AUTOGAZE_MAX_DOWNLOAD_BYTES"
_DOWNLOAD_SECONDS = 3600  # maximum duration of a download
_MAX_MEMORY = 2**26  # bytes of a download that are kept in memory; larger ones are written to a temporary file
_MAX_NAME_LENGTH = 200  # characters of a source's name in messages


class VideoSource(NamedTuple):
    """
    A video that can be opened repeatedly.

    Args:
        target (`str` or `IO[bytes]`): its path, or a binary file object that can be rewound.
        name (`str`): its name in messages.
    """

    target: str | IO[bytes]
    name: str


def is_picture_list(value: Any) -> TypeGuard[Sequence[str | os.PathLike]]:
    """Returns whether `value` is a list of paths of picture files, which together are one video."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(p, (str, os.PathLike)) and str(p).lower().endswith(PICTURE_SUFFIXES) for p in value)
    )


def encoded_video(value: Any) -> Mapping | None:
    """Returns the `{"path", "bytes"}` of a row of a `datasets` Video column, decoded or not; `None` for anything else."""
    value = getattr(value, "_hf_encoded", value)
    is_row = isinstance(value, Mapping) and 0 < len(value.keys() & {"path", "bytes"}) == len(value)
    return value if is_row else None


def resolve_source(source: Any) -> VideoSource:
    """
    Converts a source to one that can be opened repeatedly.

    Args:
        source: a source of [`~frame_decoding_autogaze.read_video`], except a list of pictures; or a [`VideoSource`].

    Returns:
        [`VideoSource`].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a source, or a URL cannot be read.
    """
    if isinstance(source, VideoSource):
        return source
    if (row := encoded_video(source)) is not None:
        if row.get("bytes") is None and row.get("path") is None:
            raise ValueError("`source` must have a `path` or `bytes`, but both are None")
        source = row["path"] if row.get("bytes") is None else row["bytes"]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return VideoSource(BytesIO(source), f"of {len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        return _resolve_address(os.fspath(source))
    if hasattr(source, "read") and not isinstance(source, TextIOBase):
        return _resolve_file_object(source)
    raise ValueError(
        "`source` must be a path, an http(s), file or data URL, bytes, a binary file object, a row of a `datasets` Video "
        f"column or a list of pictures' paths, got {type(source)}"
    )


def _resolve_address(address: str) -> VideoSource:
    """Resolves a path or a URL. An existing file has priority over all schemes except http."""
    name = _short(repr(address))
    scheme = match[1].lower() if (match := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):", address)) else ""
    if scheme in ("http", "https") and address[len(scheme) + 1 :].startswith("//"):
        return VideoSource(_download(address, name), name)
    path = address
    # `Path.exists` raises an error for names that are too long.
    if not os.path.exists(path):
        if scheme == "data":
            return VideoSource(BytesIO(_decode_data_url(address)), f"data URL of {len(address)} characters")
        if scheme == "file":
            parts = urlsplit(address)
            if parts.netloc not in ("", "localhost"):
                raise ValueError(f"`source` {name} must lie on this machine, as in file:///folder/video.mp4")
            path = url2pathname(parts.path)
        elif address[len(scheme) :].startswith("://"):
            raise ValueError(f"`source` {name} must be a path or an http(s), file or data URL; {scheme} is not opened")
    if not os.path.exists(path):
        raise FileNotFoundError(f"`source` must be a video file or an http(s) URL, but there is no {name}")
    if not os.path.isfile(path):
        raise ValueError(f"`source` must be a video file, but {name} is a folder or a device")
    return VideoSource(path, name)


def _resolve_file_object(source: Any) -> VideoSource:
    label = getattr(source, "name", None)
    name = f"file object {_short(repr(type(source).__name__ if label is None else label))}"
    if inspect.iscoroutinefunction(source.read):
        raise ValueError(
            f"`source` {name} must be read by `await`; give its contents, or its `.file` if it is an upload"
        )
    seekable = getattr(source, "seekable", None)
    if seekable() if seekable is not None else hasattr(source, "seek") and hasattr(source, "tell"):
        return VideoSource(source, name)
    try:
        return VideoSource(_spool(source.read), name)
    except ValueError as error:
        raise ValueError(f"`source` {name} could not be read: {error}") from error


def _short(text: str) -> str:
    return (
        text
        if len(text) <= _MAX_NAME_LENGTH
        else f"{text[: _MAX_NAME_LENGTH // 2]}...{text[-_MAX_NAME_LENGTH // 4 :]}"
    )


def _decode_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        contents = unquote_to_bytes(body)
        return b64decode(contents, validate=True) if head.lower().endswith(";base64") else contents
    except ValueError as error:
        raise ValueError(
            f"`source` {_short(repr(head))} must be a data URL such as data:video/mp4;base64,AAAA, but {error}"
        ) from error


class _HttpOnly(HTTPRedirectHandler):
    """Follows redirections only to http(s)."""

    def redirect_request(self, request, response, code, message, headers, url):
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise ValueError(f"it redirects to {_short(repr(url))}, which is not an http(s) URL")
        return super().redirect_request(request, response, code, message, headers, url)


def _download(url: str, name: str) -> IO[bytes]:
    # FFmpeg does not check certificates by default.
    try:
        request = Request(_quote_url(url), headers={"User-Agent": "transformers-autogaze"})
        with build_opener(_HttpOnly).open(request, timeout=60) as response:
            length = response.headers.get("Content-Length")
            expected = int(length) if length and length.isdecimal() else None
            return _spool(response.read1, expected)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"`source` {name} could not be downloaded: {error}") from error


def _quote_url(url: str) -> str:
    """Encodes spaces and non-ASCII characters of a URL."""
    parts = urlsplit(url)
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe="/%:@!$&'()*+,;=~?[]") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def _spool(read: Callable[[int], bytes], expected: int | None = None) -> IO[bytes]:
    """Reads a stream that cannot be rewound into a temporary file, up to a limit."""
    setting = os.environ.get(_DOWNLOAD_VARIABLE) or str(_DOWNLOAD_LIMIT)
    if not setting.isdecimal():
        raise ValueError(f"the environment variable {_DOWNLOAD_VARIABLE} must be a number of bytes, got {setting!r}")
    limit, size, end = int(setting), 0, time.monotonic() + _DOWNLOAD_SECONDS
    file = SpooledTemporaryFile(max_size=_MAX_MEMORY)
    while size <= limit and (expected or 0) <= limit and (part := read(2**20)):
        if time.monotonic() > end:
            raise ValueError(f"it has not ended after {_DOWNLOAD_SECONDS} seconds")
        size += len(part)
        file.write(part)
    if max(size, expected or 0) > limit:
        raise ValueError(
            f"it is larger than {limit} bytes; set the environment variable {_DOWNLOAD_VARIABLE} to allow more, or give "
            "a file"
        )
    if size < (expected or 0):
        raise ValueError(f"it ended after {size} of {expected} bytes")
    return file


class _RewoundFile:
    """A binary file object for PyAV, without its name, which FFmpeg would use to open other files."""

    def __init__(self, file: IO[bytes], suffix: str):
        self.file, self.name = file, f"video{suffix}"
        self.file.seek(0)

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence not in (0, 1, 2):
            return -1  # FFmpeg asks for the size this way, and otherwise seeks to the end
        # `seek` of spooled files returns nothing in Python 3.10.
        self.file.seek(offset, whence)
        return self.file.tell()

    def tell(self) -> int:
        return self.file.tell()


@contextmanager
def open_video(source: VideoSource, threads: str = "AUTO") -> Iterator[tuple[Any, Any]]:
    """
    Opens a video and selects the stream that FFmpeg's command line selects.

    Args:
        source ([`VideoSource`]): the video.
        threads (`str`, *optional*, defaults to `"AUTO"`):
            Thread type of the decoder. `"SLICE"` decodes one frame at a time, so that damage affects no other frame.

    Yields:
        `tuple` of PyAV's container and its video stream.

    Raises:
        ValueError: if it is not a video, or has no video stream.
    """
    target: str | _RewoundFile
    file, given = None, source.target
    if not isinstance(given, str):
        suffix = os.path.splitext(str(getattr(given, "name", "") or ""))[1].lower()
        target = _RewoundFile(
            given, suffix if re.fullmatch(r"\.\w+", suffix) and suffix not in PICTURE_SUFFIXES else ""
        )
    elif given.lower().endswith(PICTURE_SUFFIXES):
        file = open(given, "rb")  # noqa: SIM115 - FFmpeg reads the name of a picture as a pattern
        target = _RewoundFile(file, "")
    else:
        target = f"file:{given}"  # otherwise, a name with a colon would be read as a URL
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file" if isinstance(target, str) else "none"}
    try:
        with _open_container(target, options, source.name) as container:
            stream = _best_stream(container, source.name)
            stream.thread_type = threads
            yield container, stream
    finally:
        if file is not None:
            file.close()


def _open_container(target: Any, options: dict[str, str], name: str) -> Any:
    try:
        # Older PyAV also passes `options` to streams, beyond the number of known ones.
        return av.open(target, container_options=options, **_METADATA_OPTIONS)
    except FFmpegError as error:
        # FFmpeg's error for a format that is not allowed.
        is_refused = error.errno == errno.EINVAL
        note = "; playlists and other lists of files are not followed" if is_refused else ""
        raise ValueError(
            f"`source` {name} is not a video that FFmpeg can open, or it is incomplete ({error.strerror}{note}); give a "
            "complete video file such as MP4, WebM or AVI"
        ) from error


def _disposition(stream: Any) -> int:
    """Returns FFmpeg's disposition flags of a stream; 0 where PyAV does not have them."""
    # The flags are not numbers before PyAV 16.
    flags = getattr(stream, "disposition", 0)
    return int(getattr(flags, "value", flags))


def _best_stream(container: Any, name: str) -> Any:
    def area(stream: Any) -> int:
        is_default = _disposition(stream) & _DEFAULT
        context = stream.codec_context
        return context.width * context.height + _DEFAULT_BONUS * bool(is_default)

    streams = [s for s in container.streams.video if not _disposition(s) & _COVER_PICTURE]
    # FFmpeg opens text files as the video of a terminal.
    is_text = container.format.name == "tty"
    known = [stream for stream in streams if stream.codec_context is not None]
    if known and not is_text:
        return max(known, key=area)
    if streams and not is_text:
        raise ValueError(
            f"`source` {name} has a video stream of a codec that FFmpeg does not know, or whose description is cut off; give a "
            "complete video file such as MP4, WebM or AVI"
        )
    found = ["text"] if is_text else sorted({stream.type for stream in container.streams})
    raise ValueError(
        f"`source` {name} has no video stream, only {' and '.join(found) or 'nothing'}; give a video file such as MP4, "
        "WebM or AVI"
    )


def pixels_of(picture: Image.Image) -> np.ndarray:
    """
    Returns the pixels of a picture in RGB.

    Args:
        picture (`PIL.Image.Image`): a picture of any mode.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`: uint8, or the unchanged numbers of the modes I and F.
    """
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):  # PIL would clip these at 255
        pixels = np.asarray(picture)
        if picture.mode.startswith("I;16"):
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(pixels[..., None], 3, axis=2)
    return np.asarray(picture.convert("RGB"))


def read_pictures(paths: Sequence[str | os.PathLike], indices: Sequence[int]) -> Iterator[np.ndarray]:
    """
    Reads pictures of one size, rotated by their EXIF orientation.

    Args:
        paths (`Sequence` of `str` or `os.PathLike`): picture files.
        indices (`Sequence[int]`): indices of the files to read.

    Yields:
        `np.ndarray` of shape `(height, width, 3)` and type uint8 (RGB).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is not a picture, or pictures differ in size.
    """
    size = None
    for index in indices:
        path = Path(paths[index])
        if not path.is_file():
            raise FileNotFoundError(f"`source` must be pictures' paths, but there is no {_short(repr(str(path)))}")
        try:
            with Image.open(path) as picture:
                pixels = pixels_of(ImageOps.exif_transpose(picture))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"`source`: {_short(repr(str(path)))} is not a picture that can be read: {error}"
            ) from error
        if pixels.dtype != np.uint8:
            raise ValueError(
                f"`source`: {_short(repr(str(path)))} holds {pixels.dtype} numbers, whose range is unknown; give pictures of 8 "
                "or 16 bits"
            )
        if size not in (None, pixels.shape[:2]):
            raise ValueError(
                f"`source`: {_short(repr(str(path)))} has {pixels.shape[1]}x{pixels.shape[0]} pixels, those before "
                f"have {size[1]}x{size[0]}; give pictures of one size"
            )
        size = pixels.shape[:2]
        yield pixels
