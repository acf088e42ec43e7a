"""A checkpoint's chat template: messages in, prompt text out. Jinja in a sandbox, as transformers renders it; other code is never run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coordinator.errors import InvalidField
from coordinator.tokenizer import Tokenizer
from producers.reasoning import CLOSING, OPENING
from producers.tool_calls import Tool, ToolFormat, format_of

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks training text; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class ChatFormat:
    """How one model is talked to."""

    template: jinja2.Template
    special_tokens: dict[str, str]
    takes_tools: bool            # else the model is told of them in a system message
    thinks: bool                 # it knows the marks of thinking
    tool_format: ToolFormat
    hides_tool_marks: bool       # they are special tokens: shown only when those are

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool] = (), options: dict[str, Any] | None = None) -> str:
        """The prompt up to where the assistant speaks. Raises InvalidField for what the template cannot take."""
        if (taken := sorted(RESERVED & set(options or ()))):
            raise InvalidField("chat_template_kwargs", f"{taken[0]} cannot be given here")
        if tools and not self.takes_tools:
            messages = with_system_text(messages, self.tool_format.explain(tools))
        given = {**self.special_tokens, **(options or {}), "messages": messages, "tools": list(tools) or None, "documents": None,
                 "add_generation_prompt": True}
        try:
            return self.template.render(given)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise InvalidField("messages", f"the model's chat template does not take them: {str(error)[:200]}") from None


def thinks_at_the_end(prompt: str) -> bool:
    """Whether a prompt ends inside of an open thought: what the model says first is one."""
    return prompt.rstrip().endswith(OPENING)


def with_system_text(messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


@lru_cache(maxsize=8)
def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """Raises InvalidField (field `messages`) when the checkpoint has no chat template, or one that is none."""
    source = tokenizer.chat_template
    if not source:
        raise InvalidField("messages", "this checkpoint has no chat template: use /v1/completions")
    environment = _environment()
    try:
        template = environment.from_string(source)
        variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError as error:
        raise InvalidField("messages", f"this checkpoint's chat template cannot be read: {error}") from None
    added = tuple(tokenizer.added_tokens.values())
    tool_format = format_of(source, added)
    special = {tokenizer.added_tokens[token_id] for token_id in tokenizer.special_ids if token_id in tokenizer.added_tokens}
    return ChatFormat(template=template, special_tokens=tokenizer.special_tokens, takes_tools="tools" in variables,
                      thinks=CLOSING in source or OPENING in added, tool_format=tool_format,
                      hides_tool_marks=bool(special & {*tool_format.marks, OPENING, CLOSING}))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
             sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
