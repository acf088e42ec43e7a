"""Conversations of many turns over shared system prompts, the same for the same seed. No clock, no socket."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

LOWEST_ID, HIGHEST_ID = 512, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """`messages` are what the user says, turn by turn; before each of them but the first the answer to the one before stands."""

    start_s: float
    system: tuple[int, ...]
    messages: tuple[tuple[int, ...], ...]
    thinks_s: tuple[float, ...]          # before each turn but the first, behind the end of the answer


def make_conversations(num: int, turns: int, *, num_systems: int = 20, system_len: int = 256, message_len: int = 64, think_s: float = 4.0,
                       spread_s: float = 40.0, seed: int = 0, zipf: float = 1.1) -> list[Conversation]:
    """Which system prompt a conversation has, and how long each message is, follows Zipf's law; starts are spread evenly at random."""
    draw = random.Random(seed)
    systems = [_tokens(draw, max(32, int(system_len * draw.uniform(0.5, 1.5)))) for _ in range(num_systems)]
    weights = [1 / (rank + 1) ** zipf for rank in range(num_systems)]
    conversations = [Conversation(
        start_s=draw.uniform(0.0, spread_s), system=draw.choices(systems, weights)[0],
        messages=tuple(_tokens(draw, _zipf_length(draw, message_len, zipf)) for _ in range(turns)),
        thinks_s=tuple(draw.expovariate(1 / think_s) for _ in range(turns - 1))) for _ in range(num)]
    return sorted(conversations, key=lambda conversation: conversation.start_s)


def prompt_of(conversation: Conversation, answers: Sequence[Sequence[int]]) -> list[int]:
    """The prompt of the turn behind these answers."""
    prompt = [*conversation.system, *conversation.messages[0]]
    for answer, message in zip(answers, conversation.messages[1:], strict=False):
        prompt += [*answer, *message]
    return prompt


def _tokens(draw: random.Random, num: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(LOWEST_ID, HIGHEST_ID), k=num))


def _zipf_length(draw: random.Random, mean: int, zipf: float) -> int:
    """Many short ones, few long ones: the mean over 16 ranks, a sixteenth of the longest for the shortest."""
    ranks = range(1, 17)
    longest = mean * len(ranks) / sum(1 / rank for rank in ranks)
    return max(4, int(longest / draw.choice(ranks)))
