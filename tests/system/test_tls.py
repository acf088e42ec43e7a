"""A door, its NATS and its users over TLS, with a CA of the test's own."""

import asyncio
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from coordinator.bus import Bus
from coordinator.errors import Unavailable
from tests.system.farm import ROOT
from tests.system.serving import Servings, free_ports

pytestmark = [pytest.mark.system, pytest.mark.services]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """key.pem, and cert.pem that is its own CA, for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                           "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.1"],
                          cwd=folder, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no openssl: {made.stderr}")
    return folder


def test_doors_speak_https_and_the_queue_speaks_tls(tmp_path: Path, tiny_v3: Path, certificate: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    config_port, port = free_ports(2)
    ca = str(certificate / "cert.pem")
    tls = ["--tls_cert", ca, "--tls_key", str(certificate / "key.pem"), "--tls_ca", ca]
    at_config = ["--config_server_host", "127.0.0.1", "--config_server_port", str(config_port)]
    token = "a-secret-that-travels-encrypted"
    with Servings(tmp_path, {"TOKENMILL_CLUSTER_TOKEN": token}) as farm:
        farm.serve("config", "--run_mode", "config_server", *at_config, *tls).wait_said("config_server ready: https://")
        farm.serve("master", "--run_mode", "pd_master", "--model_dir", str(tiny_v3), "--port", str(port), *at_config, *tls).wait_said(
            "pd_master ready: https://")
        status = subprocess.run([sys.executable, "-m", "tokenmill", "status", "--url", f"https://127.0.0.1:{config_port}", "--tls_ca",
                                 ca], cwd=ROOT, capture_output=True, text=True,
                                env={**farm.environment, "PATH": "/usr/bin:/bin"})
        assert status.returncode == 0 and f"https://127.0.0.1:{port}" in status.stdout, status.stderr
        context = ssl.create_default_context(cafile=ca)
        with httpx.Client(verify=context, headers={"Authorization": f"Bearer {token}"}) as http:
            assert http.get(f"https://127.0.0.1:{port}/liveness").status_code == 200
            nats_url = http.get(f"https://127.0.0.1:{config_port}/bootstrap").json()["nats_url"]
        assert nats_url.startswith("tls://worker:")
        asyncio.run(only_who_trusts_the_ca_comes_in(nats_url, ca, monkeypatch))


async def only_who_trusts_the_ca_comes_in(nats_url: str, ca: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable):
        await Bus.connect(nats_url, "a stranger", timeout_s=1.0)
    monkeypatch.setenv("TOKENMILL_TLS_CA", ca)
    async with await Bus.connect(nats_url, "a friend") as bus:
        await bus.flush()
