"""
Compares PyAV and torchcodec as decoders: CPU time of this process per frame of a video, and whether the frames are equal.

PyAV is measured in `read_video` and `stream_video`, which count packets, read their time stamps and check for damage before they
decode. torchcodec is measured without these checks, and as "checked" with the work that ensures equal frames: PyAV reads the packets
and decodes the first frame, and torchcodec decodes up to the last frame. Each video is decoded five times with each method,
alternately; the figures are medians.

    python benchmarks/decoders.py videos/ -o decoders.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import av
import numpy as np
import torch
from measurement import machine
from torchcodec import __version__ as torchcodec_version
from torchcodec.decoders import VideoDecoder

from transformers_autogaze import read_video, stream_video
from transformers_autogaze.utils.video_files import find_videos


ROUTES = {"read": "into one array", "stream": "frame by frame"}
METHODS = ("PyAV", "torchcodec", "checked")
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("--fps", nargs="+", type=float, default=[0, 2], help="frames per second to sample; 0 for all")
    parser.add_argument("-o", "--output", type=Path, default=Path("decoders.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for path in find_videos(options.videos):
        for fps in options.fps:
            for route in ROUTES:
                rows.append(measure(path, fps or None, route))
                print(
                    *(f"{name} {value:.2f}" if name in METHODS else value for name, value in rows[-1].items()),
                    flush=True,
                )
    for fps in options.fps:
        for route, meaning in ROUTES.items():
            matching = [row for row in rows if (row["fps"], row["route"]) == (fps or None, route)]
            for name in METHODS[1:]:
                ratios = [row[name] / row["PyAV"] for row in matching]
                text = f"{statistics.median(ratios):.2f} of PyAV's time ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"fps {fps:g}, {meaning}, {name}: {text}")
    about = machine(1) | {"torchcodec": torchcodec_version}
    options.output.write_text(json.dumps({"machine": about, "ms_per_frame_of_video": rows}, indent=1) + "\n")


def measure(path: str, fps: float | None, route: str) -> dict[str, float | str | bool | None]:
    """Returns milliseconds of CPU time per frame of the whole video."""
    decode_pyav, decode_torchcodec = {
        "read": (read_pyav, read_torchcodec),
        "stream": (stream_pyav, stream_torchcodec),
    }[route]
    frames, metadata = read_video(path, fps=fps)
    indices, seconds = metadata.frames_indices, {name: [] for name in METHODS}
    for _ in range(REPEATS):
        for name in METHODS:
            start = time.process_time()
            if name == "PyAV":
                decode_pyav(path, fps)
            else:
                decoder = decode_torchcodec(path, indices)
            if name == "checked":
                check(path)
                if indices[-1] < len(decoder) - 1:
                    decoder.get_frame_at(len(decoder) - 1)
            seconds[name].append(time.process_time() - start)
    decoded = VideoDecoder(path, dimension_order="NHWC").get_frames_at(indices)
    times = decoded.pts_seconds.numpy()
    is_equal = np.array_equal(frames, decoded.data.numpy()) and np.allclose(times - times[0], metadata.timestamps)
    medians = {name: 1000 * statistics.median(values) / metadata.total_num_frames for name, values in seconds.items()}
    return {"video": Path(path).name, "fps": fps, "route": route, "equal": is_equal, **medians}


def read_pyav(path: str, fps: float | None) -> None:
    read_video(path, fps=fps)


def stream_pyav(path: str, fps: float | None) -> None:
    for _ in stream_video(path, fps=fps)[1]:
        pass


def read_torchcodec(path: str, indices: list[int]) -> VideoDecoder:
    # 0 is FFmpeg's default number of threads, as in PyAV.
    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=0)
    decoder.get_frames_at(indices).data.numpy()
    return decoder


def stream_torchcodec(path: str, indices: list[int]) -> VideoDecoder:
    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=0)
    for index in indices:
        decoder.get_frame_at(index).data.numpy()
    return decoder


def check(path: str) -> None:
    """Reads all packets of a video, and decodes its first frame."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        sorted(packet.pts for packet in container.demux(stream) if packet.size)
        container.seek(0)
        next(container.decode(stream)).to_ndarray(format="rgb24")


if __name__ == "__main__":
    main()
