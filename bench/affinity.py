"""Conversations of many turns on mock workers, with prefix affinity off and on, beside a central router. `python -m bench.affinity`

The farm is real but for the model: queue, claims, the index in Redis, stale views. The central router is simulated on the same
conversations and knows everything at once (bench/central_router.py); the farm's own policy is simulated there too, without the machine's
noise. Answers are part of the prompts that follow, as in a chat.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import uvloop
from rich.console import Console

from bench import affinity_plot
from bench.affinity_figures import Served, Turn, rows
from bench.bench_process import BenchProcess
from bench.central_router import Choose, cache_aware, play
from bench.conversations import Conversation, make_conversations, prompt_of
from bench.machine import describe_machine, machine_line
from bench.report import Row, render_table, write_report
from coordinator.embedded import EmbeddedServices
from coordinator.routing import RoutingPolicy
from coordinator.sampling import SamplingParams
from producers.client import TokenmillClient
from workers.mock_costs import MockCosts

MODEL = "chats"
MODEL_DIR = Path("models/smollm2-135m-instruct")
RESULTS = Path("bench/results/affinity")
SETTLE_S = 2.0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.affinity", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model_dir", type=Path, default=MODEL_DIR, help="for its tokenizer (default: %(default)s)")
    add("--conversations", type=int, default=200, help="(default: %(default)s)")
    add("--turns", type=int, default=8, help="(default: %(default)s)")
    add("--workers", type=int, default=8, help="(default: %(default)s)")
    add("--masters", type=int, default=2, help="producers that share the conversations, each with its router (default: %(default)s)")
    add("--max_total_token_num", type=int, default=49_152, help="tokens of each worker's pool (default: %(default)s)")
    add("--output_tokens", type=int, default=16, help="(default: %(default)s)")
    add("--think_s", type=float, default=4.0, help="mean pause of a user (default: %(default)s)")
    add("--spread_s", type=float, default=40.0, help="within which conversations begin (default: %(default)s)")
    add("--mock_costs", default="prefill=1000,step_ms=50", help="(default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS, help="writes OUT.json, .md, .png (default: %(default)s)")
    return parser.parse_args(argv)


class Chats:
    """One pass of all conversations over a farm of its own."""

    def __init__(self, flags: argparse.Namespace, conversations: Sequence[Conversation]) -> None:
        self._flags = flags
        self._conversations = conversations
        self._turns: list[Turn] = []

    def run(self, affinity: str) -> Served:
        flags = self._flags
        with tempfile.TemporaryDirectory(prefix="tokenmill-affinity-") as folder, ExitStack() as stack:
            services = stack.enter_context(EmbeddedServices(Path(folder) / "state"))
            fleet = BenchProcess("fleet", "workers.mock_fleet", [
                "--nats_url", services.nats_url, "--redis_url", services.redis_url, "--model_dir", str(flags.model_dir.resolve()),
                "--model_name", MODEL, "--workers", str(flags.workers), "--name", "w", "--mock_costs", flags.mock_costs,
                "--max_total_token_num", str(flags.max_total_token_num), "--prefix_affinity", affinity], Path(folder))
            stack.callback(fleet.close)
            fleet.wait_for("MOCK workers ready")
            time.sleep(SETTLE_S)
            policy = RoutingPolicy(prefix_affinity=affinity == "on")
            uvloop.run(self._talk(services.nats_url, services.redis_url, policy))
        return Served(name=f"affinity {affinity}", turns=self._turns, num_workers=flags.workers)

    async def _talk(self, nats_url: str, redis_url: str, policy: RoutingPolicy) -> None:
        clients = [await TokenmillClient.connect(nats_url, redis_url, model=MODEL, routing=policy) for _ in range(self._flags.masters)]
        async with asyncio.TaskGroup() as talks:
            for number, conversation in enumerate(self._conversations):
                talks.create_task(self._one(clients, number, conversation))
        for client in clients:
            if client.router is not None:
                print(f"lanes chosen: {client.router.num_by_lane}, look-ups too slow: {client.router.num_slow}", file=sys.stderr)
            await client.close()

    async def _one(self, clients: Sequence[TokenmillClient], number: int, conversation: Conversation) -> None:
        params = SamplingParams(max_new_tokens=self._flags.output_tokens, ignore_eos=True)
        answers: list[tuple[int, ...]] = []
        await asyncio.sleep(conversation.start_s)
        for index in range(len(conversation.messages)):
            if index:
                await asyncio.sleep(conversation.thinks_s[index - 1])
            client = clients[(number + index) % len(clients)]       # a chat comes in at any master
            submitted_s = time.monotonic()
            handle = await client.submit(prompt_of(conversation, answers), params)
            result = await handle.result()
            assert handle.timing is not None and handle.timing.first_token_s is not None
            record = await client.final_record(result.job_id)
            answers.append(result.token_ids)
            self._turns.append(Turn(
                index=index, prompt_tokens=result.prompt_tokens, cached_tokens=result.cached_tokens, output_tokens=len(result.token_ids),
                ttft_s=handle.timing.first_token_s - submitted_s, worker=record.workers[0].rpartition(".")[0]))


def virtual(name: str, choose: Choose | RoutingPolicy, flags: argparse.Namespace, conversations: Sequence[Conversation]) -> Served:
    jobs = play(conversations, choose, num_workers=flags.workers, num_tokens=flags.max_total_token_num,
                num_output=flags.output_tokens, costs=MockCosts.parse(flags.mock_costs))
    turns = [Turn(index=int(job.job_id.partition("-")[2]), prompt_tokens=len(job.prompt), cached_tokens=job.cached_tokens,
                  output_tokens=len(job.output), ttft_s=job.first_token_s - job.sent_s, worker=str(job.worker)) for job in jobs]
    return Served(name=name, turns=turns, num_workers=flags.workers)


def run(flags: argparse.Namespace) -> list[Row]:
    conversations = make_conversations(flags.conversations, flags.turns, think_s=flags.think_s, spread_s=flags.spread_s, seed=flags.seed)
    central = virtual("central, simulated", cache_aware, flags, conversations)
    off, on = (virtual(f"affinity {flag}, simulated", RoutingPolicy(prefix_affinity=flag == "on"), flags, conversations)
               for flag in ("off", "on"))
    ways = [Chats(flags, conversations).run("off"), Chats(flags, conversations).run("on"), central]
    found = [*rows(*ways), *(replace(row, name=f"{row.name}, simulated") for row in rows(off, on, central))]
    title = (f"{flags.conversations} conversations of {flags.turns} turns on {flags.workers} mock workers "
             f"({flags.mock_costs}; {flags.max_total_token_num} KV tokens each)")
    Console(width=170).print(render_table(title, found))
    machine = describe_machine()
    write_report(flags.out, title, found, machine)
    affinity_plot.draw(flags.out.with_suffix(".png"), f"{title}\n{machine_line(machine)}", ways)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    run(parse_arguments(sys.argv[1:] if argv is None else argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
