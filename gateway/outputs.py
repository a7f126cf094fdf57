"""What a request has produced: tokens in order, the text they make, and the record to continue from.

Life cycle: one `Outputs` per request -> `accept` deltas from any worker in any order (duplicates are dropped) and
`finish` per choice -> `done`. Survives every worker; `record` is what the next one starts from. When another gateway
began the request, `restore` comes first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gateway.detokenizer import Detokenizer
from gateway.plain import Delta, Finished, Given, Job
from gateway.stop import StopMatcher
from gateway.tokenizer import Tokenizer
from tandem.errors import InternalError, InvalidRequestError
from tandem.record import FinishReason, OutputState, Record, TokenDelta, TokenLogprobs
from tandem.service.logging import get_logger

_log = get_logger(__name__)


class Choice:
    """One output: tokens given out, tokens that came too early, text."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        """Empty."""
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reason: FinishReason | None = None
        self.end: tuple[FinishReason, int] | None = None
        """What a worker said of the output's end: why, and after how many tokens. Some of them may still be to come."""
        self._ahead = 0
        """Bytes of text that the client has beyond what was replayed here."""
        self._early: dict[int, tuple[int, TokenLogprobs | None]] = {}
        self._min_tokens, self._max_tokens = job.stopping.min_tokens, job.stopping.max_tokens
        self._detokenizer = Detokenizer(tokenizer, skip_special=job.skip_special)
        self._matcher = StopMatcher(job.stop, include=job.include_stop)

    @property
    def told(self) -> bool:
        """True when the worker has said where this output ends."""
        return self.end is not None

    def restore(self, given: Given, alternatives: int | None) -> list[Delta | Finished]:
        """Replays what the client has of this output; returns what it lacks of that: an end, maybe text.

        `alternatives` of each log probability, None for none: those already given are never given again, so blanks
        stand for them. Raises InvalidRequestError for what no stream of this request can have given.
        """
        blank = TokenLogprobs(0.0, (0,) * (alternatives or 0), (0.0,) * (alternatives or 0))
        logprobs = [] if alternatives is None else [blank] * len(given.token_ids)
        if given.reason is not None:
            self.token_ids, self.logprobs, self.reason = list(given.token_ids), logprobs, given.reason
            return []
        self._ahead = given.text_bytes
        events = self.accept(TokenDelta(self.index, 0, list(given.token_ids), logprobs))
        if len(self.token_ids) < len(given.token_ids):
            message = f"output {self.index} has tokens behind a stop string"
            raise InvalidRequestError(message, field="resume.outputs.token_ids")
        lacking = [Delta(self.index, [], e.text, []) for e in events if isinstance(e, Delta) and e.text]
        return [*lacking, *(e for e in events if isinstance(e, Finished))]

    def _unseen(self, text: str) -> str:
        """`text` less what the client has of it from another gateway."""
        if not self._ahead:
            return text
        data = text.encode()
        skip = min(self._ahead, len(data))
        self._ahead -= skip
        try:
            return data[skip:].decode()
        except UnicodeDecodeError:
            message = f"output {self.index}: text_bytes ends within a character"
            raise InvalidRequestError(message, field="resume.outputs.text_bytes") from None

    def accept(self, delta: TokenDelta) -> list[Delta | Finished]:
        """Events for the tokens of `delta` that are new, at most up to a stop string."""
        self._file(delta)
        first, text, match = len(self.token_ids), "", None
        while match is None and len(self.token_ids) in self._early:
            token, logprobs = self._early.pop(len(self.token_ids))
            self.token_ids.append(token)
            if logprobs is not None:
                self.logprobs.append(logprobs)
            piece, match = self._text_of(token)
            text += piece
        if len(self.token_ids) == first:
            return []
        new = self.token_ids[first:]
        events: list[Delta | Finished] = [Delta(self.index, new, self._unseen(text), self.logprobs[first:])]
        if match is not None:
            events.append(self._end(FinishReason.STOP, match))
        elif self.end is not None:
            events += self.finish(*self.end)
        return events

    def _file(self, delta: TokenDelta) -> None:
        """Keeps what is new. A worker that contradicts what was given out has broken exactness: that is logged."""
        if delta.logprobs and len(delta.logprobs) != len(delta.token_ids):
            raise InternalError(f"{len(delta.token_ids)} tokens came with {len(delta.logprobs)} log probabilities")
        for i, token in enumerate(delta.token_ids):
            place = delta.position + i
            if place >= self._max_tokens:
                raise InternalError(f"a worker sent token {place} of an output of at most {self._max_tokens}")
            if place >= len(self.token_ids):
                self._early.setdefault(place, (token, delta.logprobs[i] if delta.logprobs else None))
            elif self.token_ids[place] != token:
                _log.error("two workers disagree", index=self.index, position=place, kept=self.token_ids[place])

    def _text_of(self, token: int) -> tuple[str, str | None]:
        piece = self._detokenizer.push(token)
        if len(self.token_ids) < self._min_tokens:
            return piece, None
        result = self._matcher.push(piece)
        return result.text, result.match

    def finish(self, reason: FinishReason, num_tokens: int = 0) -> list[Delta | Finished]:
        """A worker ended this output after `num_tokens` (0: those that are here).

        Once they are all here, what was held back comes out, maybe with a stop string at its end.
        """
        self.end = (reason, num_tokens)
        if num_tokens > len(self.token_ids):
            return []
        result = self._matcher.push(self._detokenizer.flush())
        text, match = result.text, result.match
        if match is None:
            text += self._matcher.flush()
        text = self._unseen(text)
        finished = self._end(reason if match is None else FinishReason.STOP, match)
        return [Delta(self.index, [], text, []), finished] if text else [finished]

    def _end(self, reason: FinishReason, match: str | None) -> Finished:
        self.reason = reason
        self._early.clear()
        return Finished(self.index, reason, match)


class Outputs:
    """All choices of one request."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        """`job.sampling.n` empty choices."""
        self._job = job
        self.choices = [Choice(i, job, tokenizer) for i in range(job.sampling.n)]

    def restore(self, given: Sequence[Given]) -> list[Delta | Finished]:
        """Starts from what the client has, one entry per choice; returns what it lacks. Raises InvalidRequestError."""
        events: list[Delta | Finished] = []
        for choice, output in zip(self.choices, given, strict=True):
            events += choice.restore(output, self._job.logprobs)
        return events

    @property
    def done(self) -> bool:
        """True when no choice needs more tokens."""
        return all(choice.reason is not None for choice in self.choices)

    @property
    def started(self) -> bool:
        """True when the client has been given a token."""
        return any(choice.token_ids for choice in self.choices)

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def accept(self, delta: TokenDelta) -> list[Delta | Finished]:
        """Events for what is new; none for a choice that has ended."""
        choice = self._choice(delta.index)
        return [] if choice.reason is not None else choice.accept(delta)

    @property
    def ended_by_worker(self) -> bool:
        """True when a worker has said of every choice where it ends."""
        return all(choice.told for choice in self.choices)

    @property
    def complete_soon(self) -> bool:
        """True when nothing is lacking but tokens that a worker has sent already."""
        return all(choice.reason is not None or choice.told for choice in self.choices)

    def restart(self) -> None:
        """Another worker begins: what the last one said of ends that it didn't deliver counts no more."""
        for choice in self.choices:
            choice.end = None

    def finish(self, index: int, reason: FinishReason, num_tokens: int = 0) -> list[Delta | Finished]:
        """A worker says that a choice is complete with its first `num_tokens` tokens (0: those that are here)."""
        choice = self._choice(index)
        return [] if choice.reason is not None else choice.finish(reason, num_tokens)

    def finish_complete(self, eos_token_ids: Collection[int]) -> list[Delta | Finished]:
        """Ends choices whose last token ended them, where the worker died before it could say so."""
        events: list[Delta | Finished] = []
        for choice in self.choices:
            if choice.reason is None and (reason := self._complete(choice, eos_token_ids)) is not None:
                events += choice.finish(reason)
        return events

    def _complete(self, choice: Choice, eos_token_ids: Collection[int]) -> FinishReason | None:
        rules, count = self._job.stopping, len(choice.token_ids)
        if count and count >= rules.min_tokens:
            last = choice.token_ids[-1]
            if last in rules.stop_token_ids or (last in eos_token_ids and not rules.ignore_eos):
                return FinishReason.STOP
        return FinishReason.LENGTH if count >= rules.max_tokens else None

    def emitted(self) -> list[TokenDelta]:
        """All tokens given out, for `Retarget`."""
        return [TokenDelta(c.index, 0, list(c.token_ids), list(c.logprobs)) for c in self.choices if c.token_ids]

    def record(self, model_id: str) -> Record:
        """Prompt and tokens so far: everything that a worker needs to continue."""
        job = self._job
        return Record(
            request_id=job.request_id,
            model_id=model_id,
            prompt=job.prompt,
            sampling=job.sampling,
            stopping=job.stopping,
            outputs=[OutputState(list(c.token_ids), list(c.logprobs), c.reason) for c in self.choices],
            tenant=job.tenant,
            cache_scope=job.cache_scope,
            logprobs=job.logprobs,
            priority=job.priority,
            arrival=job.arrival,
            speculation=job.speculation,
        )

    def _choice(self, index: int) -> Choice:
        if index >= len(self.choices):
            raise InternalError(f"a worker sent output {index} of a request with {len(self.choices)}")
        return self.choices[index]
