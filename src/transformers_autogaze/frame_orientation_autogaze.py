"""Conversion of decoded frames to RGB, rotated and mirrored by the display matrix of the file."""

import math
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter


def to_rgb(frame: Any, reformatter: VideoReformatter) -> np.ndarray:
    """
    Converts a decoded frame to RGB, as FFmpeg displays it.

    Args:
        frame (`av.VideoFrame`): the frame.
        reformatter (`VideoReformatter`): the converter; one for all frames of a video.

    Returns:
        `np.ndarray` of shape `(height, width, 3)` and type uint8: a view of FFmpeg's memory.
    """
    matrix, turns = _display_matrix(frame), round(getattr(frame, "rotation", 0) / 90)
    frame, shape = reformatter.reformat(frame, format="rgb24"), (frame.height, frame.width, 3)
    # A view of FFmpeg's memory, whose rows may be padded; copying it takes as long as resizing.
    plane = frame.planes[0]
    pixels = np.ndarray(shape, np.uint8, buffer=plane, strides=(plane.line_size, 3, 1))
    return np.rot90(pixels, turns) if matrix is None else _orient(pixels, matrix, turns)


def display_size(frame: Any) -> tuple[int, int]:
    """Returns the width and height in pixels of a displayed frame."""
    matrix = _display_matrix(frame)
    is_turned = round(getattr(frame, "rotation", 0) / 90) % 2 if matrix is None else _is_turned(matrix)
    return (frame.height, frame.width) if is_turned else (frame.width, frame.height)


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """Returns the matrix from frame to display coordinates, without translation; `None` if there is none."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except (AttributeError, ValueError):  # an older PyAV, or side data of an unknown type
        return None
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), np.int32)
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])


def _angle(matrix: tuple[int, int, int, int]) -> float:
    """Returns FFmpeg's clockwise angle of a matrix in degrees, 0 to 360; NaN if the matrix is singular."""
    a, b, c, d = matrix
    widths = math.hypot(a, c), math.hypot(b, d)
    if 0 in widths:
        return math.nan
    # Rounded to whole degrees, and to 0 just below 360, as in FFmpeg.
    theta = round(math.degrees(math.atan2(b / widths[1], a / widths[0])))
    return theta - 360 * math.floor(theta / 360 + 0.9 / 360)


def _is_turned(matrix: tuple[int, int, int, int]) -> bool:
    theta = _angle(matrix)
    return not math.isnan(theta) and round(theta / 90) % 2 == 1


def _orient(pixels: np.ndarray, matrix: tuple[int, int, int, int], turns: int) -> np.ndarray:
    """Rotates and mirrors a frame `(height, width, 3)` by the rules of FFmpeg's command line; returns a view."""
    theta = _angle(matrix)
    if math.isnan(theta):
        return pixels
    if abs(theta - 90) < 1:
        return pixels.transpose(1, 0, 2) if matrix[2] > 0 else np.rot90(pixels, -1)
    if abs(theta - 180) < 1:
        return pixels[:: -1 if matrix[3] < 0 else 1, :: -1 if matrix[0] < 0 else 1]
    if abs(theta - 270) < 1:
        return pixels.transpose(1, 0, 2)[::-1, ::-1] if matrix[2] < 0 else np.rot90(pixels)
    if abs(theta) < 1:
        return pixels[::-1] if matrix[3] < 0 else pixels
    return np.rot90(pixels, turns)  # any other angle: the nearest quarter turn
