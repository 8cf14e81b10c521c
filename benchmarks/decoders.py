"""
Compares PyAV and torchcodec as decoders: CPU time of this process for each frame of a video, and whether the frames are equal.

PyAV's figures are those of `read_video` and `stream_video`. torchcodec's include what these do before decoding, and the first frame
by PyAV: the number of frames, their times, the orientation and damage must be known either way, so that both give the same frames.
Each video is decoded by both in turn, five times; the figures are medians.

    python benchmarks/decoders.py ../shared/videos/val -o decoders.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from measurement import machine
from torchcodec import __version__ as torchcodec_version
from torchcodec.decoders import VideoDecoder

from transformers_autogaze import read_video, stream_video
from transformers_autogaze.training.videos import find_videos


ROUTES = {"read": "into one array", "stream": "frame by frame"}
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("--fps", nargs="+", type=float, default=[0, 2], help="frames taken per second; 0 for all")
    parser.add_argument("-o", "--output", type=Path, default=Path("decoders.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for path in find_videos(options.videos):
        for fps in options.fps:
            rows += [measure(path, fps or None, route) for route in ROUTES]
            for row in rows[-len(ROUTES) :]:
                print("{video}, fps {fps}, {route}: PyAV {pyav:.2f} ms, torchcodec {torchcodec:.2f} ms, equal {equal}".format(**row),
                      flush=True)  # fmt: skip
    for fps in options.fps:
        for route, meaning in ROUTES.items():
            ratios = [
                row["torchcodec"] / row["pyav"] for row in rows if (row["fps"], row["route"]) == (fps or None, route)
            ]
            print(f"fps {fps:g}, {meaning}: torchcodec takes {statistics.median(ratios):.2f} of PyAV's time "
                  f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    about = machine(1) | {"torchcodec": torchcodec_version}
    options.output.write_text(json.dumps({"machine": about, "ms_per_frame_of_video": rows}, indent=1) + "\n")


def measure(path: str, fps: float | None, route: str) -> dict[str, float | str | bool | None]:
    """Gives milliseconds of CPU time per frame of the video, decoded or taken."""
    ways = {"pyav": {"read": read_by_pyav, "stream": stream_by_pyav}[route],
            "torchcodec": {"read": read_by_torchcodec, "stream": stream_by_torchcodec}[route]}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, decode in ways.items():
            start = time.process_time()
            decode(path, fps)
            seconds[name].append(time.process_time() - start)
    frames, metadata = read_video(path, fps=fps)
    found = VideoDecoder(path, dimension_order="NHWC").get_frames_at(metadata.frames_indices)
    times = found.pts_seconds.numpy()
    is_equal = np.array_equal(frames, found.data.numpy()) and np.allclose(times - times[0], metadata.timestamps)
    total = metadata.total_num_frames
    return {
        "video": Path(path).name,
        "fps": fps,
        "route": route,
        "equal": is_equal,
        **{name: 1000 * statistics.median(values) / total for name, values in seconds.items()},
    }


def read_by_pyav(path: str, fps: float | None) -> None:
    read_video(path, fps=fps)


def stream_by_pyav(path: str, fps: float | None) -> None:
    for _ in stream_video(path, fps=fps)[1]:
        pass


def _open(path: str, fps: float | None) -> tuple[VideoDecoder, list[int]]:
    indices = stream_video(path, fps=fps)[0].frames_indices
    # FFmpeg's own number of threads, as with PyAV. The packets need not be counted again.
    return VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=0, seek_mode="approximate"), indices


def read_by_torchcodec(path: str, fps: float | None) -> None:
    decoder, indices = _open(path, fps)
    decoder.get_frames_at(indices).data.numpy()


def stream_by_torchcodec(path: str, fps: float | None) -> None:
    decoder, indices = _open(path, fps)
    for index in indices:
        decoder.get_frame_at(index).data.numpy()


if __name__ == "__main__":
    main()
