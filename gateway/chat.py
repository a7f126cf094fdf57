"""Chat messages to a prompt, by the model's own Jinja template in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.tokenizer import Tokenizer
from gateway.validation import check_room
from tandem.errors import InvalidRequestError

MAX_MESSAGES = 1024
MAX_ROLE_CHARACTERS = 64
MAX_TEMPLATE_CHARACTERS = 1 << 20
# A template may repeat what it is given, but not without end.
MAX_GROWTH = 4
MAX_OVERHEAD = 1 << 20
_PRIVATE_USE = range(0xF0000, 0xFFFFD)


class _TemplateError(Exception):
    """The template itself refused the messages."""


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With the arguments that transformers gives its filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model said, for training; here its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Immutable; may be used from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Compiles the tokenizer's template; a model without a template, or with a broken one, refuses chats only."""
        self._tokenizer = tokenizer
        self._template: jinja2.Template | None = None
        self._problem = "the model has no chat template; send text or token_ids"
        source = tokenizer.config.chat_template
        if not source:
            return
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            if len(source) > MAX_TEMPLATE_CHARACTERS:
                raise jinja2.TemplateError(f"longer than {MAX_TEMPLATE_CHARACTERS} characters")
            self._template = environment.from_string(source)
        except jinja2.TemplateError as exc:
            self._problem = f"the model's chat template can't be used: {exc}"

    def encode(self, messages: Sequence[tuple[str, str]], *, context: int | None = None) -> list[int]:
        """Token ids of (role, content) pairs with the header of the answer. Blocking: call it from a thread.

        Special tokens inside roles and contents are text. Raises InvalidRequestError (field `messages`), for a chat
        that can't fit in `context` before it is tokenized.
        """
        mark = _unused_mark(messages)
        escape = self._tokenizer.escape
        safe = [{"role": escape(role, mark), "content": escape(content, mark)} for role, content in messages]
        text = self._render(safe)
        if context is not None:
            least = self._tokenizer.least_tokens(text.replace(mark, ""))
            check_room("messages", least, context, at_least=True)
        return self._tokenizer.encode_escaped(text, mark)

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._template is None:
            raise InvalidRequestError(self._problem, field="messages")
        limit = MAX_OVERHEAD + MAX_GROWTH * sum(len(m["content"]) + len(m["role"]) for m in messages)
        config, parts, length = self._tokenizer.config, [], 0
        variables = {"bos_token": config.bos_token, "eos_token": config.eos_token, "add_generation_prompt": True}
        try:
            for part in self._template.generate(messages=messages, tools=None, **variables):
                length += len(part)
                if length > limit:
                    raise _TemplateError(f"it makes more than {limit} characters of this chat")
                parts.append(part)
        except (_TemplateError, jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as exc:
            raise InvalidRequestError(f"the chat template refused the messages: {exc}", field="messages") from exc
        return "".join(parts)


def _unused_mark(messages: Sequence[tuple[str, str]]) -> str:
    """A private-use character that no message holds."""
    text = "".join(role + content for role, content in messages)
    used = set(text) if any(ord(char) >= 0xF0000 for char in text) else set()
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)
