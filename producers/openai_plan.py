"""From the body of a completion to the jobs that answer it, and how their answers are to be shown. The same for a call and a batch line."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import orjson

from coordinator.errors import InvalidField
from coordinator.sampling import SamplingParams
from producers.admission import Admission, split
from producers.chat_messages import read_messages, read_tools
from producers.chat_templates import chat_format, thinks_at_the_end
from producers.openai_errors import ModelNotFound
from producers.openai_shapes import Asked, ChatAsked, CompletionAsked
from producers.reasoning import CLOSING
from producers.shim import Shim
from producers.tool_choice import Choice, Mode, read_response_format, read_tool_choice, schema_of_calls

MAX_PROMPTS = 128
COMPLETION_TOKENS = 16        # OpenAI's default; a chat may use all the room there is
Kind = Literal["chat", "text"]
Thought = Literal["never", "maybe", "open"]
IDS: dict[Kind, str] = {"chat": "chatcmpl-", "text": "cmpl-"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """All that an answer needs beside its tokens. Plain values: it is kept where an answer is asked for by its id later.

    Choice i answers prompt i // n. `thought` says whether the text begins with thinking: never, perhaps (a mark tells), or already inside.
    """

    kind: Kind
    model: str
    created: int
    num_prompts: int = 1
    n: int = 1
    wants_logprobs: bool = False
    num_top: int = 0
    thought: Thought = "never"
    tool_mode: Mode = "none"
    tool_name: str = ""
    only_one_call: bool = False
    echo: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    tenant: str = ""

    @property
    def num_choices(self) -> int:
        return self.num_prompts * self.n

    def encode(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def decode(cls, data: str | bytes) -> Self:
        values = orjson.loads(data)
        return cls(**{**values, "echo": tuple(values["echo"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIPlan:
    """One prompt and one set of parameters per job, in the order of the choices."""

    asked: Asked
    shape: Shape
    jobs: Sequence[tuple[tuple[int, ...], SamplingParams]]


async def plan_completion(shim: Shim, body: dict[str, Any], seed: int) -> OpenAIPlan:
    """`seed` is for a request that names none. Raises InvalidField, ModelNotFound."""
    asked = CompletionAsked.read(body)
    _check_model(asked, shim)
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise InvalidField("best_of", f"must equal n, got {asked.best_of}")
    if asked.echo and asked.logprobs is not None:
        raise InvalidField("echo", "cannot be combined with logprobs: those of prompts are not computed")
    given = {**asked.sampling(), "max_new_tokens": COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens}
    params = _params(shim.admission, given, num_top=asked.logprobs or 0, top_name="logprobs")
    prompts = [await shim.admission.prompt(prompt, params, field="prompt") for prompt in _prompts(asked.prompt)]
    shape = Shape(kind="text", model=asked.model, created=int(time.time()), num_prompts=len(prompts), n=params.n,
                  wants_logprobs=asked.logprobs is not None, num_top=params.top_logprobs, metadata=asked.metadata or {},
                  echo=_echoes(asked, prompts, shim.admission))
    return OpenAIPlan(asked=asked, shape=shape, jobs=[(prompt, child) for prompt in prompts for child in split(params, seed)])


async def plan_chat(shim: Shim, body: dict[str, Any], seed: int) -> OpenAIPlan:
    """`seed` is for a request that names none. Raises InvalidField, ModelNotFound."""
    asked = ChatAsked.read(body)
    _check_model(asked, shim)
    if asked.top_logprobs and not asked.logprobs:
        raise InvalidField("top_logprobs", "is allowed only with logprobs")
    chat = chat_format(shim.admission.tokenizer)
    tools = read_tools(asked.tools)
    choice = read_tool_choice(asked.tool_choice, tools)
    if asked.parallel_tool_calls is not None and not tools:
        raise InvalidField("parallel_tool_calls", "is allowed only with tools")
    only_one = asked.parallel_tool_calls is False
    guided = _guide(asked, choice, only_one=only_one)
    given = {**asked.sampling(), "max_new_tokens": asked.length, **guided}
    if chat.hides_tool_marks and (chat.thinks or choice.mode == "auto"):
        given["skip_special_tokens"] = False
    prompt = chat.render(read_messages(asked.messages), tools if choice.mode != "none" else (), asked.chat_template_kwargs)
    is_held = bool(guided or asked.guided_grammar or asked.regular_constraint)
    is_open = thinks_at_the_end(prompt)
    if is_open and is_held:   # it is held to its form from the first token on: there is nothing to think in
        prompt, is_open = f"{prompt.rstrip()}\n{CLOSING}\n\n", False
    prompt_ids = await shim.admission.encode(prompt, SamplingParams(add_special_tokens=False), field="messages")
    if asked.length is None:
        given["max_new_tokens"] = max(1, shim.admission.max_req_total_len - len(prompt_ids))
    params = _params(shim.admission, given, num_top=asked.top_logprobs or 0, top_name="top_logprobs")
    try:
        shim.admission.check_length(len(prompt_ids), params, field="messages")
    except InvalidField as error:
        name = "max_completion_tokens" if asked.max_tokens is None and error.field == "max_new_tokens" else error.field
        raise InvalidField(name, error.reason) from None
    thought: Thought = "never" if is_held or not (chat.thinks or is_open) else "open" if is_open else "maybe"
    shape = Shape(kind="chat", model=asked.model, created=int(time.time()), n=params.n, wants_logprobs=bool(asked.logprobs),
                  num_top=params.top_logprobs, thought=thought, tool_mode=choice.mode, tool_name=choice.name, only_one_call=only_one,
                  metadata=asked.metadata or {})
    return OpenAIPlan(asked=asked, shape=shape, jobs=[(prompt_ids, child) for child in split(params, seed)])


def with_tenant(plan: OpenAIPlan, tenant: str) -> Shape:
    return replace(plan.shape, tenant=tenant)


def _check_model(asked: Asked, shim: Shim) -> None:
    if asked.model != shim.settings.model_name:
        raise ModelNotFound(asked.model, shim.settings.model_name)


def _guide(asked: ChatAsked, choice: Choice, *, only_one: bool) -> dict[str, str]:
    schema = read_response_format(asked.response_format)
    if choice.mode not in ("required", "named"):
        if (strict := [tool for tool in asked.tools or () if tool["function"].get("strict")]) and choice.mode == "auto":
            raise InvalidField("tools", f"strict of {strict[0]['function']['name']}: is honoured with tool_choice required or a named "
                                        "function only")
        return {"guided_json": schema} if schema else {}
    if schema:
        raise InvalidField("response_format", "cannot be combined with a tool_choice that demands a call")
    try:
        tools = read_tools(asked.tools)
        params = SamplingParams.parse({"guided_json": schema_of_calls(choice, tools, only_one=only_one)})
    except InvalidField as error:
        raise InvalidField("tools", error.reason) from None
    return {"guided_json": params.guided_json}


def _params(admission: Admission, given: dict[str, Any], *, num_top: int, top_name: str) -> SamplingParams:
    try:
        params = admission.params({**given, "top_logprobs": num_top})
    except InvalidField as error:
        raise InvalidField(top_name if error.field == "top_logprobs" else error.field, error.reason) from None
    admission.check_ids("logit_bias", [token_id for token_id, _ in params.logit_bias])
    return params


def _prompts(given: Any) -> list[Any]:
    """One or several; each text or token ids."""
    if not isinstance(given, list) or not given or isinstance(given[0], int):
        return [given]
    if len(given) > MAX_PROMPTS:
        raise InvalidField("prompt", f"must hold at most {MAX_PROMPTS} prompts, got {len(given)}")
    return given


def _echoes(asked: CompletionAsked, prompts: list[tuple[int, ...]], admission: Admission) -> tuple[str, ...]:
    """The text of each prompt, where it is to be shown."""
    if not asked.echo:
        return ()
    given = _prompts(asked.prompt)
    return tuple(text if isinstance(text, str) else admission.tokenizer.decode(ids) for text, ids in zip(given, prompts, strict=True))
