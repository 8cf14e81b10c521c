"""Helpers of every part."""
