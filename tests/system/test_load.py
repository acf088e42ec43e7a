"""Two hundred clients at once on a disaggregated farm: every stream whole, the work spread, nothing left held."""

import pytest

from bench.closed_loop import run_closed_loop
from bench.http_stream import Target
from bench.streams import APIS
from bench.workload import make_workload
from coordinator import subjects
from coordinator.bus import Bus
from coordinator.messages import FinalRecord
from tests.system.conftest import PD
from tests.system.farm import Farm

pytestmark = [pytest.mark.system, pytest.mark.services]

NUM_CLIENTS = 200


async def test_two_hundred_streams_at_once_are_all_valid_and_leave_nothing_held(farm: Farm) -> None:
    items = make_workload(NUM_CLIENTS, 48, 16, 512, seed=1)
    target = Target.parse(f"{farm.url(PD)}/generate_stream")
    async with await Bus.connect(farm.services.nats_url, "test") as bus:
        before = {m.subject for m in await bus.read_stream(subjects.RESULTS, "results.>")}
        run = await run_closed_loop(target, APIS["lightllm"], items, model=PD, num_clients=NUM_CLIENTS, timeout_s=240.0,
                                    on_outcome=lambda outcome: None)
        assert [outcome for outcome in run.outcomes if not outcome.is_valid] == []
        await farm.wait_at_rest(model=PD)
        after = await bus.read_stream(subjects.RESULTS, "results.>")
    records = [FinalRecord.decode(message.data) for message in after if message.subject not in before]
    assert len(records) == NUM_CLIENTS
    several = [record for record in records if len(record.texts) > 1]
    assert len(several) > NUM_CLIENTS / 2
    for record in several:
        assert [owner.partition(".")[0] for owner in record.workers] == ["prefill-1", "decode-1"]
