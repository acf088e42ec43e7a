"""Which JSON schemas an answer can be held to, decided before a job is accepted. Pure; compiles nothing.

A constrained answer always validates. So whatever the grammar compiler (xgrammar) passes over in silence is refused here, by keyword and
place: keywords it does not know, and siblings of which it reads only one.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from typing import Any

from coordinator.errors import InvalidField

FIELD = "guided_json"
MAX_DEPTH = 64          # the compiler recurses, and takes much longer per level
MAX_MULTIPLE = 1000     # the compiler makes a state for each remainder
ANY_OBJECT = '{"type": "object"}'

ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema",
                         "$defs", "definitions", "discriminator"})
CHOICES = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
KEYWORDS: dict[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": BOUNDS | {"multipleOf"},
    "number": BOUNDS,
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "object": frozenset({"properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
                         "maxProperties", "unevaluatedProperties"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
# Those whose grammar lets nothing wrong through, but for days that no month has. Of ipv4 it allows leading zeros.
FORMATS = frozenset({"email", "date", "time", "date-time", "duration", "ipv6", "hostname", "uuid", "uri", "uri-reference", "uri-template"})
LOOKAROUND = ("(?=", "(?!", "(?<")


@lru_cache(maxsize=256)
def checked(text: str) -> str:
    """The schema as the compiler takes it; `{}` means any object. Raises InvalidField naming the place of what cannot be honoured."""
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidField(FIELD, f"is not JSON: {error}"[:300]) from None
    if not isinstance(schema, dict):
        raise InvalidField(FIELD, f"must be a JSON schema (an object), not {type(schema).__name__}")
    _check(schema, "#", 0, schema)
    return ANY_OBJECT if set(schema) <= ANNOTATIONS else text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _refuse(where: str, reason: str) -> InvalidField:
    return InvalidField(FIELD, f"{reason[:200]}, at {where[:100]}")


def _check(schema: Any, where: str, depth: int, root: dict[str, Any]) -> None:
    if depth > MAX_DEPTH:
        raise _refuse(where, f"is nested deeper than {MAX_DEPTH} levels")
    if schema is True:
        return
    if not isinstance(schema, dict):
        raise _refuse(where, f"a schema is an object, not {schema!r:.40}")
    choices = [name for name in CHOICES if name in schema]
    if choices:
        _check_choice(schema, choices[0], where, root)
    else:
        _check_keywords(schema, where)
    for place, inner in _inner(schema, where):
        _check(inner, place, depth + 1, root)


def _check_choice(schema: dict[str, Any], choice: str, where: str, root: dict[str, Any]) -> None:
    value = schema[choice]
    allowed = ANNOTATIONS | {choice} | ({"type"} if choice in ("enum", "const") else set())
    if (others := sorted(name for name in schema if name not in allowed and not name.startswith("x-"))):
        raise _refuse(where, f"{others[0]!r} beside {choice!r} is not supported")
    if choice == "$ref" and not (isinstance(value, str) and isinstance(_resolved(schema, root), dict | bool)):
        raise _refuse(where, f"$ref {value!r:.80} does not point into this schema")
    if choice in ("anyOf", "oneOf", "allOf"):
        if not isinstance(value, list) or not value:
            raise _refuse(where, f"{choice!r} must be a list of schemas")
        if choice == "allOf" and len(value) > 1:
            raise _refuse(where, "'allOf' of more than one schema is not supported")
        if choice == "oneOf" and any(_may_both_hold(a, b, root) for a, b in combinations(value, 2)):
            raise _refuse(where, "'oneOf' is supported only where types or a required constant tell its schemas apart: use 'anyOf'")
    if choice in ("enum", "const"):
        values = [value] if choice == "const" else value
        if not isinstance(values, list) or not values:
            raise _refuse(where, "'enum' must be a list of values")
        if "type" in schema and not all(_type_of(each) & _types(schema, where) for each in values):
            raise _refuse(where, f"a value of {choice!r} is not of the type given")


def _check_keywords(schema: dict[str, Any], where: str) -> None:
    given = {name for name in schema if name not in ANNOTATIONS and name != "type" and not name.startswith("x-")}
    types = _types(schema, where)
    for name in sorted(given):
        if not any(name in KEYWORDS[of] for of in types):
            is_known = any(name in keywords for keywords in KEYWORDS.values())
            raise _refuse(where, f"{name!r} needs a 'type' that it applies to" if is_known else f"the keyword {name!r} is not supported")
    if schema.get("uniqueItems"):
        raise _refuse(where, "'uniqueItems' is not supported")
    if "format" in given and schema["format"] not in FORMATS:
        raise _refuse(where, f"the format {schema['format']!r:.40} is not supported")
    if {"pattern", "format"} & given and len({"pattern", "format", "minLength", "maxLength"} & given) > 1:
        raise _refuse(where, "'pattern', 'format' and bounds of length are not supported together")
    for pattern in (schema.get("pattern", ""), *_map_of(schema, "patternProperties", where)):
        if not isinstance(pattern, str) or any(mark in pattern for mark in LOOKAROUND):
            raise _refuse(where, "a pattern must be a regular expression without lookaround")
    if "multipleOf" in given and ("number" in types or BOUNDS & given or schema["multipleOf"] not in range(1, MAX_MULTIPLE + 1)):
        raise _refuse(where, f"'multipleOf' is supported for integers without bounds, up to {MAX_MULTIPLE}")
    if "object" in types:
        _check_object(schema, where)


def _check_object(schema: dict[str, Any], where: str) -> None:
    named = _map_of(schema, "properties", where)
    required = schema.get("required", [])
    if not isinstance(required, list) or (unknown := [name for name in required if name not in named]):
        raise _refuse(where, f"{unknown[0]!r:.80} is required but not among 'properties'" if isinstance(required, list)
                      else "'required' must be a list")
    open_ended = [name for name in ("patternProperties", "propertyNames") if name in schema]
    if open_ended and (named or len(open_ended) > 1 or len(_map_of(schema, "patternProperties", where)) > 1):
        raise _refuse(where, f"{open_ended[0]!r} is not supported beside other names of properties")
    least = schema.get("minProperties", 0)
    if isinstance(least, int) and least > 1 and (open_ended or schema.get("additionalProperties", False) is not False):
        raise _refuse(where, "'minProperties' above 1 is supported for named properties only: other names may repeat")


def _map_of(schema: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    value = schema.get(name, {})
    if not isinstance(value, dict):
        raise _refuse(where, f"{name!r} must be an object")
    return value


def _inner(schema: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """The schemas that this one is made of."""
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        for key, inner in _map_of(schema, name, where).items():
            yield f"{where}/{name}/{key}", inner
    for name in ("items", "additionalProperties", "propertyNames", "unevaluatedProperties"):
        if name in schema and not (schema[name] is False and name != "propertyNames"):
            yield f"{where}/{name}", schema[name]
    for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if not isinstance(schema.get(name, []), list):
            raise _refuse(where, f"{name!r} must be a list")
        for index, inner in enumerate(schema.get(name, [])):
            yield f"{where}/{name}/{index}", inner


def _types(schema: dict[str, Any], where: str) -> set[str]:
    given = schema.get("type")
    if given is None:  # as the compiler guesses it
        return {"object"} if "properties" in schema else {"array"} if "items" in schema or "prefixItems" in schema else set()
    types = given if isinstance(given, list) else [given]
    if not types or not all(isinstance(each, str) and each in KEYWORDS for each in types):
        raise _refuse(where, f"the type {given!r:.60} is not one of {', '.join(KEYWORDS)}")
    return set(types)


def _type_of(value: Any) -> set[str]:
    match value:
        case bool():
            return {"boolean"}
        case None:
            return {"null"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case str():
            return {"string"}
    return {"array"} if isinstance(value, list) else {"object"}


def _resolved(schema: Any, root: dict[str, Any]) -> Any:
    """What a reference into the root schema names; None if nothing. Of a chain of references the first step only."""
    if not isinstance(schema, dict) or "$ref" not in schema:
        return schema
    target: Any = root
    path = str(schema["$ref"])
    if path != "#" and not path.startswith("#/"):
        return None
    for part in path[2:].split("/") if path != "#" else ():
        target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
    return target


def _may_both_hold(first: Any, second: Any, root: dict[str, Any]) -> bool:
    """Whether a value may satisfy both. True if that cannot be ruled out at a glance."""
    a, b = _resolved(first, root), _resolved(second, root)
    if not isinstance(a, dict) or not isinstance(b, dict):
        return True
    if _kinds(a) and _kinds(b) and not _kinds(a) & _kinds(b):
        return False
    if _constants(a) and _constants(b):
        return bool(_constants(a) & _constants(b))
    pairs = [(_constants(x), _constants(y)) for name, x in _required(a).items() for other, y in _required(b).items() if name == other]
    return not any(x and y and not x & y for x, y in pairs)


def _required(schema: dict[str, Any]) -> dict[str, Any]:
    named, required = schema.get("properties"), schema.get("required")
    if not isinstance(named, dict) or not isinstance(required, list):
        return {}
    return {name: inner for name, inner in named.items() if name in required}


def _kinds(schema: dict[str, Any]) -> set[str]:
    types = _types(schema, "#/oneOf")
    return types | {"integer"} if "number" in types else types


def _constants(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return {json.dumps(value) for value in values} if isinstance(values, list) else set()
