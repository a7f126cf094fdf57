"""The Python client of the public API.

    from tandem.client import Client, Delta

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The capital of France is", max_tokens=8, temperature=0).text)
        with client.stream(messages=[{"role": "user", "content": "Hello!"}]) as events:
            for event in events:
                if isinstance(event, Delta):
                    print(event.text, end="")

`AsyncClient` is the same with `await` and `async for`. Errors are `tandem.errors`. With several gateways
(`addresses=[...]`) a stream whose gateway is lost goes on at the next one, and with one gateway at that one once it is
back: nothing comes twice, and the tokens are the same. Tries are bounded in number and by the timeout. Closing or
leaving a stream cancels the request on the server.
"""

from __future__ import annotations

from tandem.client.asynchronous import AsyncClient, AsyncStream
from tandem.client.blocking import Client, Stream
from tandem.client.types import (
    Choice,
    Delta,
    End,
    Event,
    Finished,
    GenerateResult,
    Message,
    Model,
    Options,
    PromptAccepted,
    Timings,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "Delta",
    "End",
    "Event",
    "Finished",
    "GenerateResult",
    "Message",
    "Model",
    "Options",
    "PromptAccepted",
    "Stream",
    "Timings",
    "Usage",
]
