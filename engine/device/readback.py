"""Results of draws on their way from the device to the host."""

from __future__ import annotations

from torch import Tensor

from engine.device.device import Device
from kernels.backends import DrawResults


class Readback:
    """Life cycle: built right behind the launch of the draws, which starts the copies -> `wait` once."""

    def __init__(self, device: Device, results: DrawResults) -> None:
        """Copies are launched; nothing is waited for."""
        self._copies = [_start(device, part) for part in (results.values, results.top_ids, results.top_logprobs)]
        self._fence = device.fence()

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, alternatives' ids and their log probabilities, on the host."""
        self._fence.wait()
        values, ids, logprobs = self._copies
        return values, ids, logprobs


def _start(device: Device, tensor: Tensor) -> Tensor:
    if not tensor.numel() or tensor.device.type == "cpu":
        return tensor.clone()  # on a CPU the next step would write over a graph's results
    host = device.host_buffer(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)
    return host.copy_(tensor, non_blocking=True)
