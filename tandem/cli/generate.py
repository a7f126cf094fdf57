"""`tandem generate`: one prompt, its text as it comes, or one JSON object."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any, cast

import click

from tandem.cli.options import access_options, explained, gateways_option, take_access
from tandem.client.blocking import Client, Stream
from tandem.client.types import Delta, End, Finished, Options, PromptAccepted


@click.command("generate")
@click.argument("prompt", required=False)
@gateways_option
@access_options
@click.option("--max-tokens", type=int, metavar="N", help="Most tokens to generate.  [default: the server's]")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Randomness; 0 takes the likeliest token."
)
@click.option("--top-p", type=float, help="Keep the smallest set of tokens with this probability.")
@click.option("--top-k", type=int, help="Keep the K likeliest tokens.")
@click.option("--seed", type=int, help="Same seed, same tokens.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End at this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end of text.")
@click.option("--chat", is_flag=True, help="Send the prompt as a chat message, through the model's template.")
@click.option("--token-ids", metavar="1,2,3", help="A prompt of token ids in place of text.")
@click.option("--cache-salt", metavar="TEXT", help="Share cached prefixes only with requests of the same salt.")
@click.option("--speculation", metavar="MODE", help="auto, off or a proposer, such as ngram.  [default: auto]")
@click.option("--speculation-tokens", type=int, metavar="N", help="Most drafts a step.  [default: the server's]")
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up after this time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def command(
    prompt: str | None,
    gateways: list[str],
    chat: bool,
    token_ids: str | None,
    timeout: float | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Continue PROMPT ("-" reads it from standard input) and print the text as it comes."""
    access = take_access(flags)
    given = {key: value for key, value in flags.items() if value not in (None, ())}
    options = cast(Options, given)
    source = _input(prompt, token_ids, chat)
    with (
        explained(", ".join(gateways)),
        Client(addresses=gateways, timeout=timeout, **access) as client,
        client.stream(**source, **options) as events,
    ):
        summary = follow(events, echo=not as_json)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))


def follow(events: Stream, *, echo: bool) -> dict[str, Any]:
    """Reads a stream to its end, printing text when `echo`; returns text, token_ids, finish_reason, usage and
    timings.
    """
    text: list[str] = []
    tokens: list[int] = []
    summary: dict[str, Any] = {"text": "", "token_ids": [], "finish_reason": None, "usage": None, "timings": None}
    for event in events:
        if isinstance(event, Delta):
            text.append(event.text)
            tokens += event.token_ids
            if echo:
                print(event.text, end="", flush=True)
        elif isinstance(event, Finished):
            summary["finish_reason"] = event.finish_reason.value if event.finish_reason else None
        elif isinstance(event, End):
            summary |= {"usage": asdict(event.usage), "timings": asdict(event.timings)}
        elif isinstance(event, PromptAccepted):
            summary |= {"model": event.model, "request_id": event.request_id}
    if echo:
        print(flush=True)
    return summary | {"text": "".join(text), "token_ids": tokens}


def _input(prompt: str | None, token_ids: str | None, chat: bool) -> dict[str, Any]:
    """Exactly one kind of input. Raises a usage error otherwise."""
    if (prompt is None) == (token_ids is None):
        raise click.UsageError("give either a PROMPT or --token-ids")
    if token_ids is not None:
        if chat:
            raise click.UsageError("--chat needs a PROMPT, not --token-ids")
        try:
            ids = [int(part) for part in token_ids.split(",")]
        except ValueError:
            raise click.UsageError("--token-ids: must be numbers with commas between, for example 1,2,3") from None
        return {"token_ids": ids}
    text = sys.stdin.read() if prompt == "-" else prompt
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
