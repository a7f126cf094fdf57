"""Tandem beside other engines on this machine, with the same weights and the same work.

`python -m bench.peers` (or `make bench-peers`) makes each peer an environment of its own, runs all systems in rounds
and writes the table. One file per peer says what it installs and drives it; such a file runs in the peer's
environment, where Tandem's dependencies are absent, so it imports only `bench.peers.peer`, `bench.peers.session` and
`bench.points`.
"""
