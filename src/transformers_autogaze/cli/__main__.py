"""Runs the command line as `python -m transformers_autogaze.cli`, such as under `torchrun`."""

import sys

from transformers_autogaze_cli import main


if __name__ == "__main__":
    sys.exit(main())
