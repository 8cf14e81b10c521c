"""
The implementations of the `autogaze` commands, and the arguments of those whose arguments need the library.

`transformers_autogaze_cli` lists all commands without importing the library.
"""

from transformers_autogaze_cli import main


__all__ = ["main"]
