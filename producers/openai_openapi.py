"""OpenAI's paths for the OpenAPI document (openapi.py). Requests are described by the models that read them."""

from typing import Any

from producers.openai_shapes import Asked, ChatAsked, CompletionAsked
from producers.openapi import JOB_HEADERS, JOB_STATUSES, LAST_EVENT, STATUSES, Schema, operation

ERROR: Schema = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]}}}}}
MODEL: Schema = {"type": "object", "required": ["id", "object", "created", "owned_by"]}
ANSWER: Schema = {"type": "object", "required": ["id", "object", "created", "model", "choices"]}
CHUNKS: Schema = {"description": "server-sent events `data: {json}`, at the end `data: [DONE]`"}
ANSWER_ID: Schema = {"name": "answer", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,100}$"}}
MODEL_ID: Schema = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,100}$"}}


def _body(asked: type[Asked]) -> Schema:
    """The references of a model's schema lead into itself, so they are put in place: there is only one."""
    schema: dict[str, Any] = asked.model_json_schema()
    inner = schema.pop("$defs")["StreamOptions"]
    schema["properties"]["stream_options"] = {"anyOf": [inner, {"type": "null"}]}
    return schema


def _operation(*args: Any, **kwargs: Any) -> Schema:
    """Errors in OpenAI's shape."""
    described = operation(*args, **kwargs)
    for status in described["responses"]:
        if status != "200":
            described["responses"][status] = {"description": STATUSES[int(status)], "content": {"application/json": {"schema": ERROR}}}
    return described


def _asked(summary: str, asked: type[Asked]) -> Schema:
    return {"post": _operation(summary, {"application/json": ANSWER, "text/event-stream": CHUNKS}, *JOB_STATUSES, body=_body(asked),
                               parameters=[*JOB_HEADERS, LAST_EVENT])}


def _kept() -> Schema:
    return {"get": _operation("an answer that was asked for with store or background", {"application/json": ANSWER}, 400, 404,
                              parameters=[ANSWER_ID]),
            "delete": _operation("cancel what is not over, and forget", {"application/json": {"type": "object"}}, 400, 404,
                                 parameters=[ANSWER_ID])}


OPENAI_PATHS: dict[str, Schema] = {
    "/v1/models": {"get": _operation("the model that is served", {"application/json": {"type": "object", "required": ["data"]}})},
    "/v1/models/{model}": {"get": _operation("it, by its name", {"application/json": MODEL}, 404, parameters=[MODEL_ID])},
    "/v1/completions": _asked("go on with a text", CompletionAsked), "/v1/completions/{answer}": _kept(),
    "/v1/chat/completions": _asked("answer a conversation", ChatAsked), "/v1/chat/completions/{answer}": _kept(),
}
