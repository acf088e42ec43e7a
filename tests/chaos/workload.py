"""What the load asks for: jobs that are all different, greedy and sampled, through three doors. Drawn from one seed."""

import random
from dataclasses import dataclass
from typing import Any, Literal

from coordinator.sampling import SamplingParams

Kind = Literal["stream", "plain", "client"]   # POST /generate_stream, POST /generate, TokenmillClient
KINDS: tuple[Kind, ...] = ("stream", "plain", "client")
VOCAB_SIZE = 512
FIRST_ORDINARY_ID = 5      # below are special tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One job, without an id: the same spec may be asked for again under another one and must give the same tokens."""

    index: int
    kind: Kind
    prompt: tuple[int, ...]
    parameters: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return int(self.parameters["max_new_tokens"])

    @property
    def params(self) -> SamplingParams:
        return SamplingParams.parse(self.parameters)


def draw(num_jobs: int, seed: int, min_tokens: int = 8, max_tokens: int = 64, max_prompt: int = 160) -> list[Spec]:
    """`num_jobs` specs with distinct prompts; half of them greedy, half sampled with a seed of their own."""
    drawn = random.Random(seed)
    specs = []
    for index in range(num_jobs):
        prompt = tuple(drawn.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(drawn.randint(3, max_prompt)))
        parameters: dict[str, Any] = {"max_new_tokens": drawn.randint(min_tokens, max_tokens), "ignore_eos": True, "do_sample": False}
        if index % 2:
            parameters |= {"do_sample": True, "seed": drawn.getrandbits(64), "temperature": 0.9, "top_p": 0.9, "top_k": 50}
        specs.append(Spec(index=index, kind=KINDS[index // 2 % 3], prompt=prompt, parameters=parameters))
    return specs
