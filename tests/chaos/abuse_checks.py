"""The checks that the short and the long suite share, in two sizes."""

import logging
import time
from typing import Any

from coordinator.dlq_cli import replay
from coordinator.farm_access import FarmAccess
from coordinator.sampling import SamplingParams
from tests.chaos import abuse
from tests.chaos.chaos_farm import DECODES, PREFILLS, SHIMS
from tests.chaos.report import percentile
from tests.chaos.scenario import Range

STUBBORN = SamplingParams(max_new_tokens=1500, ignore_eos=True)


async def check_storm(arena: Range, *, calm_s: float, storm_s: float, num_clients: int) -> dict[str, Any]:
    """Half of all clients leave at random moments; afterwards nothing is held. Returns the figures."""
    storm = await abuse.StormClients(arena.farm, num_clients, seed=5).run(calm_s, storm_s)
    assert storm.num_aborted > 0 and storm.storm_rate > 0
    return {"tokens_per_s_calm": round(storm.calm_rate, 1), "tokens_per_s_storm": round(storm.storm_rate, 1), "aborted": storm.num_aborted,
            "ended_p50_s": round(percentile(storm.ended_after_s, 50), 3), "ended_p99_s": round(percentile(storm.ended_after_s, 99), 3)}


async def check_overload(arena: Range, *, max_queued: int, num_jobs: int, num_probes: int) -> dict[str, Any]:
    """Three times as many clients as the queue has places. All that was accepted is answered in full; the rest hears when to come back."""
    farm = arena.farm
    full = await abuse.offer(farm, max_queued - 2, num_jobs, seed=6)     # the queue full, nobody refused
    await farm.wait_at_rest()
    before = abuse.memory_mib(farm)
    over = await abuse.offer(farm, 3 * max_queued, num_jobs, seed=7)
    await farm.wait_at_rest()
    after = abuse.memory_mib(farm)
    probed = await abuse.probe_full_queue(farm, arena.direct, max_queued, num_probes)
    await farm.wait_at_rest()
    assert over.num_refused > 0 and over.num_without_retry_after == probed.num_without_retry_after == 0
    assert over.num_finished == over.num_accepted == num_jobs
    return {"accepted": over.num_accepted, "refused": over.num_refused,
            "refused_p50_ms": round(1e3 * percentile(probed.refused_after_s, 50), 1),
            "refused_p99_ms": round(1e3 * percentile(probed.refused_after_s, 99), 1),
            "refused_p99_ms_all_at_once": round(1e3 * percentile(over.refused_after_s, 99), 1),
            "first_token_p99_s": round(percentile(over.first_token_s, 99), 3),
            "first_token_p99_s_queue_full": round(percentile(full.first_token_s, 99), 3),
            "memory_growth_mib": {name: round(after[name] - before[name], 1) for name in before}}


async def check_poison(arena: Range, *, how: str) -> dict[str, Any]:
    """A job that takes each of its workers with it is withdrawn, with reason and history; others are served; a replay is served too."""
    farm, direct = arena.farm, arena.direct
    handle = await direct.submit([5, 6, 7], STUBBORN)
    began_at = time.monotonic()
    kills = {"worker killed": farm.kill, "engine killed": farm.kill_engine, "engine crashes": farm.crash_engine}
    num_killed = await abuse.kill_whoever_runs(farm, direct, handle.job_id, kills[how])
    gave_up_after_s = time.monotonic() - began_at
    result = await handle.result()
    assert result.reason == "error" and "withdrawn" in result.error
    letters = [(seq, letter) for seq, letter in await direct.bus.dlq_list(direct.model) if letter.job_id == handle.job_id]
    assert len(letters) == 1 and letters[0][1].history and "its workers ended while it ran" in letters[0][1].reason
    await farm.restarted()
    verdict = await arena.undisturbed_again()
    assert verdict.is_clean, verdict.details
    assert direct.store is not None
    again = await direct.final_record(await replay(FarmAccess(direct.bus, direct.store, direct.model), letters[0][1]), timeout_s=60.0)
    assert again.reason == "length"
    await direct.bus.dlq_delete(letters[0][0])
    return {"workers_killed": num_killed, "withdrawn_after_s": round(gave_up_after_s, 1)}


async def check_fuzz(arena: Range, num_messages: int) -> dict[str, Any]:
    """Nothing that a stranger sends ends a process, stays in a queue, or holds a page; what is refused is counted."""
    farm = arena.farm
    logging.getLogger("producers.client").setLevel(logging.CRITICAL)   # this process reads lies too, and says so for each
    pids = {name: farm.processes[name].process.pid for name in (*PREFILLS, *DECODES, *SHIMS)}
    async with farm.bus() as bus:
        async with abuse.wiretap(bus) as heard:
            verdict = await arena.undisturbed_again()
            assert verdict.is_clean, verdict.details
        refused_before = (await bus.counters(farm.model_token))["dlq"]
        sent, job_ids = await abuse.lie(farm, bus, heard, num_messages, seed=8)
        await farm.wait_at_rest(60.0)
        num_refused = (await bus.counters(farm.model_token))["dlq"] - refused_before
        num_ended = sum([await bus.get_result(job_id) is not None for job_id in job_ids])
    assert {name: farm.processes[name].process.pid for name in pids if farm.processes[name].is_running} == pids
    verdict = await arena.undisturbed_again()
    assert verdict.is_clean, verdict.details
    assert num_refused > 0
    return {"messages": dict(sent), "dead_letters": num_refused, "jobs_answered": num_ended}
