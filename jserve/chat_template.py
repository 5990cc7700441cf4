"""Chat templates: a conversation to the one string that the model was trained on.

Templates come with models, so they run in Jinja's immutable sandbox, with the few names that Hugging Face's templates
expect. This module knows no token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jserve.errors import InvalidRequest, ModelError

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, str]
"""`{"role": one of ROLES, "content": text}`."""


class ChatTemplate:
    """One compiled template, and the special tokens that it may name (`bos_token`, `eos_token`)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template does not parse: {error}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt whose continuation is the assistant's next message."""
        check_messages(messages)
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self.special_tokens)
        except _Refused as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise ModelError(f"the model's chat template fails on these messages: {error}") from None


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InvalidRequest naming the first message that no template can take."""
    if not messages:
        raise InvalidRequest("messages is empty: give at least one, with a role and a content")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise InvalidRequest(f'messages[{i}] is {message!r}: use {{"role": ..., "content": a string}}')
        if message.get("role") not in ROLES:
            raise InvalidRequest(f"messages[{i}].role is {message.get('role')!r}: use one of {', '.join(ROLES)}")


class _Refused(jinja2.TemplateError):
    """The template itself called `raise_exception`."""


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _tojson
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; in a prompt it means its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
