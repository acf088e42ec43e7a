"""Which schemas are taken: nothing that the grammar would pass over in silence."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import InvalidField
from coordinator.json_schema import ANY_OBJECT, CHOICES, KEYWORDS, MAX_DEPTH, checked


def nested(depth: int) -> str:
    return '{"type": "array", "items": ' * depth + "true" + "}" * depth


@pytest.mark.parametrize(("schema", "reason"), [
    ({"type": "array", "uniqueItems": True}, "'uniqueItems' is not supported, at #"),
    ({"type": "object", "properties": {"a": {"not": {}}}}, "'not' is not supported, at #/properties/a"),
    ({"if": {}, "then": {}}, "'if' is not supported"), ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
    ({"type": "array", "contains": {}}, "'contains' is not supported"), ({"foo": 1}, "'foo' is not supported"),
    ({"minLength": 2}, "'minLength' needs a 'type'"), ({"type": "string", "minimum": 2}, "'minimum' needs a 'type'"),
    ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "'allOf' of more than one"),
    ({"type": "object", "anyOf": [{"required": ["a"]}]}, "'type' beside 'anyOf'"),
    ({"$ref": "#/$defs/x", "$defs": {}}, "does not point into"),
    ({"$ref": "http://x/y"}, "does not point into"), ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}, "'oneOf'"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"), ({"enum": []}, "'enum' must be a list"),
    ({"type": "string", "enum": ["a", 1]}, "not of the type given"), ({"type": "string", "format": "zzz"}, "the format 'zzz'"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "not supported together"), ({"type": "string", "pattern": "(?=a)"}, "lookaround"),
    ({"type": "integer", "multipleOf": 3, "minimum": 1}, "'multipleOf'"), ({"type": "number", "multipleOf": 3}, "'multipleOf'"),
    ({"type": "integer", "multipleOf": 10**9}, "'multipleOf'"),
    ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "'b' is required"),
    ({"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}}, "'patternProperties'"),
    ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "'patternProperties'"),
    ({"type": "object", "additionalProperties": True, "minProperties": 2}, "'minProperties'"), ({"type": "thing"}, "the type 'thing'"),
    ({"type": "object", "properties": []}, "'properties' must be an object"), ({"type": "array", "items": [{}]}, "a schema is an object"),
    ({"type": "array", "items": False, "prefixItems": 3}, "'prefixItems' must be a list"), ({"anyOf": 3}, "'anyOf' must be a list"),
])
def test_what_would_not_be_kept_to_is_refused_with_its_place(schema: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidField) as caught:
        checked(json.dumps(schema))
    assert caught.value.field == "guided_json" and reason in caught.value.reason


@pytest.mark.parametrize("text", ["", "{", "5", "null", "[" * 100_000, '{"a": NaN}', nested(MAX_DEPTH + 1), nested(5000)])
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="guided_json"):
        checked(text)


@pytest.mark.parametrize("schema", [
    {"type": "object", "properties": {"not": {"type": "string"}, "if": {"type": "null"}}, "required": ["not"], "title": "names only"},
    {"$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}}, "$ref": "#/$defs/n"},
    {"$defs": {"a": {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
               "b": {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]}},
     "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "discriminator": {"propertyName": "kind"}},
    {"oneOf": [{"const": 1}, {"const": 2}]},
    {"type": ["string", "null"], "maxLength": 3, "default": None, "x-order": 5}, {"type": "array", "items": False, "prefixItems": [True]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3}, json.loads(nested(MAX_DEPTH - 1)),
])
def test_what_can_be_kept_to_is_taken_as_it_stands(schema: dict[str, object]) -> None:
    assert checked(json.dumps(schema)) == json.dumps(schema)


def test_an_empty_schema_stands_for_any_object() -> None:
    assert checked("{}") == checked('{"title": "anything"}') == ANY_OBJECT


NAMES = st.sampled_from([*CHOICES, "type", "$defs", *sorted({name for names in KEYWORDS.values() for name in names})])
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "#", "#/a", "string", "object", "array"]),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.just("a"), inner, max_size=4), max_leaves=12)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_json_is_taken_or_refused_never_a_crash(schema: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidField):
        checked(json.dumps(schema))
