"""Find the calls of tools in what a model writes: Hermes' and Qwen's `<tool_call>{…}</tool_call>`, DeepSeek V3's and R1's marks. Pure.

A call is shown when it is complete. What looks like one and cannot be read is given back as text: nothing a model says is lost.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from producers.reasoning import held_back

Tool = dict[str, Any]   # {"type": "function", "function": {"name", "description", "parameters"}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON text, as OpenAI has it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How one family of models writes calls. `read` raises ValueError; `explain` tells a model whose template cannot."""

    name: str
    begin: str
    end: str
    around: tuple[str, ...]     # marks that say nothing of their own
    read: Callable[[str], list[ToolCall]]
    explain: Callable[[Sequence[Tool]], str]

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.begin, self.end, *self.around)


class ToolCallParser:
    """How the text was cut into pieces makes no difference."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self._format = tool_format
        self._held = ""
        self._is_inside = False
        self._has_called = False

    def feed(self, piece: str) -> tuple[str, list[ToolCall]]:
        """(text, calls) that are certain now."""
        self._held += piece
        text, calls = "", []
        while True:
            shown, found, is_more = self._inside() if self._is_inside else self._outside()
            text += shown
            calls += found
            if not is_more:
                return text, calls

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The rest, once no more text comes: a call whose end mark is missing counts if it can be read."""
        held, self._held = self._held, ""
        if not self._is_inside:
            return self._shown(held), []
        self._is_inside = False
        try:
            return "", self._format.read(held)
        except ValueError:
            return self._format.begin + held, []

    def _outside(self) -> tuple[str, list[ToolCall], bool]:
        marks = (self._format.begin, *self._format.around)
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if not found:
            certain = len(self._held) - held_back(self._held, *marks)
            # White space before a mark belongs to the mark.
            certain = len(self._held[:certain].rstrip())
            text, self._held = self._held[:certain], self._held[certain:]
            return self._shown(text), [], False
        at, mark = min(found)
        text, self._held = self._held[:at].rstrip(), self._held[at + len(mark):]
        text = self._shown(text)
        self._is_inside = mark == self._format.begin
        self._has_called = True
        return text, [], True

    def _inside(self) -> tuple[str, list[ToolCall], bool]:
        body, mark, rest = self._held.partition(self._format.end)
        if not mark:
            return "", [], False
        self._is_inside, self._held = False, rest
        try:
            return "", self._format.read(body), True
        except ValueError:
            return self._format.begin + body + mark, [], True

    def _shown(self, text: str) -> str:
        """White space between and after calls is not an answer."""
        return "" if self._has_called and not text.strip() else text


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("a call names a function")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def read_calls(text: str) -> list[ToolCall]:
    """One call as JSON, or a list of them. Raises ValueError."""
    value = json.loads(text)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise ValueError("no call")
    return [_call(each) for each in calls]


def _explain_hermes(tools: Sequence[Tool]) -> str:
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n" + signatures + "\n</tools>\n\n"
            "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def _read_deepseek(text: str) -> list[ToolCall]:
    """V3 and R1: `function<sep>NAME\\n```json\\n{…}\\n```; V3.1: `NAME<sep>{…}`."""
    head, separator, tail = text.strip().partition(SEPARATOR)
    if not separator:
        raise ValueError("no separator")
    if head.strip() == "function" and (fence := tail.find("```")) >= 0:
        name, arguments = tail[:fence], tail[fence:].removeprefix("```json").removeprefix("```").strip().removesuffix("```")
    else:
        name, arguments = head, tail
    return [_call({"name": name.strip(), "arguments": json.loads(arguments)})]


def _explain_deepseek(tools: Sequence[Tool]) -> str:
    functions = "\n\n".join(
        f"- `{tool['function']['name']}`:\n```json\n{json.dumps(tool['function'], ensure_ascii=False)}\n```" for tool in tools)
    return ("You can call functions. To call one, use exactly this form:\n"
            f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}FUNCTION_NAME\n```json\n"
            '{"param1": "value1", "param2": "value2"}\n'
            f"```{CALL_END}{CALLS_END}\nMake sure the JSON is valid.\n\n## Tools\n\n### Function\n\n"
            f"You have the following functions available:\n\n{functions}")


HERMES = ToolFormat(name="hermes", begin="<tool_call>", end="</tool_call>", around=(), read=read_calls, explain=_explain_hermes)
DEEPSEEK = ToolFormat(name="deepseek", begin=CALL_BEGIN, end=CALL_END, around=(CALLS_BEGIN, CALLS_END), read=_read_deepseek,
                      explain=_explain_deepseek)


def format_of(chat_template: str, added_tokens: Sequence[str]) -> ToolFormat:
    """By the marks that the model knows; Hermes' for those that know none."""
    return DEEPSEEK if CALL_BEGIN in chat_template or CALL_BEGIN in added_tokens else HERMES
