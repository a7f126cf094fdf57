"""Steps over several ranks on a CPU: rank 0 sends each to the others, all compute it, rank 0 draws."""

from __future__ import annotations

import torch

from engine.batch import Batch, Launched, StepOutput
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.models.meta import Predictions
from engine.models.transformer import Model
from engine.parallel.group import Ranks
from engine.parallel.step import Step, decode, encode, step_of
from engine.runner import Done, inputs_of
from engine.sampler import sample
from kernels.blocks import copy_blocks
from tandem.errors import InternalError

_NO_ROWS = Predictions(torch.empty(0, 0))


class LeadingSteps:
    """Rank 0's `engine.runner.Steps`. A batch that breaks its contract is refused before anybody hears of it; what
    fails afterwards leaves the ranks at different places, and ends the process.
    """

    overlaps = False

    def __init__(self, model: Model, kv_cache: KVCache, config: EngineConfig, ranks: Ranks, vocabulary: int) -> None:
        """`vocabulary`: the whole model's."""
        self._model, self._kv, self._ranks, self._vocabulary = model, kv_cache, ranks, vocabulary
        self._block_size, self._max_context = config.block_size, config.context_limit(model.config)

    def warm_up(self) -> None:
        """Nothing to do."""

    def launch(self, batch: Batch) -> Launched:
        """See `engine.runner.Steps`."""
        if any(part.follows is not None for part in batch.slices):
            raise InternalError("a step on the CPU follows nothing: it is over when it was launched")
        step = step_of(batch, self._block_size)
        self._check(step)
        if step.placing is None and not step.copies:
            return Done(StepOutput([]))
        self._ranks.send(encode(step))
        return Done(sample(batch, compute(self._model, self._kv, step, self._ranks)))

    def _check(self, step: Step) -> None:
        num_blocks = self._kv.tensor.shape[0]
        if step.placing is not None:
            step.placing.check(self._vocabulary, num_blocks, self._max_context)
        if any(not 0 <= block < num_blocks for pair in step.copies for block in pair):
            raise InternalError(f"a copy of {list(step.copies)} leaves the pool of {num_blocks} blocks")


def follow(model: Model, kv_cache: KVCache, ranks: Ranks) -> None:
    """Another rank's life after `Ranks.ready`: computes what rank 0 sends, until that says that it is over."""
    with torch.inference_mode():
        while (message := ranks.receive()) is not None:
            try:
                step = decode(message)
            except InternalError as error:
                ranks.fail(f"rank {ranks.rank} of {ranks.size}: {error}")
            compute(model, kv_cache, step, ranks)
    ranks.close()


def compute(model: Model, kv_cache: KVCache, step: Step, ranks: Ranks) -> Predictions:
    """One rank's part of a step; all of it where ranks meet. What fails here fails the process."""
    try:
        copy_blocks(kv_cache.blocks, step.copies)
        if step.placing is None:
            ranks.meet()  # rank 0 may let others write the blocks that were copied from
            return _NO_ROWS
        token_ids, meta = inputs_of(step.placing)
        return model.step(token_ids, meta, kv_cache, torch.from_numpy(step.rows))
    except Exception as error:
        ranks.fail(
            f"rank {ranks.rank} of {ranks.size} failed in a step ({type(error).__name__}: {error}); if another rank "
            "ended, see what it said; start all ranks anew"
        )
