"""A client's `messages` and `tools`, checked and put into the words of chat templates. Pure; raises InvalidField naming the place."""

import json
import re
from typing import Any

from coordinator.errors import InvalidField
from producers.tool_calls import Tool

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {
    "system": {"name"}, "developer": {"name"}, "user": {"name"}, "tool": {"name", "tool_call_id"},
    "assistant": {"name", "tool_calls", "reasoning_content", "refusal", "audio", "function_call", "annotations"},
}
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_TOOLS = 128


class Arguments(dict[str, Any]):
    """A call's arguments: an object for templates that write it as JSON, and its text for those that put it between strings."""

    def __init__(self, text: str, value: dict[str, Any]) -> None:
        super().__init__(value)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: Any) -> str:
        return self.text + str(other)

    def __radd__(self, other: Any) -> str:
        return str(other) + self.text


def read_messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise InvalidField("messages", "must be a list of at least one message")
    return [_message(each, f"messages[{i}]") for i, each in enumerate(given)]


def _message(given: Any, place: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidField(place, "must be an object")
    role = given.get("role")
    if role not in ROLES:
        raise InvalidField(f"{place}.role", f"must be one of {', '.join(ROLES)}, got {role!r:.40}")
    if (unknown := [name for name in given if name not in _FIELDS[role] | {"role", "content"}]):
        raise InvalidField(f"{place}.{unknown[0][:80]}", "unknown field")
    for name in ("audio", "function_call", "refusal"):
        if given.get(name):
            raise InvalidField(f"{place}.{name}", "is not supported")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = _calls(given.get("tool_calls"), f"{place}.tool_calls")
    message["content"] = None if calls and given.get("content") is None else _content(given.get("content"), f"{place}.content")
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id", "reasoning_content"):
        if given.get(name) is not None:
            if not isinstance(given[name], str):
                raise InvalidField(f"{place}.{name}", "must be a string")
            message[name] = given[name]
    return message


def _content(given: Any, place: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise InvalidField(place, "must be a string or a list of text parts")
    texts = []
    for i, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidField(f"{place}[{i}]", f"only parts of type text are supported, got {kind!r:.40}")
        if not isinstance(part.get("text"), str):
            raise InvalidField(f"{place}[{i}].text", "must be a string")
        if (unknown := [name for name in part if name not in ("type", "text")]):
            raise InvalidField(f"{place}[{i}].{unknown[0][:80]}", "unknown field")
        texts.append(part["text"])
    return "".join(texts)


def _calls(given: Any, place: str) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise InvalidField(place, "must be a list")
    return [_one_call(call, f"{place}[{i}]") for i, call in enumerate(given)]


def _one_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or call.get("type", "function") != "function":
        raise InvalidField(place, "must be a call of a function: {id, type: function, function: {name, arguments}}")
    text = function.get("arguments", "{}")
    try:
        value = json.loads(text) if isinstance(text, str) and text.strip() else {}
    except (ValueError, RecursionError):
        raise InvalidField(f"{place}.function.arguments", "must be JSON text") from None
    if not isinstance(text, str) or not isinstance(value, dict):
        raise InvalidField(f"{place}.function.arguments", "must be the JSON text of an object")
    return {"id": str(call.get("id", "")), "type": "function", "function": {"name": function["name"], "arguments": Arguments(text, value)}}


def read_tools(given: Any) -> list[Tool]:
    if given is None:
        return []
    if not isinstance(given, list) or not 0 < len(given) <= MAX_TOOLS:
        raise InvalidField("tools", f"must be a list of 1 to {MAX_TOOLS} tools")
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(given)]
    names = [tool["function"]["name"] for tool in tools]
    if (twice := [name for name in names if names.count(name) > 1]):
        raise InvalidField("tools", f"the function {twice[0]} is there twice")
    return tools


def _tool(given: Any, place: str) -> Tool:
    if not isinstance(given, dict) or given.get("type") != "function" or not isinstance(given.get("function"), dict):
        raise InvalidField(place, "must be {type: function, function: {…}}")
    if (unknown := [name for name in given if name not in ("type", "function")]):
        raise InvalidField(f"{place}.{unknown[0][:80]}", "unknown field")
    function = given["function"]
    if (unknown := [name for name in function if name not in ("name", "description", "parameters", "strict")]):
        raise InvalidField(f"{place}.function.{unknown[0][:80]}", "unknown field")
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise InvalidField(f"{place}.function.name", "must be 1 to 64 letters, digits, '_', '-' or '.'")
    if not isinstance(function.get("description") or "", str):
        raise InvalidField(f"{place}.function.description", "must be a string")
    if not isinstance(function.get("parameters") or {}, dict):
        raise InvalidField(f"{place}.function.parameters", "must be a JSON schema (an object)")
    kept = {name: value for name, value in function.items() if name != "strict" and value is not None}   # in the client's order
    kept.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": kept}
