"""Farms in virtual time: every job ends with the tokens that its prompt asks for, whoever serves it and whatever roles do meanwhile."""

from bench.affinity_figures import Served, Turn, rows
from bench.central_router import cache_aware, least_loaded, play
from bench.conversations import make_conversations, prompt_of
from bench.planner_sim import PHASES, Phase, requests
from bench.planner_sim import play as play_planned
from bench.virtual_farm import VOCAB_SIZE, VirtualClock, VirtualJob
from bench.virtual_pd import PdFarm
from workers.mock_costs import MockCosts
from workers.mock_engine import prompt_digest, token_at

COSTS = MockCosts(prefill=4000, step_ms=10)


def is_right(job: VirtualJob) -> bool:
    return job.output == [token_at(prompt_digest(job.prompt), index, VOCAB_SIZE) for index in range(job.num_output)]


def test_a_router_that_knows_the_caches_finds_more_in_them_than_one_that_looks_at_load_alone() -> None:
    conversations = make_conversations(20, 4, num_systems=3, system_len=64, message_len=16, seed=1)
    size = {"num_workers": 4, "num_tokens": 8192, "num_output": 8}
    ways = [play(conversations, choose, **size, costs=COSTS) for choose in (cache_aware, least_loaded)]
    for jobs in ways:
        assert len(jobs) == 80 and all(map(is_right, jobs))
    informed, blind = (sum(job.cached_tokens for job in jobs) for jobs in ways)
    assert informed > 1.2 * blind


def test_the_next_turns_prompt_is_the_last_ones_with_the_answer_and_the_new_message_behind_it() -> None:
    talk = make_conversations(1, 3, seed=2)[0]
    first, second = prompt_of(talk, []), prompt_of(talk, [[7, 8]])
    assert second == [*first, 7, 8, *talk.messages[1]]


def test_jobs_of_a_farm_with_roles_apart_end_right_though_workers_change_their_roles() -> None:
    clock, ended = VirtualClock(), list[VirtualJob]()
    farm = PdFarm(clock, COSTS, {"a": "prefill", "b": "prefill", "c": "decode", "d": "decode"}, ended.append, num_tokens=4096)
    jobs = [VirtualJob(job_id=str(n), prompt=list(range(n + 1, n + 200)), num_output=20, sent_s=n * 0.02) for n in range(100)]
    for job in jobs:
        clock.call_at(job.sent_s, lambda job=job: farm.send(job))
    clock.call_at(0.5, lambda: farm.workers[0].switch("decode"))
    clock.call_at(1.0, lambda: farm.workers[3].switch("prefill"))
    clock.run()
    assert len(ended) == 100 and all(map(is_right, jobs))
    assert [worker.role for worker in farm.workers] == ["decode", "prefill", "decode", "prefill"]
    assert not any(worker.jobs or worker.imports for worker in farm.workers)
    for worker in farm.workers:
        worker._engine.scheduler.check_integrity()


def test_the_planner_brings_a_farm_with_too_little_prefill_back_inside() -> None:
    phase = Phase(name="long prompts", seconds=100, rate=5.0, prompt_tokens=4000, output_tokens=5)
    fixed, planned = (play_planned("", requests([phase], 0), num_prefill=2, num_decode=3, with_planner=flag) for flag in (False, True))
    assert planned.moves and {role for _, _, role, _ in planned.moves} == {"prefill"}
    assert len(planned.jobs) == len(fixed.jobs)
    assert planned.jobs[-1].first_token_s - planned.jobs[-1].sent_s < fixed.jobs[-1].first_token_s - fixed.jobs[-1].sent_s


def test_phases_follow_one_another_by_degrees() -> None:
    jobs = requests(PHASES[:2], 1)
    assert max(job.sent_s for job in jobs) < 910
    late = [len(job.prompt) for job in jobs if job.sent_s > 400]
    assert min(late) >= 2500


def test_figures_of_conversations_compare_ways_by_hits_first_tokens_and_shares() -> None:
    def served(name: str, cached: int, workers: str) -> Served:
        return Served(name=name, num_workers=2, turns=[
            Turn(index=n, prompt_tokens=100, cached_tokens=cached, output_tokens=0, ttft_s=0.2 - cached / 1000, worker=worker)
            for n, worker in enumerate(workers)])

    found = {row.name: row for row in rows(served("off", 20, "abab"), served("on", 80, "aaab"), served("central", 82, "abab"))}
    assert found["prefix hit rate, affinity on"].is_met
    assert found["first token p50, affinity on"].is_met
    assert found["busiest worker over the mean, affinity on"].figure == 1.5
