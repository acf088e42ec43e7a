"""The OpenAPI document of this door: GET /openapi.json. Checked against a live farm by schemathesis (tests/system/test_api_schema.py).

Each surface gives its part as a map of paths; requests are described here and checked by hand where they are read, so that an error
names its field in our own words.
"""

from collections.abc import Mapping
from typing import Any

from coordinator.messages import CLASSES
from coordinator.sampling import DEFAULTS, MAX_ALLOWED_TOKEN_IDS, MAX_N, MAX_STOP_CHARS, MAX_STOP_SEQUENCES, MAX_STOP_TOKENS
from producers.job_options import LONGEST_TIMEOUT_S, MAX_TENANT_CHARS

Schema = dict[str, Any]

MESSAGE: Schema = {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}
STATUSES = {
    400: "a field that cannot be honoured; the message names it",
    401: "no API key, or one that is not known", 403: "the key may not do this",
    404: "not known", 409: "another request reads this job now",
    413: "the body is over --max_body_bytes", 429: "a queue or a limit is full: Retry-After says when to come back",
    499: "cancelled meanwhile", 500: "the job failed", 503: "NATS, Redis or workers are away", 408: "not over within X-Timeout-S",
}
TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


def boolean() -> Schema:
    return {"type": ["boolean", "null"]}


def number(low: float, high: float | None = None, *, above: bool = False) -> Schema:
    return {"type": ["number", "null"], "exclusiveMinimum" if above else "minimum": low, **({} if high is None else {"maximum": high})}


def integer(low: int, high: int | None = None) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, **({} if high is None else {"maximum": high})}


def text(max_chars: int) -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": max_chars}


# What a set of sampling parameters may hold; a parameter without an entry is described by its error message alone.
PARAMETERS: dict[str, Schema] = {
    "best_of": integer(1, MAX_N), "n": integer(1, MAX_N), "do_sample": boolean(), "temperature": number(0),
    "top_p": number(0, 1, above=True), "top_k": {"anyOf": [{"const": -1}, integer(1)]}, "min_p": number(0, 1),
    "presence_penalty": number(-2), "frequency_penalty": number(-2),
    "repetition_penalty": number(1),
    "exponential_decay_length_penalty": {
        "type": ["array", "null"], "minItems": 2, "maxItems": 2,
        "prefixItems": [{"type": "integer", "minimum": 0}, {"type": "number", "minimum": 1}]},
    "stop_sequences": {"anyOf": [text(MAX_STOP_CHARS), {"type": "null"}, {"type": "array", "maxItems": MAX_STOP_SEQUENCES, "items": {
        "anyOf": [text(MAX_STOP_CHARS), {"type": "array", "minItems": 1, "maxItems": MAX_STOP_TOKENS, "items": TOKEN_ID}]}}]},
    "allowed_token_ids": {"type": ["array", "null"], "maxItems": MAX_ALLOWED_TOKEN_IDS, "items": TOKEN_ID}, "ignore_eos": boolean(),
    "max_new_tokens": integer(1), "min_new_tokens": integer(1), "skip_special_tokens": boolean(), "add_special_tokens": boolean(),
    "add_spaces_between_special_tokens": boolean(), "print_eos_token": boolean(), "input_penalty": boolean(), "seed": integer(0, 2**64 - 1),
    "logit_bias": {"type": ["object", "null", "array"]}, "top_logprobs": integer(0, 20),
    "guided_json": {"type": ["string", "object", "null"]}, "guided_grammar": {"type": ["string", "null"]},
    "regular_constraint": {"type": ["string", "null"]},
}
GIVEN: Schema = {
    "type": ["object", "null"], "additionalProperties": False,
    "properties": {**{name: PARAMETERS.get(name, {}) for name in DEFAULTS}, "return_details": boolean()},
}
NO_IMAGES: Schema = {"type": ["object", "null"], "description": "text only: what is in it must be empty",
                     "additionalProperties": {"type": ["array", "null"], "maxItems": 0}}
GENERATE: Schema = {
    "type": "object", "required": ["inputs"], "additionalProperties": False, "properties": {
        "inputs": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": TOKEN_ID}]},
        "parameters": GIVEN, "multimodal_params": NO_IMAGES}}
TOKENS: Schema = {"type": "object", "required": ["text"], "additionalProperties": False, "properties": {
    "text": {"type": "string", "minLength": 1}, "multimodal_params": NO_IMAGES,
    "parameters": {**GIVEN, "properties": {name: PARAMETERS.get(name, {}) for name in DEFAULTS}}}}
ONE_OR_MANY: Schema = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}
ANSWER: Schema = {
    "type": "object", "required": ["generated_text", "count_output_tokens", "finish_reason", "prompt_tokens"], "properties": {
        "generated_text": {"type": "array", "items": {"type": "string"}}, "count_output_tokens": ONE_OR_MANY,
        "finish_reason": {"type": ["string", "array"]}, "prompt_tokens": {"type": "integer"}, "tokens": {"type": "array"}}}
JOB: Schema = {"type": "object", "required": ["job_id", "state"], "properties": {
    "job_id": {"type": "string"}, "state": {"enum": ["queued", "running", "done", "cancelling"]}}}
EVENTS: Schema = {"description": "server-sent events, one per token: `data:{json}`, without a space and without [DONE]"}


def header(name: str, schema: Schema, text: str) -> Schema:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


JOB_ID: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,100}$"}
JOB_HEADERS = [
    header("X-Job-Id", JOB_ID, "the client's own name for the job: the same name twice is one job"),
    header("X-Job-Class", {"enum": list(CLASSES)}, "queue class"),
    header("X-Timeout-S", {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_TIMEOUT_S}, "the job expires then"),
    header("X-Tenant", {"type": "string", "pattern": f"^[ -~]{{0,{MAX_TENANT_CHARS}}}$"}, "whose limits hold; a key says it"),
]
LAST_EVENT = header("Last-Event-ID", {"type": "string", "pattern": "^[0-9]{0,9}$"}, "index of the last token that was seen")
NAMED_JOB = {"name": "job_id", "in": "path", "required": True, "schema": JOB_ID}


def operation(summary: str, answers: Mapping[str, Schema], *statuses: int, body: Schema | None = None,
              parameters: list[Schema] | None = None) -> Schema:
    """`answers`: schema of a 200 by content type."""
    described: Schema = {
        "summary": summary,
        "responses": {"200": {"description": "done", "content": {kind: {"schema": schema} for kind, schema in answers.items()}},
                      **{str(status): _error(status) for status in sorted({401, 403, 413, 503, *statuses})}}}
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if parameters:
        described["parameters"] = parameters
    return described


def _error(status: int) -> Schema:
    return {"description": STATUSES[status], "content": {"application/json": {"schema": MESSAGE}}}


def _json(**properties: Schema) -> dict[str, Schema]:
    return {"application/json": {"type": "object", "required": list(properties), "properties": properties}}


def _both(summary: str, answers: Mapping[str, Schema]) -> Schema:
    return {"get": operation(summary, answers), "post": operation(summary, answers)}


STRING: Schema = {"type": "string"}
JOB_STATUSES = (400, 404, 408, 409, 429, 499, 500)
RUN: dict[str, Any] = {"body": GENERATE, "parameters": [*JOB_HEADERS, LAST_EVENT]}
RUN_EITHER: dict[str, Any] = {**RUN, "body": {**GENERATE, "properties": {**GENERATE["properties"], "stream": {"type": "boolean"}}}}
LIGHTLLM_PATHS: dict[str, Schema] = {
    "/generate": {"post": operation("the whole answer", {"application/json": ANSWER}, *JOB_STATUSES, **RUN)},
    "/generate_stream": {"post": operation("the answer token by token", {"text/event-stream": EVENTS}, *JOB_STATUSES, **RUN)},
    "/": {"post": operation("either, by `stream`", {"application/json": ANSWER, "text/event-stream": EVENTS}, *JOB_STATUSES, **RUN_EITHER)},
    "/tokens": {method: operation("how many tokens a text has", _json(ntokens={"type": "integer"}), 400, body=TOKENS)
                for method in ("get", "post")},
    "/get_score": {"post": {"summary": "refused: no reward models", "responses": {str(s): _error(s) for s in (400, 401, 403, 413)}}},
    "/get_model_name": _both("the model's name", _json(model_name=STRING)),
    "/token_load": {"get": operation("shares of the KV pools in use", _json(
        current_load={"type": "number"}, logical_max_load={"type": "number"}, dynamic_max_load={"type": "number"}))},
    "/liveness": _both("this process runs", _json(status=STRING)),
    "/readiness": _both("a job that came now would be answered", _json(status=STRING)),
    "/health": {"get": operation("as readiness", _json(message=STRING))},
    "/healthz": {"get": operation("as readiness", _json(message=STRING))},
    "/metrics": {"get": operation("Prometheus text", {"text/plain": STRING})},
    "/bootstrap": {"get": operation("where the queue is", _json(nats_url=STRING, redis_url=STRING, model_name=STRING))},
    "/jobs/{job_id}": {
        "get": operation("state and answer of a job", {"application/json": JOB}, 400, 404, parameters=[NAMED_JOB]),
        "delete": operation("cancel a job", {"application/json": JOB}, 400, 404, parameters=[NAMED_JOB])},
    "/jobs/{job_id}/stream": {"get": operation("the tokens after Last-Event-ID", {"text/event-stream": EVENTS}, *JOB_STATUSES,
                                               parameters=[NAMED_JOB, LAST_EVENT])},
}


def document(*parts: Mapping[str, Schema]) -> Schema:
    """The whole document from the paths of all surfaces."""
    return {"openapi": "3.1.0", "info": {"title": "tokenmill", "version": "1"},
            "paths": {path: operations for part in parts for path, operations in part.items()},
            "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}}
