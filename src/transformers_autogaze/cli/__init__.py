"""
The commands of `autogaze`: what each computes, and the options of those that need the library to name them.

`transformers_autogaze_cli` names all commands and loads nothing heavy.
"""

from transformers_autogaze_cli import main


__all__ = ["main"]
