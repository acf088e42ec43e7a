"""One scenario: load, a fault in the middle of it, what healed, and the verdict."""

import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from producers.client import TokenmillClient
from tests.chaos.answer import Answer
from tests.chaos.chaos_farm import SHIMS, ChaosFarm
from tests.chaos.clients import PATIENCE_S, Clients
from tests.chaos.load import Load
from tests.chaos.oracle import Verdict, judge, last_out_seq
from tests.chaos.report import Row, percentile
from tests.chaos.workload import Spec, draw
from workers.random_model import write_random_model

NUM_CLIENTS = 16
ANSWERS_TIMEOUT_S = 120.0
REST_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Strike:
    """When something was broken, and how long the fault held on (0 for a kill: the restart goes on beside the load)."""

    at: float
    held_s: float = 0.0


Fault = Callable[[ChaosFarm], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`fault` breaks something, once per share in `at` (of all jobs, when so many are answered), and sees to it that it heals."""

    name: str
    fault: Fault
    at: tuple[float, ...] = (0.25,)
    patience_s: float = PATIENCE_S      # of REST clients


class Range:
    """A farm on which scenarios run one after another, and the answers that it gave before anything was broken."""

    def __init__(self, farm: ChaosFarm, direct: TokenmillClient, specs: Sequence[Spec], num_clients: int = NUM_CLIENTS) -> None:
        self.farm = farm
        self.specs = list(specs)
        self.num_clients = num_clients
        self.expected: dict[int, tuple[int, ...]] = {}
        self.rows: list[Row] = []
        self.direct = direct
        self._usual_silence_s = 0.0

    async def undisturbed(self) -> Verdict:
        """The clean pass: what every spec must be answered with from now on."""
        answers, verdict = await self._under_load(self.specs, PATIENCE_S, [])
        self.expected = {answer.spec.index: tuple(answer.token_ids) for answer in answers}
        self._usual_silence_s = statistics.median(answer.longest_silence_s for answer in answers)
        self._report("undisturbed", answers, verdict, [])
        return verdict

    async def undisturbed_again(self) -> Verdict:
        """All specs once more, to show that the farm is well."""
        _, verdict = await self._under_load(self.specs, PATIENCE_S, [])
        return verdict

    async def run(self, scenario: Scenario) -> Verdict:
        """Load, strikes, answers, rest, verdict. Raises TimeoutError or AssertionError when answers or rest do not come."""
        strikes: list[Strike] = []

        async def strike(load: Load) -> None:
            for share in scenario.at:
                await load.until_answered(share)
                now = Strike(time.monotonic())
                strikes.append(now)
                await scenario.fault(self.farm)
                now.held_s = time.monotonic() - now.at

        answers, verdict = await self._under_load(self.specs, scenario.patience_s, [strike])
        self._report(scenario.name, answers, verdict, strikes)
        return verdict

    async def _under_load(self, specs: Sequence[Spec], patience_s: float,
                          killers: Sequence[Callable[[Load], Awaitable[None]]]) -> tuple[list[Answer], Verdict]:
        farm = self.farm
        async with farm.bus() as bus:
            after_seq = await last_out_seq(bus)
        async with Clients([farm.url(name) for name in SHIMS], self.direct, patience_s) as clients:
            load = Load(clients, specs, self.num_clients)
            load.start()
            try:
                for killer in killers:
                    await killer(load)
                answers = await load.finish(ANSWERS_TIMEOUT_S)
            except TimeoutError:
                raise AssertionError(f"{len(specs) - len(load.answers)} of {len(specs)} jobs without an end\n{farm.logs()}") from None
            finally:
                await load.cancel()
        await farm.restarted()
        await farm.wait_at_rest(REST_TIMEOUT_S)
        async with farm.bus() as bus:
            return answers, await judge(bus, answers, self.expected, after_seq)

    def _report(self, name: str, answers: Sequence[Answer], verdict: Verdict, strikes: Sequence[Strike]) -> None:
        """Recovery: the longest silence after the strike of each job that was in flight at one, less what is usual."""
        hit = [(answer, s) for s in strikes for answer in answers if answer.began_at < s.at < answer.ended_at]
        recovery = [max(0.0, answer.silence_over(s.at) - self._usual_silence_s) for answer, s in hit]
        self.rows.append(Row(
            scenario=name, jobs=len(answers), strikes=len(strikes), hit=len(hit), retries=sum(answer.num_retries for answer in answers),
            held_s=max((s.held_s for s in strikes), default=0.0), recovery_p50_s=percentile(recovery, 50),
            recovery_p99_s=percentile(recovery, 99),
            lost=verdict.num_lost, duplicated=verdict.num_duplicated_tokens, gaps=verdict.num_gaps, different=verdict.num_different,
            extra_records=verdict.num_extra_records))


@contextlib.asynccontextmanager
async def open_range(folder: Path, *, lease_s: float, num_specs: int, num_clients: int = NUM_CLIENTS, proxied: tuple[str, ...] = (),
                     max_queued: int = 10_000) -> AsyncIterator[Range]:
    """A farm of tiny random Llamas, and what it answers to `num_specs` jobs before anything is broken."""
    model_dir = write_random_model(folder / "model", "llama", seed=1)
    with ChaosFarm(folder / "farm", model_dir, lease_s=lease_s, max_queued=max_queued) as farm:
        await farm.start_all(proxied=proxied)
        try:
            async with await TokenmillClient.connect(farm.services.nats_url, farm.services.redis_url, model=farm.model,
                                                     origin="chaos") as direct:
                arena = Range(farm, direct, draw(num_specs, seed=1), num_clients)
                verdict = await arena.undisturbed()
                assert verdict.is_clean, verdict.details
                yield arena
        finally:
            await farm.close_proxies()
