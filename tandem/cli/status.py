"""`tandem status`: the processes of a running `tandem up`."""

from __future__ import annotations

import json
from typing import Any

import click

from tandem.cli.options import gateway_ports, gateways_option
from tandem.supervisor.control import ask

COLUMNS = {
    "NAME": "name",
    "STATE": "state",
    "ADDRESS": "address",
    "METRICS": "metrics",
    "PID": "pid",
    "UP": "uptime_seconds",
    "RESTARTS": "restarts",
    "RUNNING": "running_sequences",
    "WAITING": "waiting_requests",
    "FREE": "free_blocks",
    "BLOCKS": "total_blocks",
}
"""Titles, and where the values are: in a worker's description or in its load."""


@click.command("status")
@gateways_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(gateways: list[str], as_json: bool) -> None:
    """Show the processes of the `tandem up` whose gateway is at --gateway: addresses, sequences, KV blocks."""
    show(ask(gateway_ports(gateways), {"command": "status"}, timeout=10), as_json=as_json)


def show(status: dict[str, Any], *, as_json: bool) -> None:
    """Prints a status answer as JSON or as a table."""
    if as_json:
        print(json.dumps(status))
        return
    print(f"model    {status['model']}")
    print(f"gateway  {', '.join(status['gateways'])}   up {status['uptime_seconds']:.0f} s\n")
    facts = [{**worker, **(worker["load"] or {})} for worker in status["workers"]]
    rows = [tuple(COLUMNS)] + [tuple(_cell(fact.get(key)) for key in COLUMNS.values()) for fact in facts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value in (None, ""):
        return "-"
    return f"{value:.0f} s" if isinstance(value, float) else str(value)
