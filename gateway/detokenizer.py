"""Token ids to text, one token at a time.

Life cycle: one `Detokenizer` per output; `push` each token in order, `flush` once at the end. Bytes of an unfinished
character wait inside, so no delta ever holds a broken one, and the deltas joined are the text of the whole (bytes
that never become a character turn into U+FFFD, as they do in a decode of the whole).
"""

from __future__ import annotations

import codecs

from gateway.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one output as it grows."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        """`skip_special` leaves special tokens out of the text."""
        self._tokenizer, self._skip = tokenizer, skip_special
        self._decoder = _UTF8("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, maybe none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, skip_special=self._skip))

    def flush(self) -> str:
        """What an unfinished character at the end becomes."""
        return self._decoder.decode(b"", final=True)
