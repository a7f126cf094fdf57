"""OpenVINO GenAI: ContinuousBatchingPipeline, which reads the GGUF file itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from bench.peers.peer import Peer
from bench.peers.session import drive, session_meter
from bench.points import Point

PEER = Peer(
    name="openvino",
    title="OpenVINO GenAI, ContinuousBatchingPipeline",
    requirement="openvino-genai==2026.4.1",
    weights="gguf",
)
CACHE_GIB = 2


class OpenVinoSession:
    """A pipeline, stepped by hand. See `bench.peers.session.Session`."""

    def __init__(self, model: str) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = 64
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU")
        self.ids = itertools.count()
        self.handles: list[Any] = []
        self.counts: list[int] = []

    def start(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        """Adds one request per prompt."""
        import numpy
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensors = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        self.handles = [self.pipeline.add_request(next(self.ids), tensor, config) for tensor in tensors]
        self.counts = [0] * len(prompts)

    def step(self) -> Sequence[int]:
        """One step of the pipeline."""
        self.pipeline.step()
        for index, handle in enumerate(self.handles):
            if handle.can_read():
                self.counts[index] += sum(len(output.generated_ids) for output in handle.read().values())
        return self.counts

    def finish(self) -> None:
        """Runs what is left."""
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        self.handles = []


def _open(model: str, points: Sequence[Point]) -> Callable[[Point], float]:
    return session_meter(OpenVinoSession(model))


if __name__ == "__main__":
    drive(_open)
