"""`tool_choice` and `response_format`: what an answer may be, as a JSON schema to hold it to, and how it is read back. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coordinator.errors import InvalidField
from producers.tool_calls import Tool

Mode = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class Choice:
    """none: text. auto: text in which calls are looked for. required: a list of calls. named: the arguments of `name`."""

    mode: Mode
    name: str = ""


def read_tool_choice(given: Any, tools: Sequence[Tool]) -> Choice:
    """Raises InvalidField."""
    if given is None:
        return Choice("auto" if tools else "none")
    if given == "none":
        return Choice("none")
    if not tools:
        raise InvalidField("tool_choice", "is allowed only with tools")
    if given in ("auto", "required"):
        return Choice("auto" if given == "auto" else "required")
    function = given.get("function") if isinstance(given, dict) and given.get("type") == "function" else None
    if not isinstance(function, dict) or set(given) != {"type", "function"} or set(function) != {"name"}:
        raise InvalidField("tool_choice", "must be none, auto, required or {type: function, function: {name}}")
    if function["name"] not in [tool["function"]["name"] for tool in tools]:
        raise InvalidField("tool_choice", f"there is no tool {function['name']!r:.80}")
    return Choice("named", function["name"])


def schema_of_calls(choice: Choice, tools: Sequence[Tool], *, only_one: bool) -> str:
    """What the text of a required or named call is held to."""
    functions = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if choice.mode == "named":
        return json.dumps(functions[choice.name])
    parameters = {f"tool_{i}": _moved(schema, f"#/$defs/tool_{i}") for i, schema in enumerate(functions.values())}
    calls = [{"type": "object", "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/tool_{i}"}},
              "required": ["name", "arguments"], "additionalProperties": False} for i, name in enumerate(functions)]
    most = {"maxItems": 1} if only_one else {}
    return json.dumps({"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, "$defs": parameters})


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to its own root follow it to another place."""
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: root + value.removeprefix("#") if name == "$ref" and isinstance(value, str) and value.startswith("#") else
            _moved(value, root) for name, value in schema.items()}


def read_response_format(given: Any) -> str:
    """The schema that the answer is held to; "" for text. Raises InvalidField."""
    if given is None:
        return ""
    kind = given.get("type") if isinstance(given, dict) else given
    if kind in ("text", "json_object") and set(given) == {"type"}:
        return "" if kind == "text" else "{}"
    if kind != "json_schema":
        raise InvalidField("response_format", "must be of type text, json_object or json_schema (with json_schema: {name, schema})")
    inner = given.get("json_schema")
    if set(given) != {"type", "json_schema"} or not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise InvalidField("response_format", "json_schema must be {name, schema}, the schema an object")
    if (unknown := [name for name in inner if name not in ("name", "description", "schema", "strict")]):
        raise InvalidField(f"response_format.json_schema.{unknown[0][:80]}", "unknown field")
    return json.dumps(inner["schema"])
