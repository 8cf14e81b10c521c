"""The arguments of `autogaze app`, which `transformers_autogaze.app` implements."""

import argparse
from typing import Any

from .arguments import add_command, add_device, nonempty_string, positive_integer


def add_commands(commands: Any) -> None:
    """Adds `app` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    app = add_command(commands, "app", usage="autogaze app [options]")
    app.add_argument(
        "--host",
        type=nonempty_string,
        metavar="HOST",
        help="address to listen on (default: 127.0.0.1, which only this machine can reach)",
    )
    app.add_argument(
        "--port",
        type=positive_integer,
        metavar="PORT",
        help="port to listen on (default: the first free one from 7860 on)",
    )
    add_device(app)
    app.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from transformers_autogaze.app import launch

    launch(options.host, options.port, options.device)
    return 0
