"""`tandem up`: everything on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import click

from tandem.cli.options import DEFAULT_GATEWAY, DEFAULT_HTTP, api_key
from tandem.cli.terminal import Terminal, say, tell
from tandem.client import AsyncClient, Delta
from tandem.errors import TandemError
from tandem.models import resolve_model
from tandem.service import logging
from tandem.service.address import parse
from tandem.service.tls import ROLE_NAMES, tls_files
from tandem.supervisor.settings import UpSettings
from tandem.supervisor.supervisor import Supervisor


@click.command("up")
@click.option(
    "--model",
    default="default",
    show_default=True,
    metavar="default|PATH|hub:ORG/NAME",
    help="The default model, a GGUF file or Hugging Face folder, or a repository of the hub.",
)
@click.option(
    "--gateway",
    default=DEFAULT_GATEWAY,
    show_default=True,
    metavar="HOST:PORT",
    help="Where clients call; port 0 takes a free one.",
)
@click.option(
    "--gateways",
    default=1,
    show_default=True,
    metavar="N",
    help="How many gateways, on the ports from --gateway and --http on.",
)
@click.option(
    "--http",
    default=DEFAULT_HTTP,
    show_default=True,
    metavar="HOST:PORT",
    help="Where the gateway serves /metrics and /healthz.",
)
@click.option(
    "--prefill",
    default=1,
    show_default=True,
    metavar="N",
    help="Prefill workers; with 0 decode workers prefill themselves (aggregated mode).",
)
@click.option("--decode", default=1, show_default=True, metavar="N", help="Decode workers.")
@click.option(
    "--transport",
    type=click.Choice(["shm", "grpc", "nixl"]),
    help="How KV blocks travel; nixl needs its wheel (docs/operations.md).  [default: the best that is here]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where the workers compute; cuda is any GPU that torch sees.  [default: a GPU where there is one]",
)
@click.option(
    "--compute",
    type=click.Choice(["auto", "exact", "bf16", "int8", "native", "fp8", "int4"]),
    help="int8: the fastest, with the weights' own 4 or 8 bits; exact: float32. Both give the same bits whatever the "
    "batch; bf16 does not. auto is int8 where the CPU is fast at that (AVX-512 VNNI), else exact; on a GPU native: in "
    "--dtype; fp8, int8 and int4 round weights there.  [default: auto]",
)
@click.option(
    "--dtype", metavar="TYPE", help="Number format of the weights: float32, bf16, fp16.  [default: by --compute]"
)
@click.option(
    "--kv-dtype",
    metavar="TYPE",
    help="Number format of the KV cache: float32, bf16, int8 or fp8_e4m3.  [default: by --compute]",
)
@click.option(
    "--prefill-kv-dtype",
    metavar="TYPE",
    help="The same of prefill workers; decode converts, which rounds.  [default: --kv-dtype]",
)
@click.option("--block-size", type=int, metavar="TOKENS", help="Tokens a KV block.  [default: the workers']")
@click.option(
    "--prefill-block-size",
    type=int,
    metavar="TOKENS",
    help="Tokens a KV block of prefill workers; decode converts.  [default: --block-size]",
)
@click.option("--num-blocks", type=int, metavar="N", help="KV blocks a worker.  [default: by memory]")
@click.option("--kv-memory", type=int, metavar="BYTES", help="Memory of a worker's KV cache, in place of --num-blocks.")
@click.option("--chunk-size", type=int, metavar="TOKENS", help="Prompt tokens a prefill step.  [default: the workers']")
@click.option("--max-sequences", type=int, metavar="N", help="Most outputs in one step.  [default: the workers']")
@click.option("--max-context", type=int, metavar="TOKENS", help="Longest sequence.  [default: the model's]")
@click.option("--threads", type=int, metavar="N", help="Compute threads a worker.  [default: the workers']")
@click.option(
    "--no-prefix-cache",
    "prefix_cache",
    flag_value=False,
    default=True,
    type=bool,
    help="Keep no KV blocks of finished requests.",
)
@click.option(
    "--no-share-weights",
    "share_weights",
    flag_value=False,
    default=True,
    type=bool,
    help="Let each worker hold its own copy of the weights (int8 workers of one machine share them).",
)
@click.option(
    "--speculation",
    metavar="MODE",
    help="Who proposes drafts of tokens on decode workers: auto, off, or names with commas between, such as ngram. "
    "They never change a token, and are verified only as far as that is faster.  [default: auto]",
)
@click.option("--speculation-tokens", type=int, metavar="N", help="Most drafts a step.  [default: the workers']")
@click.option("--draft-model", metavar="MODEL", help="A smaller model of the same vocabulary, to draft with.")
@click.option(
    "--self-draft-layers",
    metavar="LAYERS",
    help="Draft with the model's own layers: how many of them, or which, as 0-3,7,28-29; the others are skipped.",
)
@click.option(
    "--eagle-head",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    metavar="PATH",
    help="The folder of an EAGLE-1 or EAGLE-3 head for the model, to draft with; needs --compute exact or bf16.",
)
@click.option("--speculation-fixed", is_flag=True, help="Verify drafts whatever they cost: for tests and measurements.")
@click.option(
    "--no-graphs",
    "graphs",
    flag_value=False,
    default=True,
    type=bool,
    help="Capture no decode steps as graphs on a GPU.",
)
@click.option(
    "--gpus",
    metavar="LIST",
    default="",
    callback=lambda _context, _option, text: tuple(part.strip() for part in text.split(",")) if text else (),
    help="GPUs of the workers, such as 0,1: by turns, prefill workers first.  [default: the first for all]",
)
@click.option(
    "--gpu-share",
    type=float,
    metavar="SHARE",
    help="Of a GPU's memory, for one worker.  [default: workers on the same GPU share it equally]",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "flashinfer", "flash-attn-3", "flash-attn-2", "triton", "torch"]),
    help="Attention on a GPU; one that is named is had, or nothing starts.  [default: the best that is there]",
)
@click.option(
    "--local-prefill-threshold",
    type=int,
    metavar="TOKENS",
    help="Missing prompt tokens up to which decode prefills itself.  [default: the gateway's]",
)
@click.option("--max-queue", type=int, metavar="N", help="Most requests that wait in a gateway.")
@click.option("--default-timeout", type=float, metavar="SECONDS", help="Deadline of requests that bring none.")
@click.option(
    "--tls-cert", metavar="FILE", help="PEM: a certificate with the names of all services; see docs/operations.md."
)
@click.option("--tls-key", metavar="FILE", help="PEM: its private key.")
@click.option("--tls-ca", metavar="FILE", help="PEM: authorities of the services' and the clients' certificates.")
@click.option(
    "--tls-client-auth",
    type=click.Choice(["none", "required"]),
    default="none",
    show_default=True,
    help="Whether clients of the gateway need a certificate.",
)
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON or TOML: tenants and SHA-256 hashes of their API keys; every call then needs a key.",
)
@click.option(
    "--drain-grace",
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that running requests get to finish when a worker stops.",
)
@click.option(
    "--log-level",
    type=click.Choice(logging.LEVELS),
    default="warning",
    show_default=True,
    help="What workers log to stderr.",
)
@click.option("--ask", metavar="QUESTION", help="Once it serves, ask the model this and print the answer.")
def command(model: str, gateway: str, http: str, ask: str | None, draft_model: str | None, **flags: Any) -> None:
    """Start gateway, prefill and decode on this machine and keep them running until Ctrl-C.

    Prints one line `ready gateway=HOST:PORT http=HOST:PORT` when it serves. A worker that dies is restarted.
    """
    logging.configure("up", flags["log_level"])
    tls = tls_files(flags.pop("tls_cert"), flags.pop("tls_key"), flags.pop("tls_ca"))
    settings = UpSettings(
        tls=tls,
        model=resolve_model(model),
        gateway=parse(gateway, flag="--gateway"),
        http=parse(http, flag="--http"),
        draft_model=None if draft_model is None else resolve_model(draft_model, flag="--draft-model"),
        **flags,
    )
    asyncio.run(_run(settings, ask))


async def _run(settings: UpSettings, ask: str | None) -> None:
    await Foreground(settings, ask).run()


class Foreground:
    """One `tandem up` from start to end. Made inside the event loop."""

    def __init__(self, settings: UpSettings, ask: str | None) -> None:
        """`ask` is a question for when it serves."""
        self._settings, self._ask = settings, ask
        self._terminal = Terminal()
        self._stop = asyncio.Event()
        self._signals = 0
        self._supervisor = Supervisor(settings, self._terminal.log, self._terminal.progress)

    async def run(self) -> None:
        """Returns after a signal, when no process is left. Raises ConfigError when a worker can't start."""
        self._install_handlers()
        work = asyncio.ensure_future(self._serve())
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            await stop
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)
            await self._supervisor.stop()
            self._terminal.close()

    async def _serve(self) -> None:
        supervisor = self._supervisor
        await supervisor.start()
        self._terminal.close()
        say(f"ready gateway={supervisor.gateways[0]} http={supervisor.https[0]}")
        if self._ask:
            await self._answer(str(supervisor.gateways[0]), self._ask)
        self._tell()

    async def _answer(self, gateway: str, question: str) -> None:
        """Streams the model's answer to stdout. A failure is told, and everything goes on serving."""
        say(f"\n{question}")
        try:
            async with AsyncClient(gateway, api_key=api_key(None), **self._access()) as client:
                messages = [{"role": "user", "content": question}]
                async with client.stream(messages=messages, temperature=0.0, max_tokens=256) as events:
                    async for event in events:
                        if isinstance(event, Delta):
                            say(event.text, end="")
            say("\n")
        except TandemError as exc:
            tell(f"\nerror: the question failed: {exc}")

    def _access(self) -> dict[str, Any]:
        """How a client of the gateway speaks TLS, as keywords."""
        files = self._settings.tls
        if files is None:
            return {}
        mine = {"tls_cert": str(files.cert), "tls_key": str(files.key)}
        required = self._settings.tls_client_auth == "required"
        return {"tls_ca": str(files.ca), "tls_server_name": ROLE_NAMES["gateway"], **(mine if required else {})}

    def _flags(self) -> str:
        """What the commands below need to reach the gateway."""
        words = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in self._access().items()]
        words += ["--api-key-file FILE"] if self._settings.api_keys is not None else []
        return "".join(f" {word}" for word in words)

    def _tell(self) -> None:
        """What a person can do now."""
        gateway, http = self._supervisor.gateways[0], self._supervisor.https[0]
        tandem = _this_command()
        flag = "" if str(gateway) == DEFAULT_GATEWAY else f" --gateway {gateway}"
        lines = (
            f"gRPC      {', '.join(map(str, self._supervisor.gateways))}",
            f"metrics   http://{http}/metrics",
            f"try       {tandem} chat{flag}{self._flags()}",
            f'          {tandem} generate "Once upon a time"{flag}{self._flags()} --max-tokens 40',
            f"          {tandem} status{flag}",
            "stop      Ctrl-C",
        )
        tell("\n".join(lines))

    def _install_handlers(self) -> None:
        """SIGINT and SIGTERM even where a shell set them to be ignored, as for background jobs; SIGHUP unless under
        nohup.
        """
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        """The first ends everything in order; the second kills."""
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            self._supervisor.kill()


def _this_command() -> str:
    """How a person calls this command again: by name where PATH leads to it, else as it was called now."""
    script, found = Path(sys.argv[0]), shutil.which("tandem")
    if script.name != "tandem" or not script.is_file() or (found and script.samefile(found)):
        return "tandem"
    return sys.argv[0]
