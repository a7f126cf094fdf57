"""The order of messages in one transfer: `SendSession` beside the sender, `ReceiveSession` beside the receiver.

No I/O here.

Sender:   new -> `open` -> `on_opened` -> {`ready`, `next_offer`, `on_ack`} -> `commit` -> `on_committed`.
          Each `ready` says that more tokens are computed; `next_offer` gives offers until nothing is ready or
          `window` offers are unacknowledged. `ready` may come before `on_opened`: the prefill need not wait.
Receiver: `on_open` -> {`on_offer` gives a plan, `copy(plan)` in a worker thread gives the Ack} -> `on_commit` ->
          `close`.

A message that breaks the rules raises and the stream ends with that error. A session dies with its stream; the lease
lives on for another attempt. Generations are checked around each copy and for every block before the commit.
"""

from __future__ import annotations

from kv_transfer.receiving import CopyPlan, Receiver, ReceiveSession
from kv_transfer.sending import WINDOW, Sender, SendSession

__all__ = ["WINDOW", "CopyPlan", "ReceiveSession", "Receiver", "SendSession", "Sender"]
