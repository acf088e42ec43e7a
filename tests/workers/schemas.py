"""Random JSON schemas of every kind that is supported, whose documents are bounded in length."""

import random
from collections.abc import Callable
from typing import Any

FORMATS = ("uuid", "ipv6")
PATTERNS = ("^[A-Z]{2}[0-9]{1,3}$", "^(on|off)$")


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """An object at the top, as tools and `response_format` have it."""
    return _object(rng, depth)


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[random.Random, int], dict[str, Any]]] = [_integer, _number, _string, _simple]
    if depth > 0:
        kinds += [_object, _array, _either]
    return rng.choice(kinds)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["name", "count", "a b", "ok?", "größe", "x_1"], rng.randint(1, 3))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _any(rng, depth) for name in names},
                              "required": rng.sample(names, rng.randint(0, len(names)))}
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "items": _any(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_any(rng, 0)]
        schema["minItems"], schema["maxItems"] = 1, 3
    return schema


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]}
    return {"anyOf": [_any(rng, depth - 1), {"type": "null"}], "description": "either"}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-10, 10) / 4
    return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 8)}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", **rng.choice([{"maxLength": rng.randint(1, 12)}, {"minLength": 2, "maxLength": 5},
                                            {"pattern": rng.choice(PATTERNS)}, {"format": rng.choice(FORMATS)}])}


def _simple(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"enum": ["red", "green", 3, None]}, {"const": {"v": [1, "x"]}},
                       {"type": ["integer", "null"], "minimum": 0, "maximum": 9}])
