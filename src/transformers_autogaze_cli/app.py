"""The arguments of `autogaze app`; the page itself is in `transformers_autogaze.app`."""

import argparse
from typing import Any

from .arguments import a_count, a_name, add_command, add_device


def add_commands(commands: Any) -> None:
    """Adds `app` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    app = add_command(commands, "app", usage="autogaze app [options]")
    app.add_argument(
        "--host",
        type=a_name,
        metavar="HOST",
        help="address to listen at (default: 127.0.0.1, which only this machine can reach)",
    )
    app.add_argument(
        "--port", type=a_count, metavar="PORT", help="port to listen at (default: the first free one from 7860 on)"
    )
    add_device(app)
    app.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from transformers_autogaze.app import launch

    launch(options.host, options.port, options.device)
    return 0
