"""LightLLM's endpoints over HTTP, against a real queue and a worker that answers by formula."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.embedded import EmbeddedServices
from coordinator.messages import Job
from coordinator.sampling import DEFAULTS
from producers import job_stream
from tests.producers.conftest import OpenRest, Rest
from tests.producers.fake_worker import FakeWorker, all_at_once, answer, run, text, token_id

pytestmark = pytest.mark.services


def events_of(body: str) -> list[dict[str, Any]]:
    assert body.endswith("\n\n")
    lines = body.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data:{") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


async def test_generate_has_lightllms_shape(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        response = await rest.post("/generate", {"inputs": "What is AI?", "parameters": {"max_new_tokens": 17, "frequency_penalty": 1}})
    job_id = worker.jobs[0].job_id
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert response.json() == {
        "generated_text": [answer(job_id, 17)], "count_output_tokens": 17, "finish_reason": "length", "prompt_tokens": 11}


async def test_generate_details_name_every_token(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        response = await rest.post("/generate", {"inputs": [72, 105], "parameters": {"max_new_tokens": 2, "return_details": True}})
    job_id = worker.jobs[0].job_id
    assert response.json()["tokens"] == [
        {"id": token_id(job_id, i), "logprob": logprob, "cumlogprob": total, "special": token_id(job_id, i) in (256, 257),
         "count_output_tokens": i + 1, "prompt_tokens": 2, "prompt_cache_len": 0, "text": text(job_id, i)}
        for i, (logprob, total) in enumerate([(-0.25, -0.25), (-0.5, -0.75)])]


async def test_several_answers_are_jobs_with_seeds_of_their_own(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=all_at_once) as worker:
        response = await rest.post("/generate", {"inputs": "Hi", "parameters": {"n": 3, "seed": 2**64 - 2, "max_new_tokens": 4,
                                                                               "return_details": True}})
    by_seed = {job.params.seed: job for job in worker.jobs}
    jobs = [by_seed[seed] for seed in (2**64 - 2, 2**64 - 1, 0)]
    assert all((job.params.n, job.params.best_of, job.prompt_ids) == (1, 1, jobs[0].prompt_ids) for job in jobs)
    body = response.json()
    assert body["generated_text"] == [answer(job.job_id, 4) for job in jobs]
    assert (body["count_output_tokens"], body["finish_reason"], body["prompt_tokens"]) == ([4, 4, 4], ["length"] * 3, 2)
    assert [len(tokens) for tokens in body["tokens"]] == [4, 4, 4]


async def test_a_stream_has_lightllms_bytes(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        response = await rest.post("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 2}})
    job_id = worker.jobs[0].job_id
    assert response.headers["content-type"].startswith("text/event-stream")
    first, second = ("true" if token_id(job_id, i) in (256, 257) else "false" for i in range(2))
    assert response.text == (
        f'data:{{"token":{{"id":{token_id(job_id, 0)},"text":"{text(job_id, 0)}","logprob":-0.25,"special":{first},"count_output_tokens":1,'
        '"prompt_tokens":2},"generated_text":null,"finished":false,"finish_reason":null,"details":null}\n\n'
        f'data:{{"token":{{"id":{token_id(job_id, 1)},"text":"{text(job_id, 1)}","logprob":-0.5,"special":{second},"count_output_tokens":2,'
        '"prompt_tokens":2},"generated_text":null,"finished":true,"finish_reason":"length","details":null}\n\n')


async def test_two_hundred_http_streams_see_every_token_once_in_order(rest: Rest, bus: Bus, model: str) -> None:
    async def stream(i: int) -> tuple[str, str]:
        response = await rest.post("/generate_stream", {"inputs": [i], "parameters": {"max_new_tokens": 6}})
        events = events_of(response.text)
        assert [event["token"]["count_output_tokens"] for event in events] == [1, 2, 3, 4, 5, 6]
        assert [event["finished"] for event in events] == [False] * 5 + [True]
        return response.headers["x-job-id"], "".join(event["token"]["text"] for event in events)

    async with FakeWorker(bus, model):
        streams = await asyncio.gather(*(stream(i) for i in range(200)))
    assert all(shown == answer(job_id, 6) for job_id, shown in streams)
    assert len({job_id for job_id, _ in streams}) == 200 and rest.app.state.shim.client.num_open == 0


async def test_repeats_and_disorder_in_the_queue_are_hidden_from_a_stream(rest: Rest, bus: Bus, model: str) -> None:
    second = FakeWorker(bus, model, name="second")

    async def taken_over(worker: FakeWorker, job: Job) -> None:
        await worker.append(run(job, 0, 2), origin=job.origin)
        await second.append(run(job, 1, 2, epoch=2), run(job, 5, 1, epoch=2), origin=job.origin)
        await worker.append(run(job, 0, 3), origin=job.origin)
        await second.append(run(job, 3, 4, epoch=2, finish="stop"), origin=job.origin)

    async with FakeWorker(bus, model, serve=taken_over) as worker:
        response = await rest.post("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 9}})
    events = events_of(response.text)
    assert [e["token"]["id"] for e in events] == [token_id(worker.jobs[0].job_id, i) for i in range(7)]
    assert events[-1]["finish_reason"] == "stop"


async def test_the_root_streams_when_asked(rest: Rest, bus: Bus, model: str) -> None:
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 1}}
    async with FakeWorker(bus, model):
        assert "generated_text" in (await rest.post("/", body)).json()
        assert events_of((await rest.post("/", {**body, "stream": True})).text)[0]["finished"] is True


async def test_defaults_come_from_the_models_generation_config(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=all_at_once) as worker:
        await rest.post("/generate", {"inputs": "Hi"})
        await rest.post("/generate", {"inputs": "Hi", "parameters": {"do_sample": False, "top_p": 0.5}})
    plain, chosen = worker.jobs[0].params, worker.jobs[1].params
    assert (plain.do_sample, plain.temperature, plain.top_p, plain.top_k) == (True, 0.6, 0.95, -1)
    assert (chosen.do_sample, chosen.temperature, chosen.top_p) == (False, 0.6, 0.5)


async def test_tokens_counts_without_a_job(rest: Rest) -> None:
    assert (await rest.post("/tokens", {"text": "Hé"})).json() == {"ntokens": 3}
    got = await rest.http.request("GET", "/tokens", json={"text": "<s>Hi", "parameters": {"add_special_tokens": False}})
    assert got.json() == {"ntokens": 3}


PARAMETERS = [
    ({"max_new_token": 5}, "max_new_token: unknown parameter"),
    ({"max_new_tokens": "5"}, "max_new_tokens: must be an integer"),
    ({"max_new_tokens": True}, "max_new_tokens: must be an integer"),
    ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
    ({"max_new_tokens": 99},
     "max_new_tokens: prompt of 2 tokens and max_new_tokens 99 are over 100 (--max_req_total_len, or the model's positions): at most 98"),
    ({"min_new_tokens": 20}, "min_new_tokens: must be at most max_new_tokens"),
    ({"temperature": -1}, "temperature: must be at least 0"),
    ({"temperature": "hot"}, "temperature: must be a finite number"),
    ({"top_p": 0}, "top_p: must be above 0"),
    ({"top_p": 1.5}, "top_p: must be above 0 and at most 1"),
    ({"top_k": 0}, "top_k: must be -1"),
    ({"presence_penalty": -2.5}, "presence_penalty: must be at least -2"),
    ({"repetition_penalty": 0.5}, "repetition_penalty: must be at least 1"),
    ({"n": 9}, "n: must be between 1 and 8"),
    ({"n": 2, "best_of": 3}, "n: must equal best_of"),
    ({"do_sample": 1}, "do_sample: must be true or false"),
    ({"return_details": "yes"}, "return_details: must be true or false"),
    ({"stop_sequences": 5}, "stop_sequences: must be a string"),
    ({"stop_sequences": [[1, 300]]}, "stop_sequences: token id 300 is not in the vocabulary of 300 tokens"),
    ({"stop_sequences": [""]}, "stop_sequences: must not hold an empty sequence"),
    ({"allowed_token_ids": [300]}, "allowed_token_ids: token id 300 is not in the vocabulary"),
    ({"seed": -1}, "seed: must be between 0"),
    ({"guided_json": "{"}, "guided_json: "),
    ({"guided_json": "{}", "regular_constraint": "a"}, "regular_constraint: cannot be combined with guided_json"),
    ({"return_details": ""}, "return_details: must be true or false"),
    ({"image_max_patch_num": 4}, "image_max_patch_num: unknown parameter"),
    ({"suggested_dp_index": 1}, "suggested_dp_index: unknown parameter"),
    ({"suggested_dp_index": 0}, "suggested_dp_index: unknown parameter"),
]
BODIES = [
    (b"not json", "body: not valid JSON"),
    (b"", "body: not valid JSON"),
    (b'{"inputs": "\xff"}', "body: not valid JSON"),
    (b'{"inputs": "\\ud800"}', "body: not valid JSON"),
    (b"[1]", "body: must be a JSON object"),
    (b"{}", "inputs: is missing"),
    (b'{"inputs": null}', "inputs: must be a string or a list of token ids, not null"),
    (b'{"inputs": {"a": 1}}', "inputs: must be a string or a list of token ids, not an object"),
    (b'{"inputs": ""}', "inputs: must not be empty"),
    (b'{"inputs": []}', "inputs: must not be empty"),
    (b'{"inputs": [1, "2"]}', "inputs: must hold only token ids"),
    (b'{"inputs": [1, true]}', "inputs: must hold only token ids"),
    (b'{"inputs": [1.0]}', "inputs: must hold only token ids"),
    (b'{"inputs": [300]}', "inputs: token id 300 is not in the vocabulary of 300 tokens"),
    (b'{"inputs": [-1]}', "inputs: token id -1 is not in the vocabulary"),
    (b'{"inputs": "%b"}' % (b"x" * 100), "inputs: prompt of 100 tokens leaves no room for output: the limit is 100"),
    (b'{"inputs": "Hi", "parameters": [1]}', "parameters: must be an object"),
    (b'{"inputs": "Hi", "parameters": "x"}', "parameters: must be an object"),
    (b'{"inputs": "Hi", "params": {}}', "params: unknown field"),
    (b'{"inputs": "Hi", "multimodal_params": {"images": [{"type": "url", "data": "x"}]}}', "multimodal_params: images and audio are not"),
    (b'{"inputs": "Hi", "multimodal_params": []}', "multimodal_params: must be an object"),
]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_bad_input_is_the_clients_fault_and_names_the_field(rest: Rest, path: str) -> None:
    bad = [(json.dumps({"inputs": "Hi", "parameters": given}).encode(), message) for given, message in PARAMETERS]
    for body, message in bad + BODIES:
        response = await rest.http.post(path, content=body)
        assert response.status_code == 400, (body, response.text)
        assert response.json()["message"].startswith(message), (body, response.text)


async def test_empty_multimodal_params_and_null_parameters_are_fine(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model):
        for extra in ({"multimodal_params": {"images": [], "audios": []}}, {"multimodal_params": None}, {"parameters": None}):
            assert (await rest.post("/generate", {"inputs": "Hi", **extra})).status_code == 200


async def test_a_stream_of_several_answers_is_refused(rest: Rest) -> None:
    response = await rest.post("/generate_stream", {"inputs": "Hi", "parameters": {"best_of": 2}})
    assert (response.status_code, response.json()) == (400, {"message": "best_of: must be 1 for a stream, got 2"})
    response = await rest.post("/", {"inputs": "Hi", "stream": "yes"})
    assert (response.status_code, response.json()) == (400, {"message": "stream: must be true or false, got 'yes'"})


async def test_unknown_paths_and_methods_answer_in_the_same_shape(rest: Rest) -> None:
    missing, wrong = await rest.http.get("/nothing"), await rest.http.get("/generate")
    assert (missing.status_code, missing.json()) == (404, {"message": "GET /nothing: Not Found"})
    assert (wrong.status_code, wrong.json()) == (405, {"message": "GET /generate: Method Not Allowed"})


async def test_a_body_over_the_limit_is_refused_by_its_announced_length(open_rest: OpenRest) -> None:
    async with open_rest(max_body_bytes=1000) as rest:
        response = await rest.post("/generate", {"inputs": "x" * 2000})
    assert response.status_code == 413 and "over the" in response.json()["message"]


async def test_a_body_over_the_limit_is_refused_before_it_has_ended(open_rest: OpenRest) -> None:
    async with open_rest(max_body_bytes=1000) as rest:
        reader, writer = await asyncio.open_connection(rest.host, rest.port)
        writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 0x400 + b"\r\n")
        await writer.drain()  # the closing chunk is never sent
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        writer.close()


async def test_a_full_queue_answers_429_with_retry_after(open_rest: OpenRest, bus: Bus, model: str) -> None:
    async with open_rest(max_queued=1) as rest:
        await bus.publish_job(Job(job_id="first", origin="other", model=model, text="Hi"))
        for path in ("/generate", "/generate_stream"):
            response = await rest.post(path, {"inputs": "Hi"})
            assert response.status_code == 429 and response.headers["retry-after"] == "1"
            assert f"queue {subjects.jobs(model, 'normal')} is full" in response.json()["message"]


async def test_answers_taken_back_when_a_sibling_does_not_fit_the_queue(open_rest: OpenRest, bus: Bus, model: str) -> None:
    async def never(worker: FakeWorker, job: Job) -> None:
        await asyncio.Event().wait()

    async with open_rest(max_queued=2) as rest, FakeWorker(bus, model, serve=never) as worker:
        assert (await rest.post("/generate", {"inputs": "Hi", "parameters": {"n": 3}})).status_code == 429
        assert {await worker.cancelled.get(), await worker.cancelled.get()} == {job.job_id for job in worker.jobs}


async def test_a_broker_that_is_away_answers_503(own_services: EmbeddedServices, open_rest: OpenRest) -> None:
    async with open_rest(nats_url=own_services.nats_url, submit_timeout_s=0.2) as rest:
        own_services.nats.kill()
        response = await rest.post("/generate", {"inputs": "Hi"})
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        own_services.nats.start()
        await rest.app.state.shim.client.bus.flush()  # connected again


@pytest.mark.parametrize(("reason", "error", "status"), [
    ("error", "the engine failed", 500), ("error", "max_new_tokens: needs 40 KV pages", 400), ("expired", "", 408), ("cancelled", "", 499)])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_job_that_fails_before_its_first_token_has_an_error_status(rest: Rest, bus: Bus, model: str, path: str,
                                                                           reason: Any, error: str, status: int) -> None:
    async def fail(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 0, finish=reason, error=error))

    async with FakeWorker(bus, model, serve=fail):
        response = await rest.post(path, {"inputs": "Hi"})
    assert response.status_code == status and (error or reason) in response.json()["message"]


async def test_a_job_that_fails_inside_a_stream_says_so_in_its_last_event(rest: Rest, bus: Bus, model: str) -> None:
    async def fail(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 2))
        await worker.emit(job, run(job, 2, 0, finish="error", error="the engine failed"))

    async with FakeWorker(bus, model, serve=fail):
        response = await rest.post("/generate_stream", {"inputs": "Hi"})
        whole = await rest.post("/generate", {"inputs": "Hi"})
    last = events_of(response.text)[-1]
    assert len(events_of(response.text)) == 3
    assert (last["finished"], last["finish_reason"], last["message"]) == (True, "error", "the engine failed")
    assert (last["token"]["id"], last["token"]["text"], last["token"]["count_output_tokens"]) == (-1, "", 2)
    assert whole.status_code == 500 and "the engine failed" in whole.json()["message"]


async def first_token_only(worker: FakeWorker, job: Job) -> None:
    await worker.emit(job, run(job, 0, 1))


async def test_a_reader_that_leaves_its_stream_cancels_the_job(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=first_token_only) as worker:
        async with rest.http.stream("POST", "/generate_stream", json={"inputs": "Hi"}) as response:
            assert (await anext(response.aiter_lines())).startswith("data:")
        assert await worker.cancelled.get() == worker.jobs[0].job_id
    await asyncio.gather(*rest.app.state.shim._background)  # the cancel in Redis goes out beside the one over NATS
    assert (await rest.app.state.shim.client.store.job(worker.jobs[0].job_id))["cancelled"] == "1"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_client_that_leaves_before_the_first_token_cancels_its_jobs(rest: Rest, bus: Bus, model: str, path: str) -> None:
    is_taken = asyncio.Event()

    async def never(worker: FakeWorker, job: Job) -> None:
        is_taken.set()
        await asyncio.Event().wait()

    async with FakeWorker(bus, model, serve=never) as worker:
        asking = asyncio.create_task(rest.post(path, {"inputs": "Hi"}))
        await is_taken.wait()
        asking.cancel()
        assert await worker.cancelled.get() == worker.jobs[0].job_id


async def test_a_slow_reader_takes_bounded_memory_and_still_gets_everything(open_rest: OpenRest, bus: Bus, model: str,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_stream, "MAX_UNREAD_TOKENS", 2000)
    num_tokens, has_emitted = 30_000, asyncio.Event()

    async def flood(worker: FakeWorker, job: Job) -> None:
        for first in range(0, num_tokens, 500):
            await worker.emit(job, run(job, first, 500, finish="length" if first + 500 == num_tokens else None))
        has_emitted.set()

    async with open_rest(max_req_total_len=num_tokens + 10) as rest, FakeWorker(bus, model, serve=flood) as worker:
        reader, writer = await asyncio.open_connection(rest.host, rest.port, limit=4096)
        body = json.dumps({"inputs": "Hi", "parameters": {"max_new_tokens": num_tokens}}).encode()
        writer.write(b"POST /generate_stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await has_emitted.wait()
        client = rest.app.state.shim.client
        await client.bus.flush()
        assert client._open[worker.jobs[0].job_id].tokens.num_unread == 2000
        received = bytearray()
        while chunk := await reader.read(1 << 16):
            received += chunk
        writer.close()
    # Without the lengths of HTTP's chunks, which stand on lines of their own.
    lines = [line for line in received.decode().partition("\r\n\r\n")[2].split("\r\n") if "data:" in line]
    events = events_of("".join(lines))
    assert [e["token"]["id"] for e in events] == [token_id(worker.jobs[0].job_id, i) for i in range(num_tokens)]


async def test_streams_go_on_over_a_broker_that_is_killed_in_the_middle(own_services: EmbeddedServices, open_rest: OpenRest,
                                                                       model: str) -> None:
    half_way, go_on = asyncio.Event(), asyncio.Event()
    num_streams = num_half_way = 10

    async def pause_half_way(worker: FakeWorker, job: Job) -> None:
        nonlocal num_half_way
        await worker.emit(job, run(job, 0, 3))
        num_half_way -= 1
        if num_half_way == 0:
            half_way.set()
        await go_on.wait()
        for i in range(3, 6):
            await worker.emit(job, run(job, i, 1, finish="length" if i == 5 else None))

    async with (open_rest(nats_url=own_services.nats_url) as rest, await Bus.connect(own_services.nats_url, "worker") as bus,
                FakeWorker(bus, model, serve=pause_half_way)):
        asking = [asyncio.create_task(rest.post("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 6}}))
                  for _ in range(num_streams)]
        await half_way.wait()
        own_services.nats.kill()
        go_on.set()
        await asyncio.to_thread(own_services.nats.start)
        responses: list[httpx.Response] = await asyncio.gather(*asking)
    for response in responses:
        assert "".join(e["token"]["text"] for e in events_of(response.text)) == answer(response.headers["x-job-id"], 6)


async def test_several_answers_to_a_named_request_are_jobs_named_after_it(rest: Rest, bus: Bus, model: str) -> None:
    body = {"inputs": "Hi", "parameters": {"best_of": 2, "max_new_tokens": 3}}
    async with FakeWorker(bus, model) as worker:
        named = [await rest.http.post("/generate", json=body, headers={"X-Job-Id": "mine"}) for _ in range(2)]
        unnamed = await rest.post("/generate", body)
    assert [reply.headers["x-job-id"] for reply in named] == ["mine-0, mine-1"] * 2 and named[0].json() == named[1].json()
    first, second = unnamed.headers["x-job-id"].split(", ")
    assert first.removesuffix("-0") == second.removesuffix("-1") and len(worker.jobs) == 4


async def test_the_same_named_request_twice_at_once_is_one_job_and_two_answers(rest: Rest, bus: Bus, model: str) -> None:
    both_ask = asyncio.Event()

    async def wait(worker: FakeWorker, job: Job) -> None:
        await both_ask.wait()
        await worker.emit(job, run(job, 0, 4, finish="stop"))

    async with FakeWorker(bus, model, serve=wait) as worker:
        asking = [asyncio.create_task(rest.http.post("/generate", json={"inputs": "Hi"}, headers={"X-Job-Id": "mine"})) for _ in range(2)]
        while "reader" not in await rest.app.state.shim.client.store.job("mine"):
            await asyncio.sleep(0.01)
        both_ask.set()
        replies = await asyncio.gather(*asking)
    assert [reply.status_code for reply in replies] == [200, 200] and replies[0].json() == replies[1].json()
    assert len(worker.jobs) == 1


async def test_what_lightllms_servers_tell_each_other_may_be_sent_with_its_defaults(rest: Rest, bus: Bus, model: str) -> None:
    given = {"image_max_patch_num": -1, "group_request_id": -1, "suggested_dp_index": -1, "move_kv_to_decode_node": None}
    async with FakeWorker(bus, model):
        assert (await rest.post("/generate", {"inputs": "Hi", "parameters": given})).status_code == 200
    refused = await rest.post("/get_score", {"chat": []})
    assert refused.status_code == 400 and refused.json()["message"].startswith("/get_score: reward models are not supported")


async def test_guided_parameters_travel_with_the_job(rest: Rest, bus: Bus, model: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with FakeWorker(bus, model, serve=all_at_once) as worker:
        for given in ({"guided_json": schema}, {"guided_json": json.dumps(schema)}, {"regular_constraint": "a+"}, {"guided_grammar": ""}):
            assert (await rest.post("/generate", {"inputs": "Hi", "parameters": given})).status_code == 200
    params = [job.params for job in worker.jobs]
    assert [json.loads(p.guided_json) for p in params[:2]] == [schema, schema]
    assert (params[2].regular_constraint, params[3].is_guided) == ("a+", False)


async def test_the_likeliest_tokens_are_shown_with_the_details_or_refused(rest: Rest, bus: Bus, model: str) -> None:
    async def with_tops(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, replace(run(job, 0, 2, finish="stop"), top_logprobs=(((5, -0.5), (6, -1.0)), ((7, -2.0),))))

    shown = [[{"id": 5, "logprob": -0.5}, {"id": 6, "logprob": -1.0}], [{"id": 7, "logprob": -2.0}]]
    async with FakeWorker(bus, model, serve=with_tops):
        detailed = await rest.post("/generate", {"inputs": "Hi", "parameters": {"top_logprobs": 2, "return_details": True}})
        streamed = await rest.post("/generate_stream", {"inputs": "Hi", "parameters": {"top_logprobs": 2}})
    assert [token["top_logprobs"] for token in detailed.json()["tokens"]] == shown
    assert [event["token"]["top_logprobs"] for event in events_of(streamed.text)] == shown
    refused = await rest.post("/generate", {"inputs": "Hi", "parameters": {"top_logprobs": 2}})
    assert refused.status_code == 400 and refused.json()["message"].startswith("top_logprobs: are shown in the details")


async def test_the_schema_names_every_parameter(rest: Rest) -> None:
    schema = (await rest.http.get("/openapi.json")).json()
    body = schema["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]["parameters"]["properties"]) == {*DEFAULTS, "return_details"}
