"""Turns of conversations, as they were served: what was found cached, how long the first token took, who did how much. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report import Row
from bench.summary import percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """`ttft_s`: from its submission to its first token at the producer; `worker`: who prefilled it."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float
    worker: str

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """All turns of one way to route."""

    name: str
    turns: Sequence[Turn]
    num_workers: int

    @property
    def hit_rate(self) -> float:
        return sum(turn.cached_tokens for turn in self.turns) / sum(turn.prompt_tokens for turn in self.turns)

    @property
    def ttfts_ms(self) -> list[float]:
        return [1000 * turn.ttft_s for turn in self.turns]

    def share(self) -> list[float]:
        """Each worker's tokens computed, as a multiple of the mean; most first, those that did nothing last."""
        done: Counter[str] = Counter()
        for turn in self.turns:
            done[turn.worker] += turn.computed_tokens
        mean = sum(done.values()) / self.num_workers
        return sorted((tokens / mean for tokens in done.values()), reverse=True) + [0.0] * (self.num_workers - len(done))


def rows(off: Served, on: Served, central: Served) -> list[Row]:
    return [
        Row(name="prefix hit rate, affinity on", figure=100 * on.hit_rate, bar=95 * central.hit_rate, unit="%", higher_is_better=True,
            note=f"off {100 * off.hit_rate:.1f} %; bar: 95 % of the {100 * central.hit_rate:.1f} % of a central router, simulated"),
        Row(name="first token p50, affinity on", figure=percentile(on.ttfts_ms, 50), bar=percentile(off.ttfts_ms, 50), unit="ms",
            higher_is_better=False, note=f"bar: affinity off; central, simulated {percentile(central.ttfts_ms, 50):.0f} ms"),
        Row(name="first token mean, affinity on", figure=_mean(on.ttfts_ms), bar=_mean(off.ttfts_ms), unit="ms", higher_is_better=False,
            note=f"bar: affinity off; central, simulated {_mean(central.ttfts_ms):.0f} ms"),
        Row(name="first token p99, affinity on", figure=percentile(on.ttfts_ms, 99), bar=percentile(off.ttfts_ms, 99), unit="ms",
            higher_is_better=False, note=f"bar: affinity off; central, simulated {percentile(central.ttfts_ms, 99):.0f} ms"),
        Row(name="busiest worker over the mean, affinity on", figure=on.share()[0], bar=1.3, unit="×", higher_is_better=False,
            note=f"tokens computed; off {off.share()[0]:.2f}, central {central.share()[0]:.2f}; the idlest has {on.share()[-1]:.2f}"),
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def by_turn(served: Served) -> Mapping[int, float]:
    """Hit rate of the first, second, … turns."""
    found: dict[int, list[Turn]] = {}
    for turn in served.turns:
        found.setdefault(turn.index, []).append(turn)
    return {index: sum(t.cached_tokens for t in turns) / sum(t.prompt_tokens for t in turns) for index, turns in sorted(found.items())}
