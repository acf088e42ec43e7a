"""What a line of a batch asks of the farm: the same checks and the same answer as its endpoint gives when it is called directly."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.errors import InvalidField, TokenmillError
from coordinator.messages import Job
from coordinator.sampling import SamplingParams
from producers.admission import split
from producers.batch_lines import ENDPOINTS
from producers.job_handle import JobResult
from producers.lightllm_api import admit
from producers.lightllm_shapes import generate_object
from producers.openai_answers import Show
from producers.openai_errors import openai_error, openai_status
from producers.openai_plan import OpenAIPlan, plan_chat, plan_completion
from producers.shim import Shim


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`asked` has one prompt and one set of parameters per job; `render` makes the answer's body of all results, in the same order."""

    asked: Sequence[tuple[tuple[int, ...], SamplingParams]]
    render: Callable[[Sequence[JobResult]], dict[str, Any]]
    num_prompts: int = 1


class Endpoints:
    """One per shim."""

    def __init__(self, shim: Shim) -> None:
        self._shim = shim
        self._show = Show(shim.admission.tokenizer)
        self._planners: dict[str, Callable[[dict[str, Any], str], Awaitable[Plan]]] = dict(
            zip(ENDPOINTS, (self._chat, self._completion, self._generate), strict=True))

    async def plan(self, endpoint: str, body: dict[str, Any], request_id: str) -> Plan:
        """Raises what the endpoint would refuse the body with."""
        return await self._planners[endpoint](body, request_id)

    async def _generate(self, body: dict[str, Any], request_id: str) -> Plan:
        params, prompt_ids, with_details = await admit(self._shim, body)

        def render(results: Sequence[JobResult]) -> dict[str, Any]:
            return generate_object(results, self._shim.admission.tokenizer, num_prompt_tokens=len(prompt_ids), with_details=with_details)

        return Plan(asked=[(prompt_ids, child) for child in split(params, seed_of(request_id))], render=render)

    async def _completion(self, body: dict[str, Any], request_id: str) -> Plan:
        return self._of_openai(await plan_completion(self._shim, body, seed_of(request_id)), request_id)

    async def _chat(self, body: dict[str, Any], request_id: str) -> Plan:
        return self._of_openai(await plan_chat(self._shim, body, seed_of(request_id)), request_id)

    def _of_openai(self, plan: OpenAIPlan, request_id: str) -> Plan:
        for name in ("stream", "store", "background"):
            if getattr(plan.asked, name):
                raise InvalidField(name, "cannot be true in a batch: its files have the answers")
        return Plan(asked=plan.jobs, render=lambda results: self._show.whole(plan.shape, request_id, results),
                    num_prompts=plan.shape.num_prompts)


def check_endpoint(endpoint: Any) -> str:
    """Raises InvalidField."""
    if not isinstance(endpoint, str) or endpoint not in ENDPOINTS:
        raise InvalidField("endpoint", f"must be one of {', '.join(ENDPOINTS)}, got {endpoint!r:.80}")
    return endpoint


def refusal(endpoint: str, error: TokenmillError) -> tuple[int, dict[str, Any]]:
    """(status, body) as the endpoint tells an error."""
    return openai_status(error), openai_error(error) if endpoint.startswith("/v1/") else {"message": str(error)}


def seed_of(request_id: str) -> int:
    """For a request that names none: the same one however often its jobs are queued."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def jobs_of(plan: Plan, request_id: str, *, model: str, tenant: str, origin: str, created_ms: int, deadline_ms: int) -> list[Job]:
    """Ids are made of the request's alone: whoever queues these jobs again queues the same ones."""
    ids = [request_id] if len(plan.asked) == 1 else [f"{request_id}-{i}" for i in range(len(plan.asked))]
    return [Job(job_id=job_id, origin=origin, model=model, klass="batch", prompt_ids=prompt_ids, params=params, created_ms=created_ms,
                deadline_ms=deadline_ms, tenant=tenant) for job_id, (prompt_ids, params) in zip(ids, plan.asked, strict=True)]
