"""The order of messages in one transfer: `SendSession` beside the sender, `ReceiveSession` beside the receiver.

No I/O here.

Sender:   new -> `open` -> `on_opened` -> {`ready`, `next_offer`, `on_ack`} -> `commit` -> `on_committed`.
          Each `ready` says that more tokens are computed; `next_offer` gives offers until nothing is ready or
          `window` offers are unacknowledged. `ready` may come before `on_opened`: the prefill need not wait.
Receiver: `on_open` -> {`on_offer` gives a plan, `copy(plan)` in a worker thread gives the Ack} -> `on_commit` ->
          `close`.

A message that breaks the rules raises and the stream ends with that error. A session dies with its stream; the lease
lives on for another attempt. Generations are checked around each copy and for every block before the commit.

Room for what isn't built, beside `plan`'s: a push by layers would have Offers name a range of layers as well, and the
receiver's order of offers go by (layers, tokens); to fetch a prefix from the other side a prefill worker would be the
receiver of a transfer, with a lease of its own and a commit that brings no record; a worker that changes its role keeps
its pool and incarnation and serves the other end, for neither end asks which service runs it.
"""

from __future__ import annotations

from kv_transfer.receiving import CopyPlan, Receiver, ReceiveSession
from kv_transfer.sending import WINDOW, Sender, SendSession

__all__ = ["WINDOW", "CopyPlan", "ReceiveSession", "Receiver", "SendSession", "Sender"]
