"""A REST shim that really listens, for a model folder made here."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from producers.rest import create_app
from producers.settings import RestSettings

VOCAB_SIZE = 300
OpenRest = Callable[..., contextlib.AbstractAsyncContextManager["Rest"]]


class Rest:
    """A running shim and a client for it."""

    def __init__(self, app: FastAPI, host: str, port: int, http: httpx.AsyncClient) -> None:
        self.app, self.host, self.port, self.http = app, host, port, http

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(path, json=body)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte, `<s>` and `</s>` special, no BOS put in front."""
    folder = tmp_path_factory.mktemp("model")
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE, "eos_token_id": 257}))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0}))
    return folder


@pytest.fixture
def open_rest(nats_url: str, redis_url: str, model: str, model_dir: Path) -> OpenRest:
    """`async with open_rest(max_body_bytes=…) as rest`; URLs may be other ones."""

    @contextlib.asynccontextmanager
    async def opened(**changes: Any) -> AsyncIterator[Rest]:
        given = {"nats_url": nats_url, "redis_url": redis_url, "model_dir": str(model_dir), "model_name": model, "max_req_total_len": 100}
        app = create_app(RestSettings(**{**given, **changes}))
        # With the protocol spelled out: asyncio turns Nagle's algorithm off only then.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(512)
            host, port = listener.getsockname()
            config = uvicorn.Config(app, http="httptools", ws="none", lifespan="on", log_config=None, timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            limits = httpx.Limits(max_connections=None)
            try:
                async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30, limits=limits) as http:
                    await http.get("/liveness")  # answered once it has started
                    yield Rest(app, host, port, http)
            finally:
                server.should_exit = True
                await serving

    return opened


@pytest.fixture
async def rest(open_rest: OpenRest) -> AsyncIterator[Rest]:
    async with open_rest() as rest:
        yield rest
