"""Runs the command line as `python -m transformers_autogaze_cli`."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
