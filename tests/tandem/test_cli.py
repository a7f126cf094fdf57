"""The commands, as processes where signals or pipes matter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tandem.cli import cli, doctor
from tandem.cli.models import describe
from tandem.errors import ModelFormatError
from tandem.models import default_model

UP = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
if "ignored" in sys.argv: signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv.remove("ignored")
from tandem.supervisor import settings
settings.MODULES = dict(prefill="fake_prefill", decode="fake_decode", gateway="fake_gateway")
from tandem.cli import main
main()
"""


def tandem(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tandem", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=text or "", timeout=60)


def test_generate_streams_text(fake_gateway: Any) -> None:
    """Text and a newline on stdout, nothing else; greedy unless told otherwise."""
    done = tandem(
        "generate", "one two", "--gateway", fake_gateway[1], "--max-tokens", "5", "--stop", "a", "--stop", "b"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "one two \n", "")
    sent = fake_gateway[0].requests[-1]
    assert (sent.text, sent.sampling.temperature, sent.stopping.max_tokens) == ("one two", 0.0, 5)
    assert sent.sampling.HasField("temperature")
    assert list(sent.stopping.stop) == ["a", "b"]


def test_generate_with_several_gateways(fake_gateways: Any) -> None:
    """One is lost in the middle, another was never there: the text is whole."""
    (first, one), (second, two) = fake_gateways
    first.cuts = [2]
    done = tandem("generate", "one two three", "--gateway", f"{one},127.0.0.1:9, {two}")
    assert done.stdout == "one two three \n"
    assert len(second.requests) == 1
    assert tandem("generate", "x", "--gateway", f"{one},nonsense").returncode == 2


def test_generate_json(fake_gateway: Any) -> None:
    """One object with the promised keys."""
    done = tandem(
        "generate", "--token-ids", "4, 5", "--gateway", fake_gateway[1], "--json", "--ignore-eos", "--seed", "7"
    )
    said = json.loads(done.stdout)
    assert said["text"] == "<4><5>"
    assert said["token_ids"] == [0, 1]
    assert said["finish_reason"] == "length"
    assert said["usage"]["prompt_tokens"] == 3
    assert said["timings"]["total_seconds"] == 0.0
    sent = fake_gateway[0].requests[-1]
    assert (sent.stopping.ignore_eos, sent.sampling.seed) == (True, 7)


def test_generate_from_stdin_as_chat(fake_gateway: Any) -> None:
    """ "-" reads the prompt; --chat makes it a message."""
    assert tandem("generate", "-", "--chat", "--gateway", fake_gateway[1], text="hi there").stdout == "hi there \n"
    assert fake_gateway[0].requests[-1].messages.messages[0].role == "user"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["hi", "--gateway", "127.0.0.1:9"], "no gateway answers at 127.0.0.1:9: start one with `tandem up`", 1),
        ([], "give either a PROMPT or --token-ids", 2),
        (["hi", "--token-ids", "1"], "give either a PROMPT or --token-ids", 2),
        (["--token-ids", "1,x"], "must be numbers", 2),
        (["hi", "--max-tokens", "many"], "--max-tokens", 2),
        (["hi", "--gateway", "nonsense"], "--gateway: 'nonsense' is not HOST:PORT", 2),
    ],
)
def test_generate_errors(arguments: list[str], message: str, code: int) -> None:
    """One line that a person can act on."""
    done = tandem("generate", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_refused_request_names_the_field(fake_gateway: Any) -> None:
    """As the server says it."""
    from tandem.errors import InvalidRequestError

    fake_gateway[0].fail = lambda n: InvalidRequestError("must be in (0, 1]", field="sampling.top_p")
    done = tandem("generate", "x", "--top-p", "2", "--gateway", fake_gateway[1])
    assert (done.returncode, done.stderr) == (1, "error: sampling.top_p: must be in (0, 1]\n")


def test_generate_into_a_closed_pipe(fake_gateway: Any) -> None:
    """No traceback when the reader goes."""
    command = f"{sys.executable} -m tandem generate 'a b' --gateway {fake_gateway[1]} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_generate_interrupted(fake_gateway: Any) -> None:
    """Ctrl-C: exit code 130, and the server's work is cancelled."""
    fake_gateway[0].hang = True
    command = [sys.executable, "-m", "tandem", "generate", "one", "--gateway", fake_gateway[1]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == "one "
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert fake_gateway[0].cancelled.wait(10)


def test_chat_keeps_the_conversation(fake_gateway: Any) -> None:
    """Each turn sends all before it; /reset forgets; /exit leaves."""
    lines = "hello you\n\n/help\nagain\n/nope\n/reset\nfresh\n/exit\nnever\n"
    done = tandem("chat", "--system", "be brief", "--gateway", fake_gateway[1], text=lines)
    assert done.returncode == 0
    assert "hello you \n" in done.stdout
    assert "unknown command /nope" in done.stderr
    sent = [r for r in fake_gateway[0].requests if hasattr(r, "messages")]
    turns = [[(m.role, m.content) for m in request.messages.messages] for request in sent]
    assert turns == [
        [("system", "be brief"), ("user", "hello you")],
        [("system", "be brief"), ("user", "hello you"), ("assistant", "hello you "), ("user", "again")],
        [("system", "be brief"), ("user", "fresh")],
    ]


def test_chat_ends_at_eof_and_without_gateway(fake_gateway: Any) -> None:
    """EOF is a fine end; no gateway is an error at once."""
    assert tandem("chat", "--gateway", fake_gateway[1]).returncode == 0
    done = tandem("chat", "--gateway", "127.0.0.1:9")
    assert done.returncode == 1
    assert "no gateway answers" in done.stderr


def start_up(*arguments: str) -> subprocess.Popen[str]:
    anywhere = ["--gateway", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    return subprocess.Popen(
        [sys.executable, "-c", UP, "up", *anywhere, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started(log: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == "start"]


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("signum", "arguments"),
    [(signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGHUP, ()), (signal.SIGINT, ("ignored",))],
    ids=["int", "term", "hup", "int-ignored"],
)
def test_up_serves_until_a_signal(fake_services: Path, signum: int, arguments: tuple[str, ...]) -> None:
    """One line on stdout; status and scale work; exit code 0; no process left. Also where SIGINT was ignored."""
    process = start_up(*arguments)
    assert process.stdout is not None
    ready = process.stdout.readline()
    assert ready.startswith("ready gateway=127.0.0.1:")
    assert re.fullmatch(r"ready gateway=127\.0\.0\.1:\d+ http=127\.0\.0\.1:\d+\n", ready)
    gateway = ready.split()[1].removeprefix("gateway=")
    status = tandem("status", "--gateway", f"127.0.0.1:5, {gateway}")
    assert "decode-0" in status.stdout
    assert "METRICS" in status.stdout
    said = json.loads(tandem("status", "--gateway", gateway, "--json").stdout)
    assert {worker["role"] for worker in said["workers"]} == {"gateway", "prefill", "decode"}
    assert [worker["load"] for worker in said["workers"]] == [None] * len(said["workers"])  # fakes have none
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert f"gRPC      {gateway}" in err
    assert not [event for event in started(fake_services) if Path(f"/proc/{event['pid']}").exists()]


def test_up_asks(fake_services: Path) -> None:
    """The answer comes after the ready line."""
    process = start_up("--ask", "What is the capital of France?", "--prefill", "0")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines[2:] == ["What is the capital of France?\n", "It is Paris.\n"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert {event["role"] for event in started(fake_services)} == {"gateway", "decode"}


def test_up_outlives_the_readers_of_its_output(fake_services: Path) -> None:
    """`tandem up | head -1` is still a server: it goes on serving, and ends as ever."""
    process = start_up("--ask", "What is the capital of France?")
    assert process.stdout is not None
    assert process.stderr is not None
    until(lambda: started(fake_services))
    process.stdout.close()
    process.stderr.close()
    (runtime_folder,) = fake_services.parent.glob("run/tandem")
    until(lambda: list(runtime_folder.glob("gateway-*.sock")))
    time.sleep(0.5)  # time to fail: the question comes after the socket, and a failed print would end it all
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not [event for event in started(fake_services) if Path(f"/proc/{event['pid']}").exists()]


def test_up_with_closed_streams(fake_services: Path) -> None:
    """Started as some launchers do, with no standard streams at all."""
    shell = f'exec {sys.executable} -c "$UP" up --gateway 127.0.0.1:0 --http 127.0.0.1:0 --prefill 0 <&- >&- 2>&-'
    process = subprocess.Popen(["bash", "-c", shell], env={**os.environ, "UP": UP})
    until(lambda: process.poll() is not None or list(fake_services.parent.glob("run/tandem/gateway-*.sock")))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert {event["role"] for event in started(fake_services)} == {"gateway", "decode"}


def test_up_names_a_command_that_works(fake_services: Path, tmp_path: Path) -> None:
    """`make run` starts .venv/bin/tandem, which is on nobody's PATH yet: what it says to try is what can be typed."""
    script = tmp_path / "tandem"
    script.write_text(f"#!{sys.executable}\n{UP}")
    script.chmod(0o755)
    command = [str(script), "up", "--gateway", "127.0.0.1:0", "--http", "127.0.0.1:0", "--prefill", "0"]
    for path, name in ((os.environ["PATH"], str(script)), (f"{tmp_path}:{os.environ['PATH']}", "tandem")):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PATH": path})
        assert process.stderr is not None
        told = next(line for line in process.stderr if line.startswith("try"))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert told.startswith(f"try       {name} chat")


def test_up_interrupted_while_starting(fake_services: Path) -> None:
    """Whatever came up is cleared away; the code is 0."""
    process = start_up()
    deadline = time.monotonic() + 20
    while not started(fake_services) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert not [event for event in started(fake_services) if Path(f"/proc/{event['pid']}").exists()]


def test_up_shows_why_a_worker_did_not_start(fake_services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's own line, exit code 2, nothing left."""
    monkeypatch.setenv("FAKE_PREFILL", "fail")
    process = start_up()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines()[-1] == "error: prefill-0 did not start: --model: the file is no model"
    assert not [event for event in started(fake_services) if Path(f"/proc/{event['pid']}").exists()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode", "0"], "decode: must be 1 to 64"),
        (["--model", "/nowhere.gguf"], "--model: no such file or folder '/nowhere.gguf'"),
        (["--model", ""], "--model: no such file or folder ''"),
        (["--gateway", "nonsense"], "--gateway: 'nonsense' is not HOST:PORT"),
        (["--compute", "fast"], "'fast' is not one of"),
    ],
)
def test_up_refuses_bad_flags(arguments: list[str], message: str) -> None:
    """Exit code 2 before anything starts."""
    done = tandem("up", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_every_command_explains_itself() -> None:
    """--help works for each and each flag has a text."""
    runner = CliRunner()
    assert runner.invoke(cli, ["--version"]).output.startswith("tandem, version")
    for name in cli.list_commands(None):  # type: ignore[arg-type, attr-defined]
        result = runner.invoke(cli, [name, "--help"])
        assert result.exit_code == 0
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert all(option.help for option in command.params if isinstance(option, click.Option))


@pytest.mark.parametrize("fast", [True, False])
def test_doctor_says_what_will_be_used(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the probes; a missing piece is a problem and exit code 1."""
    probes = {
        "kernels": {
            "implementation": "cpp",
            "row_invariant": True,
            "fast_int8": fast,
            "cpu_features": ["avx2", "avx512_bf16"],
            "compiler": None,
        },
        "kv_transfer": {"transports": ["shm", "grpc"]},
    }
    monkeypatch.setattr(doctor, "_probe", lambda module, problems: probes[module])
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    found = json.loads(result.output)
    used = found["use"]
    assert (used["kernels"], used["compute"], used["transport"]) == ("cpp", "int8" if fast else "exact", "shm")
    assert (found["problems"], result.exit_code) == ([], 0)
    text = CliRunner().invoke(cli, ["doctor", "--model", "/nowhere"])
    assert text.exit_code == 1
    assert "problem: model: --model: no such file" in text.output
    assert "shm, grpc" in text.output


def test_doctor_says_that_a_gpu_will_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels that were chosen for it."""
    refused = {"flashinfer": "not installed", "flash-attn-2": "flash-attn 2.3 is installed"}
    attention = {"gpu_attention": "flash-attn-3", "gpu_attention_8_bit": "triton", "gpu_attention_refused": refused}
    gpu = {"gpu_operations": "triton", **attention}
    kernels = {"implementation": "cpp", "gpu": "H200", **gpu}
    monkeypatch.setattr(doctor, "_probe", lambda module, problems: kernels if module == "kernels" else {})
    used = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)["use"]
    assert used["device"] == "cuda (H200)"
    assert (used["kernels"], used["attention"], used["kv_of_8_bits"]) == ("triton", "flash-attn-3", "triton")
    assert used["compute"] == "native"
    assert used["exact_promise"] == "does not hold"
    text = CliRunner().invoke(cli, ["doctor"]).output
    assert "attention not flashinfer: not installed, flash-attn-2: flash-attn 2.3 is installed" in text


def test_doctor_for_real() -> None:
    """The real probes answer."""
    done = tandem("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["transports"][-1] == "grpc"
    assert found["use"]["kernels"] in ("cpp", "torch")
    assert found["packages"]["torch"]
    assert done.returncode == 0


def test_doctor_passes_on_what_a_probe_remarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A probe that falls back says why, and one that compiles says so while it does."""
    (tmp_path / "probe.py").write_text("import sys; print('no compiler', file=sys.stderr); print('{\"a\": 1}')")
    (tmp_path / "wrong.py").write_text("import sys; sys.exit('error: no kernels')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problems: list[str] = []
    assert doctor._probe("probe", problems) == {"a": 1, "notes": ["no compiler"]}
    assert capsys.readouterr().err == "no compiler\n"
    assert problems == []
    assert doctor._probe("wrong", problems) == {}
    assert problems == ["wrong: error: no kernels"]


def test_models_show(tmp_path: Path) -> None:
    """A GGUF file, a folder, and what is neither."""
    facts = json.loads(CliRunner().invoke(cli, ["models", "show", "--json"]).output)
    assert (facts["architecture"], facts["layers"], facts["vocabulary"]) == ("llama", 30, 49152)
    assert facts["tensors"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert CliRunner().invoke(cli, ["models", "path"]).output.strip() == str(default_model())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 2}')
    header = json.dumps({"__metadata__": {}, "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    folder = describe(tmp_path)
    assert (folder["architecture"], folder["parameters"], folder["tensors"]) == ("qwen2", 6, {"BF16": 1})
    file.write_bytes(b"\xff" * 20)
    for bad in (tmp_path, Path(__file__), Path("/nowhere")):
        with pytest.raises(ModelFormatError):
            describe(bad)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(default_model().read_bytes()[:4096])
    with pytest.raises(ModelFormatError, match="can't be read as a model, it is damaged or truncated"):
        describe(cut)


def test_starts_quickly(fake_gateway: Any) -> None:
    """No heavy import on the way to a request: user time of the whole command, best of three."""
    best = 9.0
    for _ in range(3):
        before = os.times()
        assert tandem("generate", "one", "--gateway", fake_gateway[1]).returncode == 0
        best = min(best, os.times().children_user - before.children_user)
    assert best < 0.8
