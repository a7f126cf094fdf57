"""Checks what a client asked for; each problem is an InvalidRequestError that names the field and what is allowed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from typing import Any

from gateway.config import Limits
from gateway.plain import Asked
from tandem.errors import InvalidRequestError
from tandem.record import SamplingParams, Speculation, StopRules

# name: (least, most, whether the least itself is allowed)
_FLOATS: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 100.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 10.0, False),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}


def _bad(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {message}", field=field)


def check_count(field: str, count: int, most: int) -> None:
    """Before a list is copied: a message has room for millions of entries."""
    if count > most:
        raise _bad(field, f"{count} entries, at most {most} are allowed")


def check_sizes(asked: Asked, limits: Limits) -> None:
    """Everything that can be told before the text is tokenized, bytes first."""
    if len(asked.request_id) > limits.max_request_id:
        raise _bad("request_id", f"{len(asked.request_id)} characters, at most {limits.max_request_id} are allowed")
    if len(asked.cache_salt) > limits.max_cache_salt:
        raise _bad("cache_salt", f"{len(asked.cache_salt)} characters, at most {limits.max_cache_salt} are allowed")
    check_input(asked.text, asked.messages, limits)
    if asked.token_ids is not None and not asked.token_ids:
        raise _bad("token_ids", "the prompt is empty")
    if asked.text is None and asked.token_ids is None and asked.messages is None:
        raise InvalidRequestError("input: one of text, token_ids and messages is needed", field="input")
    _check_stops(asked, limits)
    if asked.logprobs is not None and not 0 <= asked.logprobs <= limits.max_logprobs:
        raise _bad("output.logprobs", f"{asked.logprobs} is outside 0 to {limits.max_logprobs}")


def check_speculation(asked: Speculation, limits: Limits, proposers: set[str] | None) -> None:
    """A proposer must be one that a worker has, as far as that is known (None: it isn't)."""
    modes = ["auto", "off", *sorted(proposers or ())]
    if asked.mode not in modes and proposers is not None:
        raise _bad("speculation.mode", f"{asked.mode[:64]!r} is not one of {', '.join(modes)}")
    most = limits.max_draft_tokens
    if asked.max_tokens is not None and not 0 <= asked.max_tokens <= most:
        raise _bad("speculation.max_tokens", f"{asked.max_tokens} is outside 0 to {most}")


def check_input(text: str | None, messages: tuple[tuple[str, str], ...] | None, limits: Limits) -> None:
    """Sizes of text or messages, for prompts and for Tokenize."""
    from gateway.chat import MAX_ROLE_CHARACTERS

    if text is not None:
        if not text:
            raise _bad("text", "the prompt is empty")
        _check_bytes("text", [text], limits)
    if messages is not None:
        if not messages:
            raise _bad("messages", "the chat is empty")
        _check_bytes("messages", [part for message in messages for part in message], limits)
        for role, _content in messages:
            if not 1 <= len(role) <= MAX_ROLE_CHARACTERS:
                raise _bad("messages.role", f"{len(role)} characters, 1 to {MAX_ROLE_CHARACTERS} are allowed")


def _check_bytes(field: str, parts: Iterable[str], limits: Limits) -> None:
    size = sum(len(part.encode()) for part in parts)
    if size > limits.max_prompt_bytes:
        raise _bad(field, f"{size} bytes, at most {limits.max_prompt_bytes} are allowed")


def _check_stops(asked: Asked, limits: Limits) -> None:
    for stop in asked.stop:
        if not 1 <= len(stop) <= limits.max_stop_characters:
            allowed = f"1 to {limits.max_stop_characters} are allowed"
            raise _bad("stopping.stop", f"a stop string of {len(stop)} characters, {allowed}")


def sampling_params(asked: Asked, limits: Limits, vocab_size: int) -> SamplingParams:
    """Complete sampling parameters; a seed is drawn when none was given."""
    values: dict[str, Any] = dict(asked.sampling)
    for name, (least, most, inclusive) in _FLOATS.items():
        value = values.get(name)
        if value is None:
            continue
        inside = (least <= value if inclusive else least < value) and value <= most
        if not (math.isfinite(value) and inside):
            bracket = "[" if inclusive else "("
            raise _bad(f"sampling.{name}", f"{value} is outside {bracket}{least:g}, {most:g}]")
    top_k, n = values.get("top_k", 0), values.get("n", 1)
    if top_k < 0:
        raise _bad("sampling.top_k", f"{top_k} is negative; 0 keeps all tokens")
    if not 1 <= n <= limits.max_n:
        raise _bad("sampling.n", f"{n} is outside 1 to {limits.max_n}")
    _check_bias(asked, vocab_size)
    seed = _seed(asked, values.pop("seed", None), greedy=values.get("temperature") == 0)
    return SamplingParams(seed=seed, logit_bias=dict(asked.logit_bias), **values)


def _seed(asked: Asked, named: int | None, *, greedy: bool) -> int:
    """The request's, the one that was drawn before the stream broke off, or a new one."""
    drawn = asked.resume.seed if asked.resume is not None else None
    if named is not None and drawn is not None and named != drawn:
        raise _bad("resume.seed", f"{drawn} differs from sampling.seed = {named}")
    if named is None and drawn is None:
        if asked.resume is not None and asked.resume.outputs and not greedy:
            raise _bad("resume.seed", "needed to go on with outputs that are sampled; the stream's first event has it")
        return secrets.randbits(63)
    return (drawn or 0) if named is None else named


def check_resume_count(asked: Asked, sampling: SamplingParams) -> None:
    """As many outputs as the request has, or none."""
    given = asked.resume.outputs if asked.resume is not None else ()
    if given and len(given) != sampling.n:
        raise _bad("resume.outputs", f"{len(given)} outputs of a request with n = {sampling.n}")


def check_resume(asked: Asked, stopping: StopRules, vocab_size: int) -> None:
    """What the client says it has must be possible for this request."""
    for output in asked.resume.outputs if asked.resume is not None else ():
        check_ids("resume.outputs.token_ids", output.token_ids, vocab_size)
        if len(output.token_ids) > stopping.max_tokens:
            count, most = len(output.token_ids), stopping.max_tokens
            raise _bad("resume.outputs.token_ids", f"{count} tokens of an output of at most {most}")


def _check_bias(asked: Asked, vocab_size: int) -> None:
    for value in asked.logit_bias.values():
        if not -100 <= value <= 100:
            raise _bad("sampling.logit_bias", f"{value} is outside [-100, 100]")
    check_ids("sampling.logit_bias", asked.logit_bias, vocab_size)


def check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Every id must be in the vocabulary."""
    worst = max(ids, default=0)
    if worst >= vocab_size:
        raise _bad(field, f"token id {worst} is outside the vocabulary of {vocab_size}")


def check_room(field: str, tokens: int, max_context: int, *, at_least: bool = False) -> None:
    """A prompt must leave room for one token."""
    if tokens >= max_context:
        count = f"at least {tokens}" if at_least else tokens
        raise _bad(field, f"the prompt has {count} tokens, the model's context is {max_context} with the output")


def stop_rules(asked: Asked, limits: Limits, *, prompt_tokens: int, max_context: int, vocab_size: int) -> StopRules:
    """Complete stop rules. A prompt or an explicit max_tokens that doesn't fit is an error with numbers."""
    source = "text" if asked.text is not None else "token_ids" if asked.token_ids is not None else "messages"
    room = max_context - prompt_tokens
    if prompt_tokens == 0:
        raise _bad(source, "the prompt has no tokens")
    check_room(source, prompt_tokens, max_context)
    max_tokens = min(room, limits.default_max_tokens) if asked.max_tokens is None else asked.max_tokens
    if not 1 <= max_tokens <= room:
        fits = f"the prompt's {prompt_tokens} tokens leave 1 to {room} of the context of {max_context}"
        raise _bad("stopping.max_tokens", f"{max_tokens} is not allowed: {fits}")
    min_tokens = asked.min_tokens or 0
    if not 0 <= min_tokens <= max_tokens:
        raise _bad("stopping.min_tokens", f"{min_tokens} is outside 0 to max_tokens = {max_tokens}")
    check_ids("stopping.stop_token_ids", asked.stop_token_ids, vocab_size)
    return StopRules(max_tokens, min_tokens, asked.stop_token_ids, asked.ignore_eos)
