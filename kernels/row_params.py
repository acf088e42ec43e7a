"""How one sequence's sampling parameters travel to the device: a line of 8-byte words, integers and doubles mixed.

Packing is cheap enough to be done for every step, and one copy takes a whole batch across.
"""

import struct
from dataclasses import dataclass
from math import e, log, log2

import triton
import triton.language as tl

# Places of the words. The last four are the batch's business, not the sequence's: see `DeviceSampler`.
IS_SAMPLED = tl.constexpr(0)
SEED = tl.constexpr(1)
TOP_K = tl.constexpr(2)         # 0: off
LIMIT = tl.constexpr(3)         # depth (see `token_filters`) that min_p allows
TOP_P = tl.constexpr(4)         # double; 1.0: off
SCALE = tl.constexpr(5)         # double; turns differences of logits into halvings of probability
IS_ADJUSTED = tl.constexpr(6)
REPETITION = tl.constexpr(7)    # double, and so are the next two
FREQUENCY = tl.constexpr(8)
PRESENCE = tl.constexpr(9)
DECAY_START = tl.constexpr(10)
DECAY_LOG = tl.constexpr(11)    # double; 0.0: off
MIN_TOKENS = tl.constexpr(12)
INDEX = tl.constexpr(13)        # of the output token to draw
COUNT_ROW = tl.constexpr(14)    # -1: its tokens are not counted
ALLOWED_START = tl.constexpr(15)  # word, from the start of the table
NUM_ALLOWED = tl.constexpr(16)  # 0: all
WORDS = tl.constexpr(17)

FIXED_ONE = 1 << 23             # depths are compared in units of 2**-23: finer than float32 tells probabilities apart
DEEPEST = 128 * FIXED_ONE       # 2**-128 of the largest probability: nothing
MOST_ALLOWED = 256

_LAYOUT = struct.Struct("<qQqqddqdddqdqqqqq")
_LARGEST_TEMPERATURE = 1e30     # flat already; keeps the scale a normal float32


@dataclass(frozen=True, slots=True, kw_only=True)
class RowParams:
    """What the kernels know of `SamplingParams`; the defaults do nothing."""

    is_sampled: bool = False
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    is_adjusted: bool = False
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    decay_start: int = 0
    decay_factor: float = 1.0
    min_tokens: int = 0          # EOS is masked for output indexes below min_tokens - 1

    def pack(self) -> bytes:
        """The words, those of the batch for a sequence at its start without counts and limits of vocabulary."""
        limit = DEEPEST if self.min_p <= 0.0 else min(int(-log2(self.min_p) * FIXED_ONE), DEEPEST)
        scale = log2(e) / min(self.temperature, _LARGEST_TEMPERATURE) if self.is_sampled else 1.0
        return _LAYOUT.pack(self.is_sampled, self.seed, self.top_k, limit, self.top_p, scale, self.is_adjusted, self.repetition_penalty,
                            self.frequency_penalty, self.presence_penalty, self.decay_start, log(self.decay_factor), self.min_tokens,
                            0, -1, 0, 0)


assert _LAYOUT.size == WORDS.value * 8


@triton.jit
def number(words, row, WORD: tl.constexpr):
    """An integer of a row, int64."""
    return tl.load(words + row * WORDS + WORD)


@triton.jit
def real(words, row, WORD: tl.constexpr):
    """A double of a row."""
    return tl.load(words + row * WORDS + WORD).to(tl.float64, bitcast=True)
