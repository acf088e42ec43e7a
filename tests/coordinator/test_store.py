"""Leases and claims on a real Redis: docs/protocol.md, transition by transition."""

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio as redis

from coordinator.embedded import EmbeddedServices
from coordinator.errors import FarmMismatch, QueueFull, Unavailable
from coordinator.store import AdmissionLimits, Admitted, Claim, LeaseLapsed, OwnedJob, Store, owner_name

pytestmark = pytest.mark.services
LEASE_S = 0.4
INFO = {"role": "both", "model": "m"}


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    store = Store(redis_url, lease_s=LEASE_S)
    await store.found()
    yield store
    await store.close()


async def register(store: Store, worker: str) -> str:
    incarnation, _ = await store.register(worker, INFO)
    return owner_name(worker, incarnation)


async def claim(store: Store, owner: str, job: str = "j", seq: int = 1, **more: Any) -> Claim:
    return await store.claim(owner, job, ack=f"ack.{job}", origin="o", model="m", stream_seq=seq, **more)


async def lapse(store: Store, owner: str, *others: str) -> None:
    """Wait until this owner's lease is over by the server's clock; the others keep renewing."""
    while any(owner_name(v.worker, v.incarnation) == owner and v.is_alive for v in await store.workers()):
        for other in others:
            assert await store.renew(other, INFO) == "ok"


async def lose_everything(url: str) -> None:
    async with redis.Redis.from_url(url) as client:
        await client.flushall()


async def test_a_job_has_one_living_owner(store: Store) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    first = await claim(store, a)
    assert (first.state, first.chains, first.unfenced) == ("granted", (), ())
    assert (await claim(store, b)).state == "owned"


async def test_an_owner_whose_claim_got_no_answer_is_granted_its_job_again(store: Store) -> None:
    a = await register(store, "a")
    first, again = await claim(store, a), await claim(store, a)
    assert again.state == "granted" and again.epoch > first.epoch and again.unfenced == ()


async def test_a_lapsed_owners_job_is_taken_and_its_chain_must_be_fenced_by_whoever_claims_next(store: Store) -> None:
    a, b, c = await register(store, "a"), await register(store, "b"), await register(store, "c")
    first = await claim(store, a)
    await lapse(store, a, b, c)
    second = await claim(store, b)
    assert second.state == "granted" and second.epoch > first.epoch
    assert second.unfenced == (a,) and second.chains == (a,) and second.record.deaths == 1
    await lapse(store, b, c)  # b died before it fenced a
    third = await claim(store, c)
    assert set(third.unfenced) == {a, b} and third.record.deaths == 2
    await store.fenced("j", a)
    assert (await store.job("j"))["unfenced"] == b


async def test_an_owner_from_whom_a_job_was_taken_can_never_renew(store: Store) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    await claim(store, a)
    await lapse(store, a, b)
    await claim(store, b)
    assert await store.renew(a, INFO) == "over"


async def test_a_lease_that_lapsed_unnoticed_may_be_renewed(store: Store) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    await claim(store, a)
    await lapse(store, a, b)
    assert await store.renew(a, INFO) == "ok"
    assert (await claim(store, b)).state == "owned"


async def test_a_lapsed_worker_may_not_claim(store: Store) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    await lapse(store, a, b)
    assert (await claim(store, a)).state == "lapsed"


async def test_hand_over_is_a_compare_and_set_and_the_giver_is_not_fenced(store: Store) -> None:
    p, d, e = await register(store, "p"), await register(store, "d"), await register(store, "e")
    epoch = (await claim(store, p)).epoch
    assert await store.take("j", epoch, giver=p, taker=d) == (True, False)
    assert await store.take("j", epoch, giver=p, taker=d) == (True, False), "the retry of a take whose answer was lost"
    assert await store.take("j", epoch, giver=p, taker=e) == (False, False)
    await lapse(store, d, p, e)
    taken = await claim(store, e)
    assert taken.unfenced == (d,) and set(taken.chains) == {p, d}


async def test_a_taker_whose_lease_lapsed_leaves_the_handle_to_others(store: Store) -> None:
    p, d, e = await register(store, "p"), await register(store, "d"), await register(store, "e")
    epoch = (await claim(store, p)).epoch
    await lapse(store, d, p, e)
    with pytest.raises(LeaseLapsed):
        await store.take("j", epoch, giver=p, taker=d)
    assert await store.take("j", epoch, giver=p, taker=e) == (True, False)


async def test_taking_back_voids_the_handle_that_is_out(store: Store) -> None:
    p, d = await register(store, "p"), await register(store, "d")
    epoch = (await claim(store, p)).epoch
    back = await store.take_back(p, "j", epoch)
    assert back is not None and back > epoch
    assert await store.take("j", epoch, giver=p, taker=d) == (False, False)
    assert await store.take("j", back, giver=p, taker=d) == (True, False)
    assert await store.take_back(p, "j", back) is None


async def test_taking_back_again_after_a_lost_reply_keeps_the_job_and_voids_what_was_offered_meanwhile(store: Store) -> None:
    p, d = await register(store, "p"), await register(store, "d")
    epoch = (await claim(store, p)).epoch
    unheard = await store.take_back(p, "j", epoch)
    again = await store.take_back(p, "j", epoch)
    assert unheard is not None and again is not None and again > unheard
    assert await store.take("j", unheard, giver=p, taker=d) == (False, False)
    assert await store.give_up(p, "j", again)
    assert await store.take_back(p, "j", again) is None


async def test_a_job_given_up_is_claimed_without_fencing_the_giver(store: Store) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    epoch = (await claim(store, a)).epoch
    assert await store.give_up(a, "j", epoch)
    assert not await store.give_up(a, "j", epoch)
    second = await claim(store, b)
    assert second.state == "granted" and second.unfenced == () and second.chains == (a,)
    assert await store.renew(a, INFO) == "ok"


async def test_a_job_whose_engines_crash_is_tried_alone_and_then_found_guilty(store: Store) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    first = await claim(store, a)
    assert not first.record.is_suspect
    assert await store.give_up(a, "j", first.epoch, "crash")
    second = await claim(store, b)
    assert second.record.is_suspect and not second.record.is_guilty
    assert await store.give_up(b, "j", second.epoch, "crash"), "a crash that is not its own: it did not run alone"
    third = await claim(store, a)
    assert third.record.is_suspect and not third.record.is_guilty
    await store.put_on_trial(a, "j", third.epoch)
    assert await store.give_up(a, "j", third.epoch, "crash")
    assert (await claim(store, b)).record.is_guilty


async def test_a_job_whose_workers_vanish_is_tried_after_two_deaths_and_guilty_after_two_more(store: Store) -> None:
    reader = await register(store, "reader")
    verdicts = []
    for i in range(5):
        owner = await register(store, f"w{i}")
        held = await claim(store, owner)
        verdicts.append((held.record.is_suspect, held.record.is_guilty))
        if held.record.is_suspect:
            await store.put_on_trial(owner, "j", held.epoch)
        await lapse(store, owner, reader)
    assert verdicts == [(False, False), (False, False), (True, False), (True, False), (True, True)]


async def test_a_finished_job_is_done_for_everybody_and_owned_by_nobody(store: Store) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    await claim(store, a)
    await store.finish(a, "j")
    assert (await claim(store, b)).state == "done"
    assert [view.num_owned for view in await store.workers()] == [0, 0]
    assert not await store.cancel("j")


async def test_a_cancel_before_the_claim_reaches_the_claimant_and_the_taker(store: Store) -> None:
    p, d = await register(store, "p"), await register(store, "d")
    assert await store.cancel("j")
    assert (await claim(store, p)).is_cancelled
    epoch = (await claim(store, p, "k")).epoch
    await store.cancel("k")
    assert await store.take("k", epoch, giver=p, taker=d) == (True, True)


async def test_after_redis_was_emptied_nobody_takes_before_one_lease_and_owners_assert(store: Store, redis_url: str) -> None:
    a = await register(store, "a")
    epoch = (await claim(store, a)).epoch
    await lose_everything(redis_url)
    assert await store.renew(a, INFO) == "assert"
    b = await register(store, "b")
    assert (await claim(store, b)).state == "wait"
    owned = OwnedJob(job_id="j", epoch=epoch, ack="ack.j", origin="o", model="m", chains=(a,))
    assert await store.reassert(a, INFO, [owned]) == set()
    assert (await claim(store, b)).state == "owned"
    assert await store.take("j", epoch, giver=a, taker=b) == (False, False), "an asserted job is not handed over before a sweep"


async def test_after_the_grace_a_job_nobody_asserted_is_claimed_with_the_roster_of_this_era(store: Store, redis_url: str) -> None:
    zombie = await register(store, "zombie")
    await claim(store, zombie)
    await lose_everything(redis_url)
    b = await register(store, "b")
    asked = await claim(store, b)
    while asked.state == "wait":
        await store.renew(b, INFO)
        asked = await claim(store, b)
    assert asked.state == "need_roster"
    assert (await claim(store, b, roster=[zombie, b], roster_era="another")).state == "need_roster"
    granted = await claim(store, b, roster=[zombie, b], roster_era=asked.era)
    assert granted.state == "granted" and granted.unfenced == (zombie,) and granted.chains == (zombie,)
    assert await store.renew(zombie, INFO) == "over"
    assert await store.reassert(zombie, INFO, []) is None


async def test_a_job_younger_than_the_era_needs_neither_grace_nor_roster(store: Store, redis_url: str) -> None:
    await lose_everything(redis_url)
    _, floor_era = await store.register("a", INFO)
    b = await register(store, "b")
    await store.set_floor(floor_era, 10)
    assert (await claim(store, b, "old", seq=10)).state == "wait"
    young = await claim(store, b, "young", seq=11)
    assert young.state == "granted" and young.unfenced == ()


async def test_of_two_asserters_the_later_epoch_wins_and_the_other_is_fenced_next(store: Store, redis_url: str) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    early = (await claim(store, a)).epoch
    await lose_everything(redis_url)
    await store.renew(a, INFO)
    jobs = [OwnedJob(job_id="j", epoch=epoch, ack="ack", origin="o", model="m", chains=(o,)) for o, epoch in ((a, early), (b, early + 5))]
    assert await store.reassert(a, INFO, jobs[:1]) == set()
    assert await store.reassert(b, INFO, jobs[1:]) == set()
    assert (await store.job("j"))["owner"] == b and (await store.job("j"))["unfenced"] == a
    assert await store.reassert(a, INFO, jobs[:1]) == {"j"}


async def test_a_restarted_redis_is_a_new_era(own_services: EmbeddedServices) -> None:
    store = Store(own_services.redis_url, lease_s=30.0)
    await store.found()
    a = await register(store, "a")
    epoch = (await claim(store, a)).epoch
    own_services.restart_redis()
    deadline = time.monotonic() + 10
    state = ""
    while not state and time.monotonic() < deadline:
        try:
            state = await store.renew(a, INFO)
        except Unavailable:
            continue
    assert state == "assert"
    assert await store.reassert(a, INFO, [OwnedJob(job_id="j", epoch=epoch, ack="x", origin="o", model="m", chains=(a,))]) == set()
    await store.close()


async def test_the_watcher_sees_what_a_lapsed_owner_held_and_nothing_of_the_living(store: Store) -> None:
    a, b = await register(store, "a"), await register(store, "b")
    await claim(store, a)
    assert await store.orphans(a) == [] and not await store.bury(a)
    await lapse(store, a, b)
    assert await store.orphans(a) == [("j", "ack.j")]
    assert await store.bury(a)
    assert await store.renew(a, INFO) == "over"
    assert (await claim(store, b)).unfenced == (a,)


async def admit(store: Store, job: str, klass: str, tokens: int, tenant: str, limits: AdmissionLimits) -> int | None:
    return await store.admit(Admitted(job_id=job, origin="o", klass=klass, tenant=tenant, prompt_tokens=tokens, max_new_tokens=0), limits)


async def test_a_class_admits_tokens_up_to_its_bound_and_again_when_jobs_are_over(store: Store) -> None:
    limits = AdmissionLimits(max_class_tokens=100)
    await admit(store, "a", "normal", 60, "", limits)
    await admit(store, "a", "normal", 60, "", limits)  # the retry of the same job counts once
    with pytest.raises(QueueFull, match="class normal"):
        await admit(store, "b", "normal", 60, "", limits)
    await admit(store, "c", "batch", 60, "", limits)
    await store.finish("any.1", "a")
    await admit(store, "b", "normal", 60, "", limits)


async def test_one_job_larger_than_the_whole_bound_is_admitted_when_the_class_is_empty(store: Store) -> None:
    await admit(store, "huge", "normal", 500, "", AdmissionLimits(max_class_tokens=100))


async def test_a_tenant_is_bounded_by_jobs_by_tokens_and_by_its_share_of_a_full_class(store: Store) -> None:
    await admit(store, "1", "normal", 10, "x", AdmissionLimits(max_tenant_jobs=1))
    with pytest.raises(QueueFull, match=r"tenant x \(1 open jobs"):
        await admit(store, "2", "normal", 10, "x", AdmissionLimits(max_tenant_jobs=1))
    with pytest.raises(QueueFull, match=r"tenant x \(15 open tokens"):
        await admit(store, "2", "normal", 10, "x", AdmissionLimits(max_tenant_tokens=15))
    limits = AdmissionLimits(max_class_tokens=100)
    await admit(store, "2", "normal", 30, "x", limits)
    await admit(store, "3", "normal", 10, "y", limits)
    with pytest.raises(QueueFull, match=r"tenant x \(50 open tokens"):
        await admit(store, "4", "normal", 20, "x", limits)
    await admit(store, "5", "normal", 35, "y", limits)


async def test_admissions_whose_producer_died_are_found_and_counted_out(store: Store) -> None:
    limits = AdmissionLimits(max_class_tokens=100)
    await admit(store, "lost", "normal", 100, "", limits)
    assert await store.stale_admissions(3600) == []
    while not (stale := await store.stale_admissions(0)):
        pass
    assert stale == ["lost"]
    await store.discharge("lost")
    await admit(store, "next", "normal", 100, "", limits)


async def test_one_leads_at_a_time(store: Store) -> None:
    assert await store.lead("watch", "x", 30.0) and await store.lead("watch", "x", 30.0)
    assert not await store.lead("watch", "y", 30.0)


async def test_a_redis_that_is_not_there_is_unavailable_within_a_second() -> None:
    store = Store("redis://127.0.0.1:1")
    with pytest.raises(Unavailable):
        await store.renew("a.1", INFO)
    await store.close()


LAYOUT = {"weights": "w1", "kind": "gqa", "num_layers": 2, "row": 64, "dtype": "float32", "page_size": 16, "tp_size": 1}


def laid_out(**changes: Any) -> dict[str, Any]:
    return {**INFO, "layout": {**LAYOUT, **changes}}


async def test_a_worker_that_differs_from_the_living_ones_of_its_model_is_refused_with_both_values(store: Store) -> None:
    incarnation, _ = await store.register("a", laid_out())
    for change in ({"page_size": 32}, {"dtype": "bfloat16"}, {"weights": "w2"}, {"row": 128}):
        (field, value), = change.items()
        with pytest.raises(FarmMismatch, match=f"differs from a.{incarnation} in {field} here {value!r}, there {LAYOUT[field]!r}"):
            await store.register("b", laid_out(**change))
    await store.register("ranks", laid_out(tp_size=8))                             # how many ranks share it is each worker's own affair
    await store.register("other", {**laid_out(page_size=32), "model": "another"})
    assert sorted(view.worker for view in await store.workers()) == ["a", "other", "ranks"]


async def test_once_the_last_worker_of_a_model_is_gone_the_next_one_decides(store: Store) -> None:
    incarnation, _ = await store.register("a", laid_out())
    with pytest.raises(FarmMismatch):
        await store.register("b", laid_out(page_size=32))
    await lapse(store, owner_name("a", incarnation))
    await store.register("b", laid_out(page_size=32))
    with pytest.raises(FarmMismatch):
        await store.register("a", laid_out())


async def test_after_redis_was_restarted_nobody_differs_from_workers_that_have_not_spoken_yet(own_services: EmbeddedServices) -> None:
    store = Store(own_services.redis_url, lease_s=2.0)
    await store.found()
    incarnation, _ = await store.register("a", laid_out())
    own_services.restart_redis()
    with pytest.raises(Unavailable):
        await store.ping()                 # the old connection
    with pytest.raises(Unavailable, match="may yet say that they live"):
        await store.register("b", laid_out(page_size=32))
    await store.reassert(owner_name("a", incarnation), laid_out(), [])
    with pytest.raises(FarmMismatch):
        await store.register("b", laid_out(page_size=32))
    await store.close()
