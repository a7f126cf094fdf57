"""Measuring peers: accounting, processes that misbehave, the table."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.peers.environments import PeerError, run_logged
from bench.peers.llamacpp import Bench, bench_command, link_libraries, read_rate
from bench.peers.llamacpp_quality import read_figures
from bench.peers.processes import Measurement, measure_points
from bench.peers.session import measure
from bench.peers.table import Comparison, System, as_json, markdown
from bench.points import parse_point


class FakeSession:
    """Prefills one prompt a step, while earlier ones decode already; a step takes a second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.counts: list[int] = []
        self.output_tokens = 0
        self.steps = 0
        self.finished = 0

    def start(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        self.counts, self.output_tokens, self.steps = [0] * len(prompts), output_tokens, 0

    def step(self) -> Sequence[int]:
        self.now += 1.0
        self.steps += 1
        running = self.counts[: self.steps]
        self.counts[: self.steps] = [min(count + 1, self.output_tokens) for count in running]
        return self.counts

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("pp512", 512.0),
        ("pp4x512", 512.0),
        ("tg1", 1.0),
        # The last prompt's first token comes in step 4, the first prompt's last in step 128: all four run between.
        ("tg4", 4.0),
    ],
)
def test_prefill_ends_with_the_last_first_token_and_decoding_with_the_first_finish(name: str, rate: float) -> None:
    session = FakeSession()
    assert measure(session, parse_point(name), random.Random(0), lambda: session.now) == pytest.approx(rate)
    assert session.finished == 1


def script(text: str) -> Sequence[str]:
    """A driver that measures `points` its own way."""
    head = "import json, os, subprocess, sys, time\npoints = sys.argv[1].split(',')\n"
    head += "def say(point): print(json.dumps({'point': point, 'tokens_per_s': 7.5}), flush=True)\n"
    return [sys.executable, "-c", head + text]


def run(text: str, silence_seconds: float = 60.0) -> list[Measurement]:
    return list(measure_points(lambda todo: [*script(text), ",".join(todo)], ["a", "b", "c"], silence_seconds))


def test_every_point_is_measured_by_one_process_and_other_lines_are_passed_over() -> None:
    found = run("print('loading', flush=True)\nprint(5)\nfor point in points: say(point)")
    assert found == [Measurement(point, 7.5) for point in "abc"]


def test_a_crash_costs_its_point_alone() -> None:
    found = run("for point in points:\n    if point == 'b': raise MemoryError('too long')\n    say(point)")
    assert found == [Measurement("a", 7.5), Measurement("b", None, "exit 1: MemoryError: too long"), found[2]]
    assert found[2] == Measurement("c", 7.5)


def test_what_measures_nothing_is_not_tried_again(tmp_path: Path) -> None:
    found = run(f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\nos.kill(os.getpid(), 9)")
    assert found == [Measurement(point, None, "killed by SIGKILL") for point in "abc"]
    assert (tmp_path / "starts").read_text() == "x"


def test_silence_ends_a_process() -> None:
    found = run("say(points[0])\nif points[0] != 'c': time.sleep(600)", silence_seconds=3.0)
    assert [(row.point, row.tokens_per_s) for row in found] == [("a", 7.5), ("b", None), ("c", 7.5)]
    assert found[1].why == "no figure within 3 s"


def test_a_child_that_stays_behind_holds_nobody_up() -> None:
    found = run("for point in points: say(point)\nsubprocess.Popen(['sleep', '600'])")
    assert [row.tokens_per_s for row in found] == [7.5] * 3


def test_a_set_up_that_fails_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(PeerError, match="no such package"):
        run_logged([sys.executable, "-c", "raise SystemExit('no such package')"], log, "x")


def test_llama_batched_bench_gets_room_for_every_sequence() -> None:
    command = bench_command(Path("bench"), "m.gguf", parse_point("tg8@4000"))
    assert command[command.index("-c") + 1] == str(8 * 4352)
    output = 'noise\n{"speed_pp": 400.0, "speed_tg": 90.5}\n'
    assert read_rate(output, parse_point("tg8@4000")) == 90.5
    assert read_rate(output, parse_point("pp512")) == 400.0
    with pytest.raises(RuntimeError, match="no figures"):
        read_rate("out of memory", parse_point("pp512"))


def test_llama_cpp_keeps_its_weights_as_they_are_once_repacked_ones_have_crashed_it(tmp_path: Path) -> None:
    """However late that is."""
    program, calls = tmp_path / "bench", tmp_path / "calls"
    answer = json.dumps({"speed_tg": 7.0})
    program.write_text(
        f"#!/bin/sh\necho \"$@\" >> {calls}\n[ $(wc -l < {calls}) = 2 ] && kill -ILL $$\necho '{answer}'\n"
    )
    program.chmod(0o755)
    bench = Bench(program, "m.gguf")
    assert [bench.measure(parse_point("tg1")) for _ in range(3)] == [7.0, 7.0, 7.0]
    assert ["--no-repack" in line for line in calls.read_text().splitlines()] == [False, False, True, True]


@pytest.mark.parametrize("signal", ["TERM", "ILL"])
def test_llama_cpp_that_crashes_either_way_has_no_figure(tmp_path: Path, signal: str) -> None:
    program = tmp_path / "bench"
    program.write_text(f"#!/bin/sh\nkill -{signal} $$\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match="llama-batched-bench: exit -"):
        Bench(program, "m.gguf").measure(parse_point("tg1"))


def test_libraries_get_the_links_that_a_wheel_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "libx.so.0.1").write_text("x")
    (tmp_path / "_symlinks.json").write_text(json.dumps({"libx.so": "libx.so.0", "libx.so.0": "libx.so.0.1"}))
    link_libraries(tmp_path)
    link_libraries(tmp_path)
    assert (tmp_path / "libx.so").read_text() == "x"


def comparison() -> Comparison:
    tandem, fast, slow, absent = (System(name, name.title()) for name in ("tandem", "fast", "slow", "absent"))
    for rates in ((100.0, 50.0, 10.0), (300.0, 40.0, 20.0), (200.0, 60.0, 5.0)):
        for system, rate in zip((tandem, fast, slow), rates, strict=True):
            system.add(Measurement("tg8", rate))
    slow.add(Measurement("pp512", 400.0))
    tandem.add(Measurement("pp512", 300.0))
    fast.add(Measurement("pp512", None, "exit 1: out of memory"))
    absent.why[""] = "set-up failed: no such package"
    return Comparison({"machine": "two cores"}, ["pp512", "tg8", "tg9"], [tandem, fast, slow, absent])


def test_ratios_are_of_medians_to_the_best_peer_of_each_point() -> None:
    data = json.loads(as_json(comparison()))
    assert data["ratio"] == {"pp512": 0.75, "tg8": 4.0}
    assert data["best_peer"] == {"pp512": "slow", "tg8": "fast"}
    assert data["systems"][0]["rounds"]["tg8"] == [100.0, 300.0, 200.0]


def test_the_table_says_what_is_missing_and_why() -> None:
    text = markdown(comparison())
    assert "| Absent | - | - | - |" in text
    assert "| **Tandem / best peer** | **0.75** | **4.00** | - |" in text
    assert "- absent: set-up failed: no such package" in text
    assert "- fast at pp512: exit 1: out of memory" in text


def test_llama_perplexity_s_comparison_is_read() -> None:
    output = """
====== Perplexity statistics ======
Mean PPL(Q)                   :  11.802345 \xb1   0.310000
Mean PPL(base)                :  11.700000 \xb1   0.300000
====== Token probability statistics ======
Same top p: 97.123 \xb1 0.100 %
"""
    assert read_figures(output) == {
        "perplexity_float32": 11.7,
        "perplexity": 11.802345,
        "greedy_agreement_percent": 97.123,
        "change_percent": 0.875,
    }
    with pytest.raises(PeerError, match="greedy_agreement"):
        read_figures(output.replace("Same", "Other"))
