"""Gaze in engines that serve video MLLMs."""
