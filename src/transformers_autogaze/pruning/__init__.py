"""Pruning whole videos: `prune_video`, which the command line, the web page and datasets use."""

from .opened_video import OpenedVideo
from .video_pruning import KeptPatches, VideoPruning, prune_video


__all__ = ["KeptPatches", "OpenedVideo", "VideoPruning", "prune_video"]
