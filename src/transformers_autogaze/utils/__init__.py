"""Helpers for the whole package."""
