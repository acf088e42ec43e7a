"""Every shim looks for batches that nobody leads and leads some of them: so one that was begun goes on, whichever shim dies.

Redis says who leads, for one lease at a time. A batch that Redis has lost is begun again from its blobs: what was answered stands there.
"""

import asyncio
import logging
import time

import orjson

from coordinator.batch_store import LEADER_S, BatchStore
from coordinator.errors import Unavailable
from coordinator.messages import check_id
from coordinator.tasks import end
from producers.batch_answers import Desk
from producers.batch_endpoints import Endpoints
from producers.batch_files import Files
from producers.batch_jobs import BatchJobs
from producers.batch_lines import part_prefix
from producers.batch_run import BatchRun, LostLead
from producers.batches import WINDOW_S, Asked, Batch, asked_name, done_name, new_batch_id
from producers.file_store import FileStore, NoBlob, once, whole
from producers.shim import Shim

log = logging.getLogger(__name__)

LOOK_S = 0.5
ADOPT_S = 5.0
MAX_RUNS = 4                # batches that one shim leads at once
RETRY_S = 5.0               # before a batch whose leading failed is led again here


class BatchRunner:
    """One per shim."""

    def __init__(self, shim: Shim, store: FileStore, window: int) -> None:
        assert shim.client.store is not None
        self._shim = shim
        self._store = shim.client.store
        self.files = Files(store)
        self.batches = BatchStore(shim.client.store)
        self._desk = Desk(shim=shim, endpoints=Endpoints(shim), files=self.files, batches=self.batches, window=asyncio.Semaphore(window))
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        self._next_adoption_s = 0.0
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._looking = asyncio.create_task(self._look_forever(), name="batches")

    async def close(self) -> None:
        """Let go of what is led here: another shim goes on at once."""
        await end([*self._runs.values(), *([self._looking] if self._looking else [])])

    async def create(self, asked: Asked, idempotency_key: str = "") -> Batch:
        """The batch; with a key that was used before, the batch of that time. Raises Unavailable."""
        batch_id = new_batch_id(idempotency_key)
        created_ms = int(time.time() * 1000)
        await self.files.store.put(asked_name(batch_id), once(orjson.dumps({"created_ms": created_ms, **asked.to_record()})))
        await self.batches.create(batch_id, asked.to_record(), WINDOW_S, created_ms)
        batch = await self.find(batch_id)
        assert batch is not None
        return batch

    async def find(self, batch_id: str) -> Batch | None:
        """Raises InvalidField, Unavailable."""
        record = await self.batches.get(check_id("batch_id", batch_id))
        if "status" not in record:
            try:
                record = orjson.loads(await whole(self.files.store, done_name(batch_id)))
            except NoBlob:
                return None
        return Batch.from_record(record)

    async def _look_forever(self) -> None:
        while True:
            try:
                await self._look()
            except Unavailable as error:
                log.warning("batches: %s", error)
            except Exception:
                log.exception("batches: looking for work failed")
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        if time.monotonic() >= self._next_adoption_s:
            self._next_adoption_s = time.monotonic() + ADOPT_S
            await self._adopt()
        for batch_id in await self.batches.open_ids():
            if len(self._runs) >= MAX_RUNS:
                return
            if batch_id not in self._runs and time.monotonic() >= self._not_before.get(batch_id, 0.0):
                await self._lead(batch_id)

    async def _lead(self, batch_id: str) -> None:
        if await self.files.store.size(asked_name(batch_id)) is None:
            return  # it lies in another shim's store
        epoch = await self.batches.lead(batch_id, self._shim.client.origin, LEADER_S)
        if epoch:
            self._runs[batch_id] = asyncio.create_task(self._run(batch_id, epoch), name=batch_id)

    async def _run(self, batch_id: str, epoch: int) -> None:
        client = self._shim.client
        assert client.open_work is not None
        self._not_before[batch_id] = time.monotonic() + RETRY_S
        try:
            batch = await self.find(batch_id)
            if batch is not None:
                log.info("batch %s: led here under epoch %d, %s", batch_id, epoch, batch.status)
                jobs = BatchJobs(client.bus, self._store, client.open_work, batch_id)
                await BatchRun(self._desk, batch, epoch, jobs).run()
            del self._not_before[batch_id]
        except LostLead:
            log.warning("batch %s is led by another shim now", batch_id)
        except Unavailable as error:
            log.warning("batch %s: %s", batch_id, error)
        except Exception:
            log.exception("batch %s: leading it failed", batch_id)
        finally:
            del self._runs[batch_id]
            await self._leave(batch_id, epoch)

    async def _leave(self, batch_id: str, epoch: int) -> None:
        try:
            await self.batches.leave(batch_id, epoch)
        except Unavailable as error:
            log.warning("batch %s stays ours for a lease: %s", batch_id, error)

    async def _adopt(self) -> None:
        """Begin again what Redis has lost; sweep away what a leader left that died at the very end."""
        names = set(await self.files.store.names("batch_"))
        for batch_id in (name.removesuffix(asked_name("")) for name in names if name.endswith(asked_name(""))):
            if done_name(batch_id) in names:
                for part in (name for name in names if name.startswith(part_prefix(batch_id))):
                    await self.files.store.delete(part)
            elif "status" not in await self.batches.get(batch_id):
                await self._begin_again(batch_id)

    async def _begin_again(self, batch_id: str) -> None:
        asked = orjson.loads(await whole(self.files.store, asked_name(batch_id)))
        created_ms = asked.pop("created_ms")
        if await self.batches.create(batch_id, {**asked, "is_adopted": "1"}, WINDOW_S, created_ms):
            log.warning("batch %s was not known to Redis: begun again", batch_id)
