"""The control plane at size: hundreds of mock workers, several masters and coordinators, one of which is killed. `python -m bench.scale`

Every job goes the real way (JetStream, Redis, claims, chains, final records); only the model is made up. What is lost or doubled is
counted from each token of each answer and from the stream of final records.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import redis_calls
from bench.bench_process import BenchProcess, CpuTimes
from bench.machine import describe_machine
from bench.report import render_table, write_report
from bench.scale_figures import Answered, ScaleRun, rows
from coordinator import subjects
from coordinator.bus import Bus
from coordinator.embedded import EmbeddedServices
from coordinator.messages import FinalRecord
from coordinator.tokenizer import read_json

MODEL = "scale"
MODEL_DIR = Path("models/smollm2-135m-instruct")
RESULTS = Path("bench/results/scale")
SAMPLE_S = 0.5
SETTLE_S = 3.0      # from ready to the first job
READ_DEADLINE_S = 120.0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model_dir", type=Path, default=MODEL_DIR, help="for its tokenizer (default: %(default)s)")
    add("--workers", type=int, default=300, help="(default: %(default)s)")
    add("--fleets", type=int, default=2, help="processes that they share (default: %(default)s)")
    add("--masters", type=int, default=3, help="(default: %(default)s)")
    add("--through", choices=["client", "rest"], default="client", help="masters are our client, or REST shims (default: %(default)s)")
    add("--coordinators", type=int, default=3, help="(default: %(default)s)")
    add("--rate", type=float, default=500.0, help="jobs per second, all masters together (default: %(default)s)")
    add("--seconds", type=float, default=120.0, help="(default: %(default)s)")
    add("--prompt_tokens", type=int, default=64, help="(default: %(default)s)")
    add("--output_tokens", type=int, default=4, help="(default: %(default)s)")
    add("--mock_costs", default="step_ms=40", help="(default: %(default)s)")
    add("--no_kill", action="store_true", help="leave the leading coordinator alone")
    add("--verbose", action="store_true")
    add("--out", type=Path, default=RESULTS, help="writes OUT.json, .md, .png (default: %(default)s)")
    return parser.parse_args(argv)


class Scale:
    """One farm and one run."""

    def __init__(self, flags: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self._flags = flags
        self._folder = folder
        self._stack = stack
        self._processes: list[BenchProcess] = []
        self._load_before = os.getloadavg()[0]
        self._services = stack.enter_context(EmbeddedServices(folder / "state"))
        self._where = ["--nats_url", self._services.nats_url, "--redis_url", self._services.redis_url]
        self._model = ["--model_name", MODEL]
        self._model_dir = ["--model_dir", str(flags.model_dir.resolve())]

    def run(self) -> ScaleRun:
        flags, redis_url = self._flags, self._services.redis_url
        coordinators = [self._start(f"coordinator-{i}", "bench.scale_coordinator", [*self._where, "--name", f"coordinator-{i}"])
                        for i in range(flags.coordinators)]
        fleets = self._start_fleets()
        urls = self._start_shims() if flags.through == "rest" else [""] * flags.masters
        start_at = time.time() + SETTLE_S
        masters = [self._start(f"master-{i}", "bench.scale_master", self._master_args(i, url, start_at)) for i, url in enumerate(urls)]
        time.sleep(max(0.0, start_at - time.time()))
        groups = {"coordinators": coordinators, "fleets": fleets, "masters": masters,
                  "shims": [process for process in self._processes if process.name.startswith("shim")]}
        cpu = CpuTimes({name: [process.process.pid for process in processes] for name, processes in groups.items()} | {
            "nats": [self._services.nats.pid], "redis": [self._services.redis.pid]})
        calls_before, usec_before = redis_calls.calls(redis_url), redis_calls.usec(redis_url)
        killed_at = None
        give_up_at = time.monotonic() + flags.seconds * 3 + READ_DEADLINE_S
        while any(master.process.poll() is None for master in masters):
            if time.monotonic() > give_up_at:
                raise RuntimeError("the masters did not get all answers")
            if killed_at is None and not flags.no_kill and time.time() - start_at > flags.seconds / 2:
                killed_at = self._kill_leader(coordinators)
            cpu.sample()
            time.sleep(SAMPLE_S)
        if broken := [master for master in masters if master.process.returncode]:
            raise RuntimeError(f"{broken[0].name} failed:\n{broken[0].log[-3000:]}")
        calls = redis_calls.difference(calls_before, redis_calls.calls(redis_url))
        tallies = [json.loads((self._folder / f"master-{i}.json").read_text()) for i in range(len(masters))]
        return self._add_up(tallies, cpu.spent(), calls, killed_at, {
            "redis_calls": calls, "redis_busy_s": (redis_calls.usec(redis_url) - usec_before) / 1e6,
            "fleet_rss_mb": [round(fleet.rss_mb()) for fleet in fleets], "flags": {k: str(v) for k, v in vars(flags).items()}})

    def _start_fleets(self) -> list[BenchProcess]:
        flags = self._flags
        share, rest = divmod(flags.workers, flags.fleets)
        fleets = [self._start(f"fleet-{i}", "workers.mock_fleet", [
            *self._where, *self._model, *self._model_dir, "--workers", str(share + (i < rest)), "--name", f"fleet-{i}",
            "--mock_costs", flags.mock_costs, "--no_watcher"]) for i in range(flags.fleets)]
        for fleet in fleets:
            fleet.wait_for("MOCK workers ready", 120.0)
        return fleets

    def _start_shims(self) -> list[str]:
        urls = []
        for i in range(self._flags.masters):
            shim = self._start(f"shim-{i}", "producers.rest", [
                *self._where, *self._model, *self._model_dir, "--port", "0", "--log_level", "info"])
            shim.wait_for("Uvicorn running on ", 60.0)
            urls.append(shim.log.partition("Uvicorn running on ")[2].split()[0])
        return urls

    def _master_args(self, index: int, url: str, start_at: float) -> list[str]:
        flags = self._flags
        vocab_size = int(read_json(flags.model_dir / "config.json")["vocab_size"])
        given = {"rate": flags.rate / flags.masters, "seconds": flags.seconds, "start_at": start_at,
                 "prompt_tokens": flags.prompt_tokens, "output_tokens": flags.output_tokens, "vocab_size": vocab_size, "seed": index,
                 "out": self._folder / f"master-{index}.json"}
        args = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [*self._where, *self._model, *args, *(["--url", url] if url else [])]

    def _kill_leader(self, coordinators: list[BenchProcess]) -> float:
        name = redis_calls.leader(self._services.redis_url, "watcher")
        leading = next((process for process in coordinators if process.name == name), None)
        if leading is None:
            raise RuntimeError(f"the leader is {name!r}, none of the coordinators")
        leading.kill()
        return time.time()

    def _add_up(self, tallies: list[dict[str, Any]], cpu: dict[str, float], calls: dict[str, int], killed_at: float | None,
                details: dict[str, Any]) -> ScaleRun:
        flags = self._flags
        records = asyncio.run(self._records())
        claimed = {record.job_id: record.epoch / 1000 for record in records}
        jobs = [Answered(job_id=job_id, sent_s=sent, latency_s=latency, claimed_s=claimed.get(job_id))
                for tally in tallies for job_id, sent, latency in tally["answers"]]
        if not jobs:
            raise RuntimeError(f"no job was answered: {tallies[0]['failed'][:3]}")
        began, ended = min(job.sent_s for job in jobs), max(job.sent_s + job.latency_s for job in jobs)
        failed = [reason for tally in tallies for reason in tally["failed"]]
        details |= {"cpu_s": cpu, "failures": failed[:20], "masters_late_s": [tally["latest_s"] for tally in tallies]}
        return ScaleRun(
            jobs=jobs, num_sent=len(jobs) + len(failed), num_failed=len(failed), num_wrong=sum(len(tally["wrong"]) for tally in tallies),
            num_records=len(records), seconds=ended - began, wanted_rate=flags.rate, redis_commands=redis_calls.of_clients(calls),
            redis_inner=sum(calls.values()) - redis_calls.of_clients(calls), coordinator_cpu_s=cpu["coordinators"], cpu_s=cpu,
            killed_at=killed_at, load_before=self._load_before, details=details)

    async def _records(self) -> list[FinalRecord]:
        async with await Bus.connect(self._services.nats_url, "bench") as bus:
            stored = await bus.read_stream(subjects.RESULTS, "results.>", deadline_s=READ_DEADLINE_S)
        return [FinalRecord.decode(message.data) for message in stored]

    def _start(self, name: str, module: str, args: list[str]) -> BenchProcess:
        process = BenchProcess(name, module, args, self._folder)
        self._processes.append(process)
        self._stack.callback(process.close)
        return process


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a report that was written."""
    content: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return list(content["rows"])


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_arguments(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="tokenmill-scale-") as folder, ExitStack() as stack:
        run = Scale(flags, Path(folder), stack).run()
    found = rows(run)
    title = (f"{flags.workers} mock workers, {flags.masters} masters ({flags.through}), {flags.coordinators} coordinators, "
             f"{flags.rate:g} jobs/s for {flags.seconds:g} s")
    Console(width=170).print(render_table(title, found))
    if flags.verbose:
        print(run.claims_by_second())
    Console().print({name: f"{spent / run.seconds:.2f} cores" for name, spent in run.cpu_s.items()}, dict(run.details))
    found[0].samples.update(run.details)
    found[0].samples["claims_by_second"] = run.claims_by_second()
    write_report(flags.out, title, found, describe_machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
