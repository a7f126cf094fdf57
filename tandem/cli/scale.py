"""`tandem scale`: more or fewer workers while everything runs."""

from __future__ import annotations

import click

from tandem.cli.options import gateway_ports, gateways_option
from tandem.cli.status import show
from tandem.supervisor.control import ask


@click.command("scale")
@click.argument("role", type=click.Choice(["prefill", "decode"]))
@click.argument("count", type=int)
@gateways_option
@click.option("--json", "as_json", is_flag=True, help="Print the new status as one JSON object.")
def command(role: str, count: int, gateways: list[str], as_json: bool) -> None:
    """Run COUNT prefill or decode workers. Returns when new ones serve, or when surplus ones have drained and gone."""
    answer = ask(gateway_ports(gateways), {"command": "scale", "role": role, "count": count})
    show(answer, as_json=as_json)
