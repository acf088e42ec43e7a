"""What the load clients ask for: prompts of random token ids with exact lengths, output lengths around a mean. No clock, no socket."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

LOWEST_ID, HIGHEST_ID = 512, 8192  # the seed client's range: past the special tokens, inside of every vocabulary it was used with
SHORTEST_OUTPUT = 2


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request: the prompt and exactly how many tokens the answer must have."""

    prompt_ids: tuple[int, ...]
    output_len: int


def make_workload(num: int, input_len: int, output_len: int, vocab_size: int | None = None, seed: int = 0) -> list[WorkItem]:
    """`num` requests, the same for the same arguments (so a second run against the same server meets a warm prefix cache: change the seed).

    input_len   every prompt has exactly so many ids, uniform in [512, 8192] as far as the vocabulary reaches
    output_len  lengths are Gaussian with mean and deviation output_len + 1, clipped to [2, 2 * output_len]
    """
    draw = random.Random(seed)
    low, high = id_range(vocab_size)
    lengths = [gaussian_length(draw, output_len) for _ in range(num)]
    return [WorkItem(tuple(draw.randint(low, high) for _ in range(input_len)), length) for length in lengths]


def id_range(vocab_size: int | None) -> tuple[int, int]:
    """Lowest and highest token id to draw."""
    if vocab_size is None:
        return LOWEST_ID, HIGHEST_ID
    return min(LOWEST_ID, vocab_size // 2), min(HIGHEST_ID, vocab_size - 1)


def gaussian_length(draw: random.Random, output_len: int) -> int:
    longest = max(2 * output_len, SHORTEST_OUTPUT)
    middle = (SHORTEST_OUTPUT + longest) / 2
    return min(max(round(draw.gauss(middle, middle)), SHORTEST_OUTPUT), longest)


def vocab_size_of(folder: Path) -> int:
    """The vocabulary of the model or tokenizer in `folder`: the smaller where tokenizer.json and config.json differ.

    Raises FileNotFoundError if `folder` holds neither.
    """
    sizes = []
    if (folder / "tokenizer.json").is_file():
        sizes.append(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size())
    if (folder / "config.json").is_file():
        sizes.append(int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]))
    if not sizes:
        raise FileNotFoundError(f"{folder} has neither a tokenizer.json nor a config.json")
    return min(sizes)
