"""API keys, tenants, limits and body sizes at the REST door."""

import argparse
import asyncio
import contextlib
import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from coordinator.bootstrap import Doors, wait_for_queue
from coordinator.bus import Bus
from coordinator.errors import ConfigError, PayloadTooLarge
from coordinator.farm_access import _ask_door
from coordinator.messages import Job
from producers import api_keys, keys_cli
from producers.access import Access
from producers.api_keys import KeyRing, create_key, read_keys, revoke_key
from producers.settings import parse
from tests.producers.conftest import OpenRest
from tests.producers.fake_worker import FakeWorker, run

HI = {"inputs": "Hi", "parameters": {"max_new_tokens": 4}}
BASE = ["--nats_url", "nats://x", "--redis_url", "redis://x", "--model_dir", "m"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(api_keys, "LOOK_AGAIN_S", 0.0)
    yield


def bearer(secret: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}", **{name.replace("_", "-"): value for name, value in headers.items()}}


def test_a_key_file_holds_hashes_and_only_its_owner_may_read_it(path: Path) -> None:
    secret, key = create_key(path, "ci", max_jobs=3)
    assert secret not in path.read_text() and secret.startswith(f"tm-{key.key_id}-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyRing(path).find(secret) == key == read_keys(path)[0]
    assert KeyRing(path).find(secret[:-1] + ("A" if secret[-1] != "A" else "B")) is None


def test_a_revoked_key_and_a_new_one_are_seen_by_a_ring_that_is_open(path: Path, no_delay: None) -> None:
    old, key = create_key(path, "old")
    ring = KeyRing(path)
    new, _ = create_key(path, "new")
    assert ring.find(new) is not None
    assert revoke_key(path, key.key_id) and not revoke_key(path, key.key_id)
    assert ring.find(old) is None and ring.find(new) is not None
    path.write_text("{ broken")
    assert ring.find(new) is not None      # the last keys stay in force


def test_a_file_that_is_not_one_of_keys_is_refused_by_name(path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        KeyRing(path)
    path.write_text('{"keys": [{"key_id": "a"}]}')
    with pytest.raises(ConfigError, match="not a file of API keys"):
        KeyRing(path)


def test_the_command_makes_lists_and_revokes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--api_keys_file", str(path)]
    assert keys_cli.main(["create", "--name", "ci", "--class", "batch", "--max_jobs", "5", *where]) == 0
    secret = capsys.readouterr().out.strip()
    key = KeyRing(path).find(secret)
    assert key is not None and (key.klass, key.max_jobs) == ("batch", 5)
    assert keys_cli.main(["list", *where]) == 0
    shown = capsys.readouterr().out
    assert key.key_id in shown and secret not in shown
    assert keys_cli.main(["revoke", key.key_id, *where]) == 0 and read_keys(path) == []
    assert keys_cli.main(["revoke", key.key_id, *where]) == 1
    assert f"has no key {key.key_id}" in capsys.readouterr().err


def test_an_address_that_is_not_loopback_needs_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*BASE, "--host", "0.0.0.0"])
    assert "--host 0.0.0.0: not a loopback address: give --api_keys_file" in capsys.readouterr().err
    assert parse([*BASE, "--host", "0.0.0.0", "--insecure"]).insecure
    assert parse([*BASE, "--host", "0.0.0.0", "--api_keys_file", "k"]).api_keys_file == "k"


@pytest.mark.services
async def test_without_a_key_only_health_answers(open_rest: OpenRest, path: Path) -> None:
    create_key(path, "ci")
    async with open_rest(api_keys_file=str(path)) as rest:
        assert (await rest.http.get("/liveness")).status_code == 200
        assert (await rest.http.get("/readiness")).status_code == 503      # no workers; but it says so
        for headers in ({}, bearer("tm-00000000-nonsense"), {"Authorization": "Basic eDp5"}):
            refused = await rest.http.post("/generate", json=HI, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert "API key" in refused.json()["message"]
        openai = await rest.http.get("/v1/models")
        assert openai.status_code == 401 and openai.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.services
async def test_a_key_decides_tenant_and_class(open_rest: OpenRest, bus: Bus, model: str, path: Path) -> None:
    secret, _ = create_key(path, "ci", tenant="acme", klass="normal")
    trusted, _ = create_key(path, "proxy", is_trusted=True)
    async with open_rest(api_keys_file=str(path)) as rest, FakeWorker(bus, model) as worker:
        async def ask(headers: dict[str, str]) -> httpx.Response:
            return await rest.http.post("/generate", json=HI, headers=headers)

        assert [(await ask(bearer(secret))).status_code, (await ask(bearer(secret, X_Job_Class="batch"))).status_code] == [200, 200]
        assert (await ask(bearer(trusted, X_Tenant="whoever", X_Job_Class="interactive"))).status_code == 200
        assert [(job.tenant, job.klass) for job in worker.jobs] == [("acme", "normal"), ("acme", "batch"), ("whoever", "interactive")]
        for headers, message in ((bearer(secret, X_Job_Class="interactive"), "X-Job-Class: this key's highest class is normal"),
                                 (bearer(secret, X_Tenant="whoever"), "X-Tenant: this key speaks for tenant acme only")):
            refused = await ask(headers)
            assert (refused.status_code, refused.json()) == (403, {"message": message})
        assert (await rest.http.get("/bootstrap", headers=bearer(secret))).status_code == 403
        assert (await rest.http.get("/bootstrap", headers=bearer(trusted))).status_code == 200


@pytest.mark.services
async def test_two_tenants_names_for_jobs_do_not_meet(open_rest: OpenRest, bus: Bus, model: str, path: Path) -> None:
    first, _ = create_key(path, "first")
    second, _ = create_key(path, "second")
    async with open_rest(api_keys_file=str(path)) as rest, FakeWorker(bus, model) as worker:
        for secret in (first, first, second):
            answer = await rest.http.post("/generate", json=HI, headers=bearer(secret, X_Job_Id="nightly"))
            assert answer.status_code == 200
        assert len({job.job_id for job in worker.jobs}) == 2       # the same name of the same tenant is one job
        full_name = answer.headers["x-job-id"]
        assert full_name.endswith("-nightly")
        for name in ("nightly", full_name):
            assert (await rest.http.get(f"/jobs/{name}", headers=bearer(second))).json()["job_id"] == full_name
        assert (await rest.http.get(f"/jobs/{full_name}", headers=bearer(first))).status_code == 404
        unnamed = await rest.http.post("/generate", json=HI, headers=bearer(first))
        state = ""
        while state != "done":  # the last token is shown before the final record is stored
            state = (await rest.http.get(f"/jobs/{unnamed.headers['x-job-id']}", headers=bearer(first))).json()["state"]


async def until_cancelled(worker: FakeWorker, job: Job) -> None:
    await worker.emit(job, run(job, 0, 1))
    await asyncio.Event().wait()


@pytest.mark.services
async def test_a_keys_bound_on_open_jobs_holds_over_two_shims(open_rest: OpenRest, bus: Bus, model: str, path: Path) -> None:
    secret, _ = create_key(path, "ci", max_jobs=1)
    free, _ = create_key(path, "free")
    keys = {"api_keys_file": str(path)}
    async with (open_rest(**keys) as rest, open_rest(**keys) as other, FakeWorker(bus, model, serve=until_cancelled),
                rest.http.stream("POST", "/generate_stream", json=HI, headers=bearer(secret)) as stream):
        await anext(stream.aiter_lines())
        refused = await other.http.post("/generate", json=HI, headers=bearer(secret))
        assert refused.status_code == 429 and "(1 open jobs)" in refused.json()["message"] and refused.headers["retry-after"] == "1"
        async with other.http.stream("POST", "/generate_stream", json=HI, headers=bearer(free)) as unbounded:
            assert unbounded.status_code == 200


@pytest.mark.services
async def test_a_keys_tokens_per_minute_are_counted_when_submitted(open_rest: OpenRest, bus: Bus, model: str, path: Path) -> None:
    secret, _ = create_key(path, "ci", tokens_per_minute=9)     # one job is 2 in and 4 out
    async with open_rest(api_keys_file=str(path)) as rest, FakeWorker(bus, model):
        answers = [await rest.http.post("/generate", json=HI, headers=bearer(secret)) for _ in range(3)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) in (1, 2)        # a minute may turn in between
    assert "(9 tokens per minute)" in refused[0].json()["message"] and 1 <= int(refused[0].headers["retry-after"]) <= 60


async def swallow_errors(scope: Scope, receive: Receive, send: Send) -> None:
    """A router that takes a body that cannot be read for a bad request."""
    with contextlib.suppress(PayloadTooLarge):
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 400, "headers": []})
    await send({"type": "http.response.body", "body": b"?"})


@pytest.mark.parametrize("is_announced", [True, False])
async def test_a_body_over_the_limit_is_413_in_the_surfaces_shape_whatever_the_router_makes_of_it(is_announced: bool) -> None:
    app = Access(swallow_errors, keys=None, max_body_bytes=1000)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shim") as http:
        for path, field in (("/generate", "message"), ("/v1/completions", "error")):
            response = await http.post(path, content=b"x" * 2000 if is_announced else chunks())
            assert response.status_code == 413 and field in response.json()
        assert response.json()["error"]["code"] == "body_too_large"
        assert (await http.post("/generate", content=b"x" * 1000)).status_code == 400


@pytest.mark.services
async def test_cors_is_off_unless_an_origin_is_named(open_rest: OpenRest, path: Path) -> None:
    create_key(path, "ci")
    asked: dict[str, Any] = {"headers": {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}}
    async with open_rest() as rest:
        assert "access-control-allow-origin" not in (await rest.http.options("/generate", **asked)).headers
        assert "access-control-allow-origin" not in (await rest.http.get("/liveness", headers={"Origin": "https://a.example"})).headers
    async with open_rest(cors_origins="https://a.example, https://b.example", api_keys_file=str(path)) as rest:
        allowed = await rest.http.options("/generate", **asked)        # browsers send no key with this
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://a.example")
        other = await rest.http.options("/generate", headers={**asked["headers"], "Origin": "https://c.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.services
async def test_commands_and_workers_reach_a_farm_with_keys_by_the_environments_key(open_rest: OpenRest, model: str, path: Path,
                                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    trusted, _ = create_key(path, "operator", is_trusted=True)
    async with open_rest(api_keys_file=str(path)) as rest:
        monkeypatch.delenv("TOKENMILL_API_KEY", raising=False)
        doors = Doors(addresses=(f"{rest.host}:{rest.port}",), flags="--pd_master_ip")
        flags = argparse.Namespace(url=f"http://{rest.host}:{rest.port}", tls_ca="", model_name="")
        for asked in (lambda: wait_for_queue(doors, "worker"), lambda: _ask_door(flags)):
            with pytest.raises(ConfigError, match="trusted one \\(TOKENMILL_API_KEY"):
                await asyncio.to_thread(asked)
        monkeypatch.setenv("TOKENMILL_API_KEY", trusted)
        assert (await asyncio.to_thread(wait_for_queue, replace(doors, api_key=trusted), "worker")).nats_url.startswith("nats://")
        assert (await asyncio.to_thread(_ask_door, flags))["model_name"] == model
