"""A real Prometheus on loopback that scrapes pods and evaluates the rendered rules."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml


class Prometheus:
    """`with Prometheus(...) as server:`, then `ask`."""

    def __init__(
        self, folder: Path, rules: Mapping[str, Any], targets: Sequence[tuple[str, Mapping[str, str]]]
    ) -> None:
        """`targets`: HOST:PORT and labels that all its series get. Everything is looked at each second."""
        (folder / "rules.yaml").write_text(yaml.safe_dump(dict(rules)))
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {
                    "job_name": "pods",
                    "static_configs": [{"targets": [target], "labels": dict(labels)} for target, labels in targets],
                }
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{free.getsockname()[1]}"

    def __enter__(self) -> Self:
        command = ["prometheus", f"--config.file={self._folder / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={self._folder / 'data'}", f"--web.listen-address={self._address}"]
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def get(self, path: str, **query: str) -> Any:
        """`data` of an answer of the HTTP API; None while it doesn't answer."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)["data"]
        except (OSError, ValueError):
            return None

    def ask(self, expression: str, seconds: float = 60) -> list[dict[str, Any]]:
        """The samples of an expression as soon as there are any. Raises AssertionError when there never are."""
        end = time.monotonic() + seconds
        while not (answer := self.get("query", query=expression)) or not answer["result"]:
            assert time.monotonic() < end, f"{expression}: no answer; {(self._folder / 'log').read_text()[-1000:]}"
            time.sleep(0.2)
        found: list[dict[str, Any]] = answer["result"]
        return found
