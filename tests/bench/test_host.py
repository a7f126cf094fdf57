"""bench.host drives a real scheduler by hand."""

from __future__ import annotations

from bench.host import PIECES, Host, row_of


def test_every_step_decodes_all_sequences_once_their_prompts_are_computed() -> None:
    host = Host(3)
    seconds = host.steps(4)
    assert {piece: len(seconds[piece]) for piece in PIECES} == dict.fromkeys(PIECES, 4)
    outputs = [output for request in host._scheduler._running() for output in request.outputs]
    assert len({len(output.state.token_ids) for output in outputs}) == 1
    assert all(set(output.state.token_ids) == {7} for output in outputs)


def test_a_row_adds_up() -> None:
    row = row_of(2, 3)
    assert abs(sum(float(str(row[piece])) for piece in PIECES) - float(str(row["ms"]))) < 0.01
