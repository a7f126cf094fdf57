"""The model's text side for the servicer: tokenizing off the event loop, chat, decoding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gateway.chat import ChatTemplate
from gateway.tokenizer import Tokenizer, load_tokenizer
from gateway.validation import check_room
from tandem.errors import OverloadedError

T = TypeVar("T")
# Tokenizing this much takes a fraction of a millisecond, less than the way to a thread and back may cost.
INLINE_CHARACTERS = 256
INLINE_TOKENS = 1024
THREADS = 2
# Texts that may wait for a thread: with the largest prompts this is what they may hold of memory.
MAX_WAITING = 256


class TextService:
    """Tokenizer and chat template with two threads. `close` at the end.

    Raises OverloadedError when too many texts wait for them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Starts no thread before the first long text."""
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._waiting = 0

    @classmethod
    def load(cls, path: str | Path) -> TextService:
        """Raises ModelFormatError."""
        return cls(load_tokenizer(path))

    async def encode(self, text: str, *, add_special: bool = True, context: int | None = None) -> list[int]:
        """Token ids of plain text. One that can't fit in `context` is refused before the work."""
        if context is not None:
            check_room("text", self.tokenizer.least_tokens(text), context, at_least=True)
        return await self._run(len(text) > INLINE_CHARACTERS, lambda: self._encode(text, add_special))

    async def encode_chat(self, messages: Sequence[tuple[str, str]], *, context: int | None = None) -> list[int]:
        """Token ids of a chat with the header of the answer; `context` as above. Raises InvalidRequestError."""
        # A template is a program: it never runs on the event loop.
        return await self._run(True, lambda: self.chat.encode(messages, context=context))

    async def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of a whole sequence."""
        return await self._run(len(ids) > INLINE_TOKENS, lambda: self.tokenizer.decode(ids, skip_special=skip_special))

    def close(self) -> None:
        """Doesn't wait for texts in work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special=add_special)

    async def _run(self, in_thread: bool, work: Callable[[], T]) -> T:
        if not in_thread:
            return work()
        if self._waiting >= THREADS + MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} texts wait to be tokenized", reason="QUEUE_FULL")
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        self._waiting += 1
        try:
            return await future
        finally:
            self._waiting -= 1
