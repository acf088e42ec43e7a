"""The planner at work: looks at the farm every two seconds, says what it would change, and in mode `act` gives the order.

One process leads per model (a soft lock: two that lead for a moment order the same thing). What it sees and has decided stands in Redis:

    {tokenmill}:planner:<model>       string  JSON: mode, leader, snapshot, proposal; gone a minute after the last look
    {tokenmill}:planner_log:<model>   list    JSON of its last decisions, newest first
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

from coordinator import orders, queue_age
from coordinator.bus import Bus
from coordinator.errors import TokenmillError
from coordinator.members import members
from coordinator.planner import Hysteresis, Objectives, Proposal, Snapshot, WorkerLoad, propose
from coordinator.store import Store, WorkerView
from coordinator.tasks import end

log = logging.getLogger(__name__)

PERIOD_S, LEADER_S = 2.0, 6.0
NUM_REMEMBERED = 50

Mode = Literal["off", "advise", "act"]


class Planning:
    """Runs in config servers, and in a pd_master that keeps its own queue."""

    def __init__(self, bus: Bus, store: Store, name: str, mode: Mode, objectives: Objectives,
                 hysteresis: Callable[[], Hysteresis] = Hysteresis) -> None:
        self._bus, self._store, self._name, self._mode, self._objectives = bus, store, name, mode, objectives
        self._new_hysteresis = hysteresis
        self._hysteresis: dict[str, Hysteresis] = {}
        self._last_said: dict[str, tuple[str, str, str]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._mode != "off":
            self._task = asyncio.create_task(self._plan_forever(), name="planner")

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])

    async def _plan_forever(self) -> None:
        while True:
            try:
                for model in sorted({str(view.info["model"]) for view in await self._store.workers() if view.is_alive}):
                    if await self._store.lead(f"planner:{model}", self._name, LEADER_S):
                        await self.look(model)
            except TokenmillError as error:
                log.warning("planner: %s", error)
            await asyncio.sleep(PERIOD_S)

    async def look(self, model: str) -> Proposal:
        """One look at one model; carries out what it decides if it may. Raises Unavailable."""
        snapshot = await take_snapshot(self._bus, self._store, model)
        proposal = propose(snapshot, self._objectives)
        is_due = self._hysteresis.setdefault(model, self._new_hysteresis()).passes(proposal, time.monotonic())
        decision = await self._decide(model, proposal) if is_due else self._advice(model, proposal)
        note = {"mode": self._mode, "leader": self._name, "at_s": time.time(), "objectives": asdict(self._objectives),
                "snapshot": asdict(snapshot), "proposal": asdict(proposal)}
        entry = {"at_s": time.time(), "done": decision, **asdict(proposal)} if decision else None
        await self._store.script("planner_note", [f"planner:{model}", f"planner_log:{model}"], json.dumps(note),
                                 json.dumps(entry) if entry else "", NUM_REMEMBERED)
        return proposal

    async def _decide(self, model: str, proposal: Proposal) -> str:
        if self._mode != "act":
            done = "advised"
        else:
            try:
                done = await orders.give(self._bus, proposal.worker, orders.Order(kind="set_role", role=proposal.role))
            except TokenmillError as error:
                done = f"failed: {error}"
        log.warning("planner of %s: %s to %s (%s): %s", model, proposal.worker, proposal.role, proposal.reason, done)
        return done

    def _advice(self, model: str, proposal: Proposal) -> str:
        """That a role wants one worker more is said once, not every two seconds."""
        said = (proposal.kind, proposal.role, "")
        if proposal.kind != "grow" or self._last_said.get(model) == said:
            if proposal.kind == "none":
                self._last_said.pop(model, None)
            return ""
        self._last_said[model] = said
        log.warning("planner of %s: one more %s worker is wanted (%s)", model, proposal.role, proposal.reason)
        return "advised"


async def take_snapshot(bus: Bus, store: Store, model: str) -> Snapshot:
    """What the planner looks at. Workers that are draining count for nothing. Raises Unavailable."""
    views = [view for view in await store.workers(model) if view.is_alive and view.info.get("state", "serving") == "serving"]
    doors = [view.info for view in await members(store) if view.is_alive and view.info.get("model") == model]
    hosts = {str(view.info["host"]) for view in views if view.role == "decode" and view.info.get("host")}
    lanes = {str(lane) for view in views for lane in view.info.get("lanes", ())}
    jobs_age, handoff_age = await asyncio.gather(queue_age.jobs_age_s(bus, model, lanes), queue_age.handoff_age_s(bus, model, hosts))
    return Snapshot(workers=tuple(_load(view) for view in views), queue_age_s=jobs_age, handoff_age_s=handoff_age,
                    ttft_s=max((float(info.get("ttft_p90_s", 0.0)) for info in doors), default=0.0),
                    tpot_s=max((float(info.get("tpot_p90_s", 0.0)) for info in doors), default=0.0))


async def planner_said(store: Store, model: str) -> dict[str, Any]:
    """For status: the last look and the decisions, newest first; {} when no planner runs."""
    look, *decisions = await store.script("planner_said", [f"planner:{model}", f"planner_log:{model}"])
    if not look and not decisions:
        return {}
    return {**(json.loads(look) if look else {"mode": "off"}), "decisions": [json.loads(entry) for entry in decisions]}


def _load(view: WorkerView) -> WorkerLoad:
    stats, total = view.stats, int(view.info.get("max_total_tokens", 0))
    return WorkerLoad(worker=view.worker, role=view.role, num_running=int(stats.get("running", 0)),
                      pool_used=max(0.0, 1.0 - int(stats.get("free_tokens", 0)) / total) if total else 0.0,
                      step_s=float(view.info.get("step_s", 0.0)))
