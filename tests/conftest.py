"""Real services for tests: nats-server and Valkey, started once per test run, emptied before each test that uses them.

Which ones: TOKENMILL_TEST_NATS_URL and TOKENMILL_TEST_REDIS_URL name running servers (THEIR DATA IS DELETED); else
TOKENMILL_TEST_CONTAINERS=1 starts containers; else the servers come from their wheels.
"""

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import redis
import torch

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.connection import ApiError
from coordinator.embedded import EmbeddedServices

# Triton kernels are interpreted where there is no GPU. That is decided when they are imported, whichever test is the first to do so.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Imported here and early: its pytest plugin would import it in mid-run, from deep inside a hook. Deadlines measure the machine, not us.
hypothesis.settings.register_profile("tokenmill", deadline=None)
hypothesis.settings.load_profile("tokenmill")

NATS_IMAGE, VALKEY_IMAGE = "nats:2.12-alpine", "valkey/valkey:8-alpine"
STREAMS = (subjects.JOBS, subjects.HANDOFF, subjects.OUT, subjects.RESULTS, subjects.DLQ, subjects.ROSTER)


@dataclass(frozen=True)
class Services:
    nats_url: str
    redis_url: str


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Shared by the whole run; use `bus`, `nats_url` and `redis_url`, which are empty at the start of each test."""
    nats_url, redis_url = os.environ.get("TOKENMILL_TEST_NATS_URL"), os.environ.get("TOKENMILL_TEST_REDIS_URL")
    if nats_url and redis_url:
        yield Services(nats_url, redis_url)
    elif os.environ.get("TOKENMILL_TEST_CONTAINERS") == "1":
        with _containers() as started:
            yield Services(nats_url or started.nats_url, redis_url or started.redis_url)
    else:
        with EmbeddedServices(tmp_path_factory.mktemp("services")) as embedded:
            yield Services(nats_url or embedded.nats_url, redis_url or embedded.redis_url)


@pytest.fixture
async def nats_url(services: Services) -> str:
    """A NATS server without streams."""
    async with await Bus.connect(services.nats_url, "tests") as bus:
        for stream in STREAMS:
            with contextlib.suppress(ApiError):
                await bus.api(f"STREAM.DELETE.{stream}")
    return services.nats_url


@pytest.fixture
def redis_url(services: Services) -> str:
    """A Redis without keys."""
    with redis.Redis.from_url(services.redis_url) as client:
        client.flushall()
    return services.redis_url


@pytest.fixture
def model() -> str:
    return f"m{uuid.uuid4().hex[:8]}"


@pytest.fixture
async def bus(nats_url: str, model: str) -> AsyncIterator[Bus]:
    """Connected, provisioned for `model`; nothing is queued or stored."""
    async with await Bus.connect(nats_url, "test") as bus:
        await bus.provision(model)
        yield bus


@pytest.fixture
def own_services(tmp_path: Path) -> Iterator[EmbeddedServices]:
    """Servers of the test's own, to be killed and restarted."""
    with EmbeddedServices(tmp_path / "state") as started:
        yield started


@contextlib.contextmanager
def _containers() -> Iterator[Services]:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.waiting_utils import wait_for_logs

    nats = DockerContainer(NATS_IMAGE).with_command("-js --max_payload 8MB").with_exposed_ports(4222)
    valkey = DockerContainer(VALKEY_IMAGE).with_command("valkey-server --save '' --appendonly yes").with_exposed_ports(6379)
    with nats, valkey:
        wait_for_logs(nats, "Server is ready")
        wait_for_logs(valkey, "Ready to accept connections")
        yield Services(f"nats://{nats.get_container_host_ip()}:{nats.get_exposed_port(4222)}",
                       f"redis://{valkey.get_container_host_ip()}:{valkey.get_exposed_port(6379)}")
