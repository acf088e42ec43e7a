"""A small streaming server with known behaviour, on a free port in this process's own thread."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

Answer = Callable[[int, dict[str, Any]], Response]  # (number of the request from 0, its body) -> the answer


@dataclass
class Scripted:
    """Answers every POST by `answer`; keeps the bodies."""

    answer: Answer
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        running = 0

        @app.post("/{path:path}")
        async def handle(path: str, request: Request) -> Response:
            nonlocal running
            body = json.loads(await request.body())
            number = len(self.bodies)
            self.bodies.append(body)
            running += 1
            self.most_at_once = max(self.most_at_once, running)
            await asyncio.sleep(0)
            answer = self.answer(number, body)
            running -= 1
            return answer

        return app


def lightllm_stream(body: dict[str, Any], *, cut: int = 0, wrong_count_at: int = -1, reason: str = "length") -> Response:
    """A LightLLM-shaped stream of as many tokens as asked for, less `cut`."""
    wanted = body["parameters"]["max_new_tokens"] - cut

    async def events() -> AsyncIterator[str]:
        for index in range(wanted):
            is_last = index == wanted - 1
            token = {
                "id": 1000 + index, "text": f" t{index}", "logprob": -0.5, "special": False,
                "count_output_tokens": index + (2 if index == wrong_count_at else 1), "prompt_tokens": len(body["inputs"]),
            }  # fmt: skip
            event = {
                "token": token, "generated_text": None, "finished": is_last, "finish_reason": reason if is_last else None, "details": None
            }  # fmt: skip
            yield f"data:{json.dumps(event)}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def openai_stream(body: dict[str, Any]) -> Response:
    wanted = body["max_tokens"]

    async def events() -> AsyncIterator[str]:
        for index in range(wanted):
            choice = {"index": 0, "text": " t", "finish_reason": "length" if index == wanted - 1 else None}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': wanted}})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def refusal(status: int, message: str, **headers: str) -> Response:
    return JSONResponse({"message": message}, status_code=status, headers=headers)


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[Scripted]:
    scripted = Scripted(answer)
    config = uvicorn.Config(scripted.app(), host="127.0.0.1", port=0, log_level="critical", ws="none")
    server = uvicorn.Server(config)
    with config.bind_socket() as socket:  # listening before the thread runs: a client that is faster waits in the backlog
        socket.listen()
        scripted.url = f"http://127.0.0.1:{socket.getsockname()[1]}/generate_stream"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield scripted
        finally:
            server.should_exit = True
            thread.join()
