"""Who may come in, and with how much: API keys, tenants and the size of bodies, before any router sees a request.

Plain ASGI, so that it holds for every surface alike. Routers go on reading headers: what a key decides (X-Tenant, X-Job-Class, whose
X-Job-Id it is) is written into them here.
"""

import hashlib
import re
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.cluster_token import is_shown
from coordinator.errors import PayloadTooLarge
from coordinator.messages import CLASSES, JobClass
from producers.api_keys import ApiKey, KeyRing
from producers.http_errors import Json

OPEN_PATHS = frozenset({"/liveness", "/readiness", "/health", "/healthz"})   # load balancers have no keys
TRUSTED_PATHS = frozenset({"/bootstrap"})                                    # tells where the queue is
OWN_BODY_LIMIT = frozenset({"/v1/files"})                                    # streamed to a store that bounds them itself
_TAGGED_HEADERS = frozenset({b"x-job-id", b"idempotency-key"})
_JOB_PATH = re.compile(r"/jobs/([^/]+)(/stream)?")
_MADE_HERE = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}(-[0-9]{1,4})?")  # without a name of its own
_OPENAI_TYPES = {401: "invalid_request_error", 403: "permission_error", 413: "invalid_request_error"}
_OPENAI_CODES = {401: "invalid_api_key", 403: "not_allowed", 413: "body_too_large"}


class Access:
    """Without `keys` everybody may come in, and says by X-Tenant who it is. `cluster_token` opens what only the farm itself may know."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None, max_body_bytes: int, cluster_token: str = "") -> None:
        self._app, self._keys, self._max_body_bytes, self._token = app, keys, max_body_bytes, cluster_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._shows_token(scope):
            await self._app(scope, receive, send)
            return
        if self._keys is None and self._token and scope["path"] in TRUSTED_PATHS:
            await refusal(scope["path"], 401, f"{scope['path']}: the cluster token is needed: Authorization: Bearer …",
                          {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        if self._keys is not None and scope["path"] not in OPEN_PATHS:
            outcome = admit(Request(scope), self._keys)
            if isinstance(outcome, Response):
                await outcome(scope, receive, send)
                return
            scope = outcome
        if scope["path"] in OWN_BODY_LIMIT:
            await self._app(scope, receive, send)
            return
        bounded = _BoundedBody(scope, receive, send, self._max_body_bytes)
        await self._app(scope, bounded.receive, bounded.send)

    def _shows_token(self, scope: Scope) -> bool:
        shown = Request(scope).headers.get("authorization", "")
        return bool(self._token) and scope["path"] in TRUSTED_PATHS and is_shown(shown, self._token)


def refusal(path: str, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in the shape of the surface that was asked."""
    if path.startswith("/v1/"):
        error = {"message": message, "type": _OPENAI_TYPES[status], "param": None, "code": _OPENAI_CODES[status]}
        return Json({"error": error}, status_code=status, headers=headers)
    return Json({"message": message}, status_code=status, headers=headers)


def admit(request: Request, keys: KeyRing) -> Scope | Response:
    """The request as its key lets it in, or why it may not."""
    path = request.url.path
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    key = keys.find(presented.strip()) if scheme.lower() == "bearer" else None
    if key is None:
        what = "this API key is not known" if presented else "an API key is needed: Authorization: Bearer tm-…"
        return refusal(path, 401, what, {"WWW-Authenticate": "Bearer"})
    denied = _denied(request, key)
    if denied:
        return refusal(path, 403, denied)
    return _as_admitted(request, key)


def _denied(request: Request, key: ApiKey) -> str:
    """What this key asks for and may not have."""
    if key.is_trusted:
        return ""
    if request.url.path in TRUSTED_PATHS:
        return f"{request.url.path}: needs a trusted key"
    if request.headers.get("x-tenant", key.tenant) != key.tenant:
        return f"X-Tenant: this key speaks for tenant {key.tenant} only"
    klass = request.headers.get("x-job-class", key.klass)
    if klass in CLASSES and CLASSES.index(klass) < CLASSES.index(key.klass):
        return f"X-Job-Class: this key's highest class is {key.klass}"
    return ""


def _as_admitted(request: Request, key: ApiKey) -> Scope:
    scope = dict(request.scope)
    # Jobs are named by clients: names of different tenants must not meet.
    tag = "" if key.is_trusted else f"{hashlib.sha256(key.tenant.encode()).hexdigest()[:12]}-"
    headers = [(name, _tagged(value, tag) if name in _TAGGED_HEADERS else value) for name, value in _without_key(scope["headers"])]
    scope["headers"] = [*headers, *_decided(request, key.tenant, key.klass)]
    if (match := _JOB_PATH.fullmatch(scope["path"])) and not _MADE_HERE.fullmatch(match[1]):
        scope["path"] = f"/jobs/{_tagged(match[1].encode(), tag).decode()}{match[2] or ''}"
    return scope


def _without_key(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name != b"authorization"]


def _decided(request: Request, tenant: str, klass: JobClass) -> list[tuple[bytes, bytes]]:
    """What the key says where the request says nothing."""
    said = {"x-tenant": tenant, "x-job-class": klass}
    return [(name.encode(), value.encode("latin-1", "replace")) for name, value in said.items() if name not in request.headers]


def _tagged(job_id: bytes, tag: str) -> bytes:
    prefix = tag.encode()
    is_name = re.fullmatch(rb"[A-Za-z0-9_-]+", job_id) is not None   # anything else is refused where ids are checked
    return job_id if job_id.startswith(prefix) or not is_name else prefix + job_id


class _BoundedBody:
    """Counts a body while it is read. Whatever the application makes of one that is too long, the client is told 413."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self._scope, self._receive, self._send, self._limit = scope, receive, send, limit
        self._size = 0
        self._has_started = self._is_refused = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            declared = dict(self._scope["headers"]).get(b"content-length", b"")
            self._size += len(message.get("body", b""))
            size = max(self._size, int(declared) if declared.isdigit() else 0)
            if size > self._limit:
                self._is_refused = True
                raise PayloadTooLarge(size, self._limit, "body", "--max_body_bytes")
        return message

    async def send(self, message: Message) -> None:
        if self._is_refused and not self._has_started:
            self._has_started = True
            too_large = PayloadTooLarge(self._size, self._limit, "body", "--max_body_bytes")
            await refusal(self._scope["path"], 413, str(too_large), {"Connection": "close"})(self._scope, self._receive, self._send)
            return
        if not self._is_refused:
            self._has_started = True
            await self._send(message)

