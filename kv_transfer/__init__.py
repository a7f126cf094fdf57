"""Moves paged KV blocks between the pools of two workers, as bytes described by a `KvLayout`.

No torch, no gRPC, no protobuf.

    sender (prefill)                                   receiver (decode)
    SendSession.open()           -- Open -->           ReceiveSession.on_open     (blocking: connects)
    SendSession.on_opened        <-- Opened --
    SendSession.ready(...)       (a chunk finished)
    SendSession.next_offer()     -- Offer -->          on_offer -> CopyPlan; copy(plan)   (blocking: lands the blocks)
    SendSession.on_ack           <-- Ack --
    SendSession.commit(record)   -- Commit -->         on_commit -> Committed
    SendSession.on_committed     <-- Committed --

`tandem.kv_layout` says how bytes lie, `messages` what travels, `pool` where blocks live, `leases` who may write which
blocks of the receiver and until when, `peers` whose a sender's addresses are, `session` the order of messages,
`transport` how bytes get across (memory.py, shm.py, nixl.py, grpc.py), `registry` which transport two workers use.
Where the two pools aren't alike, `plan` says which bytes go where, `landing` brings them by way of `staging`,
`conversion` and `formats` change them; `ranks` speaks for several ranks at once.
"""

from __future__ import annotations
