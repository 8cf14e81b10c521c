"""Gazed patches into vision towers and video MLLMs of transformers."""

from .vision import GazeVisionModel, GazeVisionOutput


__all__ = ["GazeVisionModel", "GazeVisionOutput"]
