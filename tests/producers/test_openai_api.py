"""OpenAI's endpoints over HTTP, against a real queue and a worker that answers by formula or with a given text."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.bus import Bus
from coordinator.messages import Finish, Job, TokenRun
from tests.producers.conftest import OpenRest, Rest
from tests.producers.fake_worker import FakeWorker, answer, run

pytestmark = pytest.mark.services

TEMPLATE = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")
THINKING = TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}}}
Serve = Callable[[FakeWorker, Job], Awaitable[None]]


def says(said: str, *, tops: bool = False) -> Serve:
    """A worker whose every answer is `said`, a character per token and frame; cut off at max_new_tokens."""
    async def serve(worker: FakeWorker, job: Job) -> None:
        shown = said[: job.params.max_new_tokens]
        for i, char in enumerate(shown):
            end = Finish(reason="stop" if shown == said else "length", prompt_tokens=len(job.prompt_ids or ()), cached_tokens=1)
            top = ((65 + i, -0.5), (66 + i, -1.5))
            await worker.emit(job, TokenRun(job_id=job.job_id, epoch=1, first_index=i, token_ids=(65 + i,), logprobs=(-0.5,), texts=(char,),
                                            finish=end if i == len(shown) - 1 else None, top_logprobs=(top,) if tops else ()))
    return serve


@pytest.fixture
def chat_dir(model_dir: Path, tmp_path: Path) -> Callable[[str], str]:
    def made(template: str) -> str:
        for name in ("tokenizer.json", "config.json", "generation_config.json"):
            (tmp_path / name).write_bytes((model_dir / name).read_bytes())
        (tmp_path / "chat_template.jinja").write_text(template)
        return str(tmp_path)
    return made


@pytest.fixture
async def chat_rest(open_rest: OpenRest, chat_dir: Callable[[str], str]) -> AsyncIterator[Rest]:
    async with open_rest(model_dir=chat_dir(TEMPLATE), max_req_total_len=1000) as rest:
        yield rest


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream") and response.text.endswith("data: [DONE]\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: {")]


async def chat(rest: Rest, model: str, **body: Any) -> httpx.Response:
    return await rest.post("/v1/chat/completions", {"model": model, "messages": HELLO, **body})


async def complete(rest: Rest, model: str, **body: Any) -> httpx.Response:
    return await rest.post("/v1/completions", {"model": model, "prompt": "Hi", **body})


async def test_models_name_the_one_that_is_served(rest: Rest, model: str) -> None:
    listed = (await rest.http.get("/v1/models")).json()
    assert listed["object"] == "list" and [each["id"] for each in listed["data"]] == [model]
    assert (await rest.http.get(f"/v1/models/{model}")).json() == listed["data"][0]
    missing = await rest.http.get("/v1/models/gpt/4")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


async def test_a_completion_has_openais_shape(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        response = await complete(rest, model, max_tokens=3, temperature=0.5)
    job = worker.jobs[0]
    body = response.json()
    assert (body["id"], body["object"], body["model"]) == (f"cmpl-{job.job_id}", "text_completion", model)
    assert body["choices"] == [{"index": 0, "text": answer(job.job_id, 3), "logprobs": None, "finish_reason": "length"}]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"], body["usage"]["total_tokens"]) == (2, 3, 5)
    assert (job.params.do_sample, job.params.temperature, job.params.top_p) == (True, 0.5, 0.95)   # what is not said, the model says


async def test_prompts_times_n_are_choices_with_ids_derived_from_one(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        body = (await complete(rest, model, prompt=["a", [98, 99]], n=2, max_tokens=2, seed=-1)).json()
    parent = body["id"].removeprefix("cmpl-")
    jobs = {job.job_id: job for job in worker.jobs}
    assert [choice["text"] for choice in body["choices"]] == [answer(f"{parent}-{i}", 2) for i in range(4)]
    assert [len(jobs[f"{parent}-{i}"].prompt_ids or ()) for i in range(4)] == [1, 1, 2, 2]
    assert [jobs[f"{parent}-{i}"].params.seed for i in range(2)] == [2**64 - 1, 0]
    assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 8


async def test_a_stream_of_two_choices_tells_each_token_once_and_then_usage(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model):
        response = await complete(rest, model, n=2, max_tokens=3, stream=True, stream_options={"include_usage": True})
    *chunks, last = chunks_of(response)
    parent = chunks[0]["id"].removeprefix("cmpl-")
    for i in range(2):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert "".join(choice["text"] for choice in choices) == answer(f"{parent}-{i}", 3)
        assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6 and last["usage"]["prompt_tokens"] == 2


async def test_echo_puts_the_prompt_before_each_choice(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=says("!")):
        body = (await complete(rest, model, prompt="Hi", n=2, echo=True)).json()
        streamed = chunks_of(await complete(rest, model, prompt="Hi", echo=True, stream=True))
    assert [choice["text"] for choice in body["choices"]] == ["Hi!", "Hi!"] and streamed[0]["choices"][0]["text"] == "Hi!"


async def test_a_chat_is_rendered_by_the_template_and_answered_as_an_assistant(chat_rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=says("Hello.")) as worker:
        body = (await chat(chat_rest, model, user="me", max_completion_tokens=9)).json()
    assert bytes(chat_rest.app.state.shim.admission.tokenizer.decode(worker.jobs[0].prompt_ids), "utf-8") == b"[user]Hi[assistant]"
    assert body["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "Hello.", "refusal": None}, "logprobs": None,
                               "finish_reason": "stop"}]
    assert body["object"] == "chat.completion" and body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_a_chat_without_a_length_may_use_all_the_room_there_is(chat_rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=says("x")) as worker:
        await chat(chat_rest, model)
    assert worker.jobs[0].params.max_new_tokens == 1000 - len(worker.jobs[0].prompt_ids or ())


async def test_a_streamed_chat_begins_with_the_role(chat_rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=says("Hey")):
        chunks = chunks_of(await chat(chat_rest, model, stream=True))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": "H"}, {"content": "e"}, {"content": "y"}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]


async def test_thought_comes_apart_from_the_answer(open_rest: OpenRest, chat_dir: Callable[[str], str], bus: Bus, model: str) -> None:
    async with open_rest(model_dir=chat_dir(THINKING)) as rest, FakeWorker(bus, model, serve=says("Hm.\n</think>\n\nYes.")):
        body = (await chat(rest, model)).json()
        chunks = chunks_of(await chat(rest, model, stream=True))
    assert (body["choices"][0]["message"]["reasoning_content"], body["choices"][0]["message"]["content"]) == ("Hm.", "Yes.")
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 11
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."


async def test_an_answer_that_is_held_to_a_schema_does_not_think(open_rest: OpenRest, chat_dir: Callable[[str], str], bus: Bus,
                                                                 model: str) -> None:
    async with open_rest(model_dir=chat_dir(THINKING)) as rest, FakeWorker(bus, model, serve=says("{}")) as worker:
        body = (await chat(rest, model, response_format={"type": "json_object"})).json()
    assert body["choices"][0]["message"]["content"] == "{}" and worker.jobs[0].params.guided_json
    assert rest.app.state.shim.admission.tokenizer.decode(worker.jobs[0].prompt_ids).endswith("<think>\n</think>\n\n")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_call_that_the_model_makes_is_a_tool_call(chat_rest: Rest, bus: Bus, model: str, is_stream: bool) -> None:
    said = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    async with FakeWorker(bus, model, serve=says(said)) as worker:
        response = await chat(chat_rest, model, tools=[TOOL], stream=is_stream)
    assert '"name": "add"' in chat_rest.app.state.shim.admission.tokenizer.decode(worker.jobs[0].prompt_ids)
    if is_stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(response)]
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
        content, reason = "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        calls, content, reason = choice["message"]["tool_calls"], choice["message"]["content"], choice["finish_reason"]
    assert (content, reason) == ("I add.", "tool_calls")
    assert [call["function"] for call in calls] == [{"name": "add", "arguments": '{"a": 1}'}] and calls[0]["id"].startswith("call_")


async def test_demanded_calls_are_held_to_the_tools_schemas(chat_rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=says('[{"name": "add", "arguments": {"a": 2}}]')) as worker:
        body = (await chat(chat_rest, model, tools=[TOOL], tool_choice="required")).json()
    schema = json.loads(worker.jobs[0].params.guided_json)
    assert schema["items"]["anyOf"][0]["properties"]["name"] == {"const": "add"}
    assert schema["$defs"]["tool_0"] == TOOL["function"]["parameters"]  # type: ignore[index]
    assert body["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2}'}


async def test_a_named_function_gets_its_arguments(chat_rest: Rest, bus: Bus, model: str) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    async with FakeWorker(bus, model, serve=says('{"a": 2}')) as worker:
        body = (await chat(chat_rest, model, tools=[TOOL], tool_choice=named)).json()
    assert json.loads(worker.jobs[0].params.guided_json) == TOOL["function"]["parameters"]  # type: ignore[index]
    choice = body["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2}'} and choice["finish_reason"] == "stop"


async def test_log_probabilities_name_tokens_and_their_rivals(chat_rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=says("ab", tops=True)) as worker:
        told = (await chat(chat_rest, model, logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
        older = (await complete(chat_rest, model, logprobs=2)).json()["choices"][0]["logprobs"]
    texts = [chat_rest.app.state.shim.admission.tokenizer.decode([i]) for i in (65, 66)]
    assert [job.params.top_logprobs for job in worker.jobs] == [2, 2]
    assert told[0]["token"] == texts[0] and told[0]["bytes"] == list(texts[0].encode()) and told[0]["logprob"] == -0.5
    assert [(top["token"], top["logprob"]) for top in told[0]["top_logprobs"]] == [(texts[0], -0.5), (texts[1], -1.5)]
    assert older["token_logprobs"] == [-0.5, -0.5] and older["text_offset"] == [0, 1] and older["top_logprobs"][0] == {
        texts[0]: -0.5, texts[1]: -1.5}


@pytest.mark.parametrize(("fields", "param"), [
    ({"mood": 1}, "mood"), ({"functions": []}, "functions"), ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"temperature": "hot"}, "temperature"), ({"temperature": -1}, "temperature"), ({"n": 99}, "n"), ({"stop": [1]}, "stop"),
    ({"stop": [""]}, "stop"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"), ({"presence_penalty": -2.5}, "presence_penalty"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"), ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "cat"}}}}, "response_format"),
    ({"tool_choice": "auto"}, "tool_choice"), ({"tools": []}, "tools"), ({"tools": [{"type": "x"}]}, "tools[0]"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {**TOOL["function"], "strict": True}}]}, "tools"),  # type: ignore[dict-item]
    ({"metadata": {"a": "b"}}, "metadata"), ({"stream": True, "background": True}, "background"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages"),
    ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"), ({"stream": 1}, "stream"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
])
async def test_a_field_that_cannot_be_honoured_is_named(chat_rest: Rest, model: str, fields: dict[str, Any], param: str) -> None:
    response = await chat(chat_rest, model, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(("fields", "param"), [
    ({"suffix": "x"}, "suffix"), ({"prompt": ""}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [300]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"), ({"best_of": 2}, "best_of"), ({"echo": True, "logprobs": 1}, "echo"), ({"logprobs": 21}, "logprobs"),
    ({"messages": HELLO}, "messages"), ({"prompt": ["a"] * 129}, "prompt"),
])
async def test_a_completion_field_that_cannot_be_honoured_is_named(rest: Rest, model: str, fields: dict[str, Any], param: str) -> None:
    error = (await complete(rest, model, **fields)).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error


async def test_a_checkpoint_without_a_template_refuses_chats(rest: Rest, model: str) -> None:
    response = await chat(rest, model)
    assert response.status_code == 400 and "no chat template: use /v1/completions" in response.json()["error"]["message"]


async def test_another_models_name_and_broken_bodies_are_refused(rest: Rest, model: str) -> None:
    assert (await chat(rest, "gpt-4")).json()["error"]["code"] == "model_not_found"
    assert (await rest.post("/v1/completions", {"prompt": "x"})).json()["error"]["param"] == "model"
    broken = await rest.http.post("/v1/completions", content=b"{")
    assert broken.status_code == 400 and broken.json()["error"]["param"] == "body"


async def test_a_job_that_fails_before_its_first_token_has_an_error_status(rest: Rest, bus: Bus, model: str) -> None:
    async def fail(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 0, finish="error", error="max_new_tokens: too many for this pool"))
    async with FakeWorker(bus, model, serve=fail):
        for is_stream in (False, True):
            response = await complete(rest, model, stream=is_stream)
            assert response.status_code == 400 and response.json()["error"]["param"] == "max_tokens"


async def test_a_job_that_fails_later_ends_its_stream_with_an_error(rest: Rest, bus: Bus, model: str) -> None:
    async def fail(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 1))
        await worker.emit(job, run(job, 1, 0, finish="error", error="lost"))
    async with FakeWorker(bus, model, serve=fail):
        chunks = chunks_of(await complete(rest, model, stream=True))
    assert chunks[0]["choices"][0]["finish_reason"] is None and chunks[1]["error"]["type"] == "server_error"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_cancels_every_choice(rest: Rest, bus: Bus, model: str, is_stream: bool) -> None:
    async def begin(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 1))
        started.release()
    started = asyncio.Semaphore(0)
    async with FakeWorker(bus, model, serve=begin) as worker:
        asking = asyncio.create_task(complete(rest, model, n=2, stream=is_stream, max_tokens=9))
        for _ in range(2):
            await started.acquire()
        asking.cancel()
        cancelled = {await asyncio.wait_for(worker.cancelled.get(), 10) for _ in range(2)}
    assert cancelled == {job.job_id for job in worker.jobs}


async def test_a_named_stream_goes_on_after_the_last_event_that_was_seen(open_rest: OpenRest, chat_dir: Callable[[str], str], bus: Bus,
                                                                         model: str) -> None:
    said = "Hm.</think>Yes, yes."
    async with open_rest(model_dir=chat_dir(THINKING)) as rest, FakeWorker(bus, model, serve=says(said)) as worker:
        body = {"model": model, "messages": HELLO, "stream": True}
        whole = await rest.http.post("/v1/chat/completions", json=body, headers={"X-Job-Id": "mine"})
        assert [line for line in whole.text.splitlines() if line.startswith("id: ")][-1] == f"id: {len(said) - 1}"
        for seen in (0, 5, len(said) - 3, len(said) - 1):
            again = await rest.http.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": "mine", "Last-Event-ID": str(seen)})
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(again)]
            assert "".join(delta.get("content", "") for delta in deltas) == "Yes, yes."[max(0, seen - 10):]
            assert chunks_of(again)[-1]["choices"][0]["finish_reason"] == "stop" and chunks_of(again)[-1]["id"] == "chatcmpl-mine"
    assert len(worker.jobs) == 1


async def test_last_event_id_is_refused_where_there_is_no_one_stream(rest: Rest, model: str) -> None:
    for fields in ({"stream": True, "n": 2}, {}):
        body = {"model": model, "prompt": "a", **fields}
        response = await rest.http.post("/v1/completions", json=body, headers={"X-Job-Id": "x", "Last-Event-ID": "3"})
        assert response.status_code == 400 and response.json()["error"]["param"] == "Last-Event-ID"


async def test_a_background_chat_is_asked_for_by_its_id_until_it_is_there(chat_rest: Rest, bus: Bus, model: str) -> None:
    begun = (await chat(chat_rest, model, background=True, n=2, metadata={"a": "b"}, tools=[TOOL])).json()
    assert (begun["status"], begun["choices"]) == ("queued", [])
    path = f"/v1/chat/completions/{begun['id']}"
    assert (await chat_rest.http.get(path)).json() == begun
    async with FakeWorker(bus, model, serve=says('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')) as worker:
        while (shown := (await chat_rest.http.get(path)).json())["status"] != "completed":
            await asyncio.sleep(0.01)
    assert len(shown["choices"]) == 2 and shown["metadata"] == {"a": "b"} and shown["created"] == begun["created"]
    assert all(choice["message"]["tool_calls"][0]["function"]["name"] == "add" for choice in shown["choices"]) and len(worker.jobs) == 2
    assert (await chat_rest.http.get(path.replace("/chat", ""))).status_code == 404
    assert (await chat_rest.http.get(path, headers={"X-Tenant": "other"})).status_code == 404


async def test_a_stored_answer_is_given_again_as_it_was(rest: Rest, bus: Bus, model: str) -> None:
    async def with_a_late_record(worker: FakeWorker, job: Job) -> None:
        end = run(job, 0, 2, finish="length")
        await worker.append(end, origin=job.origin)
        await asyncio.wait({asking}, timeout=0.3)      # a shim that does not wait for the record answers here
        await worker.emit(job, end)

    async with FakeWorker(bus, model, serve=with_a_late_record):
        asking = asyncio.ensure_future(complete(rest, model, store=True, logprobs=0))
        first = (await asking).json()
    assert (await rest.http.get(f"/v1/completions/{first['id']}")).json() == {**first, "status": "completed"}


async def test_forgetting_a_background_answer_cancels_what_is_not_over(chat_rest: Rest, bus: Bus, model: str) -> None:
    begun = (await chat(chat_rest, model, background=True)).json()
    path = f"/v1/chat/completions/{begun['id']}"
    async with FakeWorker(bus, model, serve=says("never read")):
        assert (await chat_rest.http.delete(path)).json() == {"id": begun["id"], "object": "chat.completion.deleted", "deleted": True}
        gone = await chat_rest.http.get(path)
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "not_found"


async def test_what_is_not_there_is_told_in_openais_shape(rest: Rest) -> None:
    for path, status in (("/v1/nothing", 404), ("/v1/chat/completions", 405)):
        response = await rest.http.get(path)
        assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"
