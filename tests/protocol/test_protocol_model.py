"""The protocol of docs/protocol.md holds in every state of small settings and in long walks of large ones; each rule is needed.

Larger settings: `python tests/protocol/explore.py --help`.
"""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.protocol.explore import WORK, explore, walk
from tests.protocol.model import SWITCHES, Faults, Setting, State, has_fresh_worker, is_clean, start, steps, wrong

# ---- every state of small settings ----

HOLDS = {
    "workers die, pause and get messages twice": Setting(workers=3, faults=Faults(crash=1, lapse=1, redeliver=1)),
    "a claimant is taken from before it has fenced": Setting(workers=3, tokens=1, faults=Faults(lapse=2)),
    "jobs are handed over or put back while a worker dies": Setting(workers=3, faults=Faults(give=1, crash=1)),
    "a handle is delivered to a second decode worker": Setting(workers=3, decoders=2, faults=Faults(give=1, crash=1, redeliver=1)),
    "a handle is delivered twice while a worker pauses": Setting(workers=3, decoders=2, faults=Faults(give=1, lapse=1, redeliver=1)),
    "the broker restarts and replies of Redis are lost": Setting(workers=2, faults=Faults(give=1, lapse=1, restart=1, lost_reply=1)),
    "a job is cancelled at any stage": Setting(workers=2, faults=Faults(give=1, lapse=1, cancel=1)),
    "a job is cancelled and its owner dies": Setting(workers=3, tokens=1, faults=Faults(crash=1, cancel=1)),
    "Redis is emptied while a worker pauses": Setting(workers=3, tokens=1, faults=Faults(empty=1, lapse=1)),
    "Redis is emptied around a hand-over": Setting(workers=2, faults=Faults(empty=1, give=1)),
    "Redis is emptied twice": Setting(workers=2, faults=Faults(empty=2, lapse=1)),
    "Redis is emptied while workers register": Setting(workers=2, joins=True, tokens=1, faults=Faults(empty=1, lapse=1, crash=1)),
    "Redis comes back older while a worker pauses": Setting(workers=2, tokens=1, faults=Faults(older=1, lapse=1)),
    "Redis comes back older around a hand-over": Setting(workers=2, faults=Faults(older=1, give=1)),
    "two jobs share chains and a worker dies": Setting(workers=2, jobs=2, tokens=1, faults=Faults(crash=1)),
    "two jobs of two producers and a worker pauses": Setting(workers=2, jobs=2, tokens=1, origins=(0, 1), faults=Faults(lapse=1)),
    "two jobs share a page and chains over a hand-over": Setting(workers=2, jobs=2, decoders=1, faults=Faults(give=1)),
}


@pytest.mark.parametrize("setting", HOLDS.values(), ids=HOLDS.keys())
def test_every_state_keeps_every_rule(setting: Setting) -> None:
    report = explore(setting)
    assert not report.problem, str(report)
    assert report.num_clean > 0


# ---- what happens after a story that is too long to find by breadth ----

CLAIMED = ("0 pulls 0", "0 claims 0", "0 reads 0 of 0")
TAKEN_OVER = (*CLAIMED, "0 emits 0 of 0", "lease of 0 lapses", "redeliver job 0", "1 pulls 0", "1 claims 0", "1 fences 0 for 0",
              "1 reads 1 of 0", "1 emits 1 of 0")
HANDED_OVER = (*CLAIMED, "0 emits 0 of 0", "0 offers 0", "1 pulls a handle of 0", "1 has copied 0", "1 is told that the pin of 0 stands",
               "1 takes 0")
# Redis forgets an owner with a high epoch; the next one starts low; then Redis forgets again and both say what they own.
EPOCHS_START_AGAIN = ("0 pulls 0", "0 claims 0, reply lost", "0 claims 0", "0 reads 0 of 0", "Redis is emptied", "1 asserts", "2 asserts",
                      "grace is over without [0]", "redeliver job 0", "1 pulls 0", "1 reads the roster for 0", "1 claims 0",
                      "1 fences 0 for 0", "1 reads 0 of 0")
# A worker reads the roster, another registers and claims, Redis is about to forget it.
ROSTER_GROWS = ("0 registers", "0 announces", "Redis is emptied", "0 asserts", "grace is over", "0 pulls 0", "0 reads the roster for 0",
                "redeliver job 0", "1 registers", "1 announces", "1 pulls 0", "1 reads the roster for 0", "1 claims 0", "1 reads 0 of 0")

# A paused claimant knows too few chains: later owners wrote on one that it never heard of, and again on one that it reads.
READS_TOO_LITTLE = (*CLAIMED, "0 emits 0 of 0", "0 gives 0 up", "redeliver job 0", "0 pulls 0", "redeliver job 0", "1 pulls 0",
                    "redeliver job 0", "1 claims 0", "lease of 1 lapses", "2 pulls 0", "2 claims 0", "2 fences 1 for 0", "2 reads 1 of 0",
                    "2 emits 1 of 0", "2 gives 0 up", "0 claims 0", "0 reads 2 of 0")

STORIES = {
    "a paused claimant reads too little": (READS_TOO_LITTLE, Setting(workers=3, faults=Faults(give=2, lapse=1))),
    "taken over": (TAKEN_OVER, Setting(workers=3, faults=Faults(lapse=1, empty=1))),
    "handed over": (HANDED_OVER, Setting(workers=3, faults=Faults(give=1, crash=1, empty=1))),
    "epochs start again": (EPOCHS_START_AGAIN, Setting(workers=3, tokens=1, faults=Faults(empty=2, lapse=1, lost_reply=1))),
    "roster grows": (ROSTER_GROWS, Setting(workers=2, joins=True, tokens=1, faults=Faults(empty=2, lapse=1))),
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_every_state_after_a_long_story_keeps_every_rule(story: tuple[tuple[str, ...], Setting]) -> None:
    names, setting = story
    report = explore(setting, after=names)
    assert not report.problem, str(report)


# ---- each rule is needed ----

TOKENS, FENCED, PAGES, LOST, RECORD, STUCK = "token indices", "was fenced", "from pages", "lost", "final record", "stuck"

BROKEN = {
    "no_fence": (TOKENS, (), Setting(faults=Faults(lapse=1))),
    "forget_unfenced": (TOKENS, (), Setting(workers=3, tokens=1, faults=Faults(lapse=2))),
    "read_first": (TOKENS, (), Setting(faults=Faults(lapse=1))),
    "skip_empty_chains": (TOKENS, (), Setting(faults=Faults(lapse=1))),
    "forget_chains": (TOKENS, (), Setting(faults=Faults(give=1))),
    "fold_gaps": (RECORD, READS_TOO_LITTLE, Setting(workers=3, faults=Faults(give=2, lapse=1))),
    "fence_givers": (FENCED, (), Setting(faults=Faults(give=1))),
    "no_condemn": (FENCED, (), Setting(faults=Faults(lapse=1))),
    "ack_early": (LOST, (), Setting()),
    "ack_before_done no_watch_done": (STUCK, (), Setting(faults=Faults(crash=1))),
    "no_watch_done": (STUCK, TAKEN_OVER, Setting(workers=3, faults=Faults(lapse=1, empty=1))),
    "no_cas_take": (TOKENS, (), Setting(faults=Faults(give=1))),
    "offer_before_ack": (TOKENS, (), Setting(faults=Faults(give=1))),
    "no_confirm": (PAGES, (), Setting(faults=Faults(give=1))),
    "confirm_before_copy": (PAGES, (), Setting(faults=Faults(give=1))),
    "no_generation": (PAGES, (), Setting(jobs=2, decoders=1, faults=Faults(give=2))),
    "take_back_same_epoch": (TOKENS, (), Setting(faults=Faults(give=1))),
    "give_up_in_flight": (TOKENS, (), Setting(faults=Faults(give=1))),
    "cancel_while_offered": ("ended as", (), Setting(faults=Faults(give=1, cancel=1))),
    "cancel_skips_chain": (RECORD, (), Setting(faults=Faults(cancel=1))),
    "trust_older": (TOKENS, (), Setting(faults=Faults(older=1))),
    "no_grace": (FENCED, (), Setting(faults=Faults(empty=1))),
    "late_assert": (FENCED, (), Setting(faults=Faults(empty=1, lapse=2))),
    "no_roster": (TOKENS, (), Setting(faults=Faults(empty=1, lapse=1))),
    "sweep_lapsed": (FENCED, (), Setting(faults=Faults(empty=1, lapse=1))),
    "stale_roster": (TOKENS, ROSTER_GROWS, Setting(workers=2, joins=True, tokens=1, faults=Faults(empty=2, lapse=1))),
    "claim_before_announce": (TOKENS, (), Setting(joins=True, tokens=1, faults=Faults(empty=1, lapse=1))),
    "announce_first": (FENCED, (), Setting(joins=True, faults=Faults(empty=1))),
    "assert_offered": (FENCED, HANDED_OVER, Setting(workers=3, faults=Faults(empty=1, give=1, crash=1))),
    "keep_claiming": (TOKENS, (), Setting(tokens=1, faults=Faults(empty=1))),
    "take_unswept": (TOKENS, TAKEN_OVER, Setting(workers=3, tokens=3, faults=Faults(lapse=2, empty=1, give=1))),
    "plain_epochs": (FENCED, EPOCHS_START_AGAIN, Setting(workers=3, tokens=1, faults=Faults(empty=2, lapse=1, lost_reply=1))),
    "plain_epochs forget_loser": (TOKENS, EPOCHS_START_AGAIN, Setting(workers=3, tokens=1, faults=Faults(empty=2, lapse=1, lost_reply=1))),
}


@pytest.mark.parametrize("switches", BROKEN)
def test_a_broken_rule_does_damage(switches: str) -> None:
    damage, story, setting = BROKEN[switches]
    broken = Setting(**{**vars(setting), "broken": frozenset(switches.split())})
    report = explore(broken, after=story)
    assert damage in report.problem, str(report)
    assert report.path


def test_every_switch_is_shown_to_be_needed() -> None:
    assert {name for switches in BROKEN for name in switches.split()} == set(SWITCHES)


# ---- long walks ----

LARGE = Faults(crash=1, lapse=4, redeliver=3, restart=1, empty=2, older=1, lost_reply=2, cancel=1, give=4)


class Farm(RuleBasedStateMachine):
    """Up to five incarnations, three jobs and all faults at once; hypothesis looks for a run that breaks a rule, and shortens it."""

    setting: Setting
    state: State

    @initialize(jobs=st.integers(1, 3), decoders=st.integers(0, 2), joins=st.booleans(), shared=st.booleans())
    def begin(self, jobs: int, decoders: int, joins: bool, shared: bool) -> None:
        origins = () if shared else tuple(j % 2 for j in range(jobs))
        self.setting = Setting(workers=5, jobs=jobs, tokens=2, decoders=decoders, joins=joins, origins=origins, faults=LARGE)
        self.state = start(self.setting)

    def take(self, kinds: tuple[str, ...], pick: int) -> None:
        options = [step for step in steps(self.setting, self.state) if step.kind in kinds]
        if options:
            step = options[pick % len(options)]
            note(step.name)
            self.state = step.state

    @rule(picks=st.lists(st.integers(0, 199), min_size=1, max_size=6))
    def work_goes_on(self, picks: list[int]) -> None:
        for pick in picks:
            self.take(WORK, pick)

    @precondition(lambda self: any(self.state.left))
    @rule(pick=st.integers(0, 199))
    def something_happens(self, pick: int) -> None:
        self.take(("fault", "choice"), pick)

    @invariant()
    def no_rule_is_broken(self) -> None:
        if hasattr(self, "state"):
            assert wrong(self.setting, self.state) == ""

    def teardown(self) -> None:
        """Without further faults all that is left gets done, and nothing stays held."""
        if not hasattr(self, "state"):
            return
        for pick in range(5000):
            if is_clean(self.setting, self.state):
                return
            self.take(WORK, pick * 7919 // 13)
            assert wrong(self.setting, self.state) == ""
        assert not has_fresh_worker(self.setting, self.state), f"never finished: {self.state}"


TestFarm = Farm.TestCase
TestFarm.settings = settings(max_examples=60, stateful_step_count=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("seed", range(4))
def test_random_walks_with_all_faults_keep_every_rule(seed: int) -> None:
    generator = random.Random(seed)
    setting = Setting(workers=5, jobs=1 + seed % 3, decoders=seed % 2, joins=seed >= 2, faults=LARGE)
    for _ in range(100):
        report = walk(setting, generator.randrange, fault_share=0.2 + 0.1 * (seed % 3))
        assert not report.problem, str(report)
