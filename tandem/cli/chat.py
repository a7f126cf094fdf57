"""`tandem chat`: a conversation in the terminal. Ctrl-C ends an answer, Ctrl-D or /exit the conversation."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from tandem.cli.options import access_options, explained, gateways_option, take_access
from tandem.client.blocking import Client
from tandem.client.types import Delta, Finished, Message
from tandem.errors import TandemError
from tandem.record import FinishReason

HELP = """/help   this list
/reset  forget the conversation
/exit   leave (so does Ctrl-D)
Ctrl-C ends an answer; what was said of it stays in the conversation."""


class Conversation:
    """The messages so far and the options of every turn."""

    def __init__(self, client: Client, system: str | None, options: dict[str, Any]) -> None:
        """`system` opens every conversation, also after a reset."""
        self._client, self._system, self._options = client, system, options
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def turn(self, text: str) -> None:
        """Asks and prints the answer as it comes. A failed turn leaves no trace in the conversation."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        answer: list[str] = []
        note = ""
        # Ctrl-C ends the answer; leaving the stream cancels it on the server.
        with contextlib.suppress(KeyboardInterrupt), self._client.stream(messages=asked, **self._options) as events:
            for event in events:
                if isinstance(event, Delta):
                    answer.append(event.text)
                    print(event.text, end="", flush=True)
                elif isinstance(event, Finished) and event.finish_reason is FinishReason.LENGTH:
                    note = "(cut: --max-tokens or the context is reached)"
        print(flush=True)
        if note:
            print(note, file=sys.stderr)
        self.messages = [*asked, {"role": "assistant", "content": "".join(answer)}]


@click.command("chat")
@gateways_option
@access_options
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Most tokens an answer.")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Randomness; 0 takes the likeliest token."
)
@click.option("--top-p", type=float, help="Keep the smallest set of tokens with this probability.")
@click.option("--seed", type=int, help="Same seed, same answers.")
def command(gateways: list[str], system: str | None, **flags: Any) -> None:
    """Talk to the model; the whole conversation is sent with each turn."""
    access = take_access(flags)
    options = {key: value for key, value in flags.items() if value is not None}
    where = ", ".join(gateways)
    with explained(where), Client(addresses=gateways, **access) as client:
        served = client.models()
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() editing and history
            print(f"{', '.join(model.name for model in served)} at {where}; /help for help", file=sys.stderr)
        _converse(Conversation(client, system, options))


def _converse(conversation: Conversation) -> None:
    """Reads turns until the end of input or /exit."""
    while True:
        try:
            text = input(">>> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D to leave)", file=sys.stderr)
            continue
        if text == "/exit":
            return
        if text == "/help":
            print(HELP)
        elif text == "/reset":
            conversation.reset()
            print("(forgotten)", file=sys.stderr)
        elif text.startswith("/"):
            print(f"unknown command {text.split()[0]}; /help lists them", file=sys.stderr)
        elif text:
            _turn(conversation, text)


def _turn(conversation: Conversation, text: str) -> None:
    """One turn; an error is told and the conversation goes on where a person types, and ends the command in a pipe."""
    try:
        conversation.turn(text)
    except TandemError as exc:
        if not sys.stdin.isatty():
            raise
        print(f"error: {exc}", file=sys.stderr)
