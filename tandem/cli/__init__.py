"""The `tandem` command. One file per command, imported only when it runs, so that every command starts at once."""

from __future__ import annotations

import importlib
import os
import sys

import click

import tandem
from tandem.errors import ConfigError, TandemError

COMMANDS = {
    "up": ("tandem.cli.up", "Start and supervise everything on this machine."),
    "generate": ("tandem.cli.generate", "Continue a prompt and print the text as it comes."),
    "chat": ("tandem.cli.chat", "Talk to the model."),
    "status": ("tandem.cli.status", "Show the processes of a running `tandem up`."),
    "scale": ("tandem.cli.scale", "Change how many prefill or decode workers run."),
    "doctor": ("tandem.cli.doctor", "Show what was found on this machine and what will be used."),
    "models": ("tandem.cli.models", "Look at model files."),
    "quantize": ("tandem.cli.quantize", "Make a smaller copy of a model."),
}


class LazyGroup(click.Group):
    """Knows its commands by name and imports them when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports tandem.cli.NAME and takes its `command`."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_module, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(tandem.__version__, prog_name="tandem")
def cli() -> None:
    """Serve large language models with prefill and decode as separate services."""


def main() -> None:
    """Runs the command; an error becomes one line on stderr. Exit code 2 for wrong flags or files, 1 for other
    errors.
    """
    _open_closed_streams()
    try:
        sys.exit(cli(standalone_mode=False))
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except TandemError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(2 if isinstance(exc, ConfigError) else 1)
    except BrokenPipeError:
        # The reader of our output has gone: nothing to say, and nobody to say it to.
        sys.stderr.close()
        sys.exit(1)


def _open_closed_streams() -> None:
    """A standard stream that was closed (`>&-`) leads to /dev/null: no socket takes its number, and one can print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
