"""The host's part of a decode step, without a device: `python -m bench.host_rounds [--sizes 1 64 256]`.

One round is what the engine's loop does for a step: schedule, batch, advance, complete, and encode the events. Sequences end and begin as
they would, and the rounds in which one begins are told apart.
"""

import argparse
import statistics
import time
from collections import deque
from collections.abc import Sequence as Seq

from coordinator.sampling import SamplingParams
from workers.engine_messages import Tokens, encode
from workers.scheduler import Scheduler
from workers.sequence import Sequence
from workers.step import SchedulerSettings, Step

PAGE_SIZE, NUM_PAGES, DEPTH = 64, 32768, 2
PROMPT_LEN, OUTPUT_LEN = 1024, 256


class Host:
    """So many sequences decoding at any time; one that ends is followed by another."""

    def __init__(self, num_seqs: int) -> None:
        self.scheduler = Scheduler(SchedulerSettings(num_pages=NUM_PAGES, page_size=PAGE_SIZE, chunk_size=8192, max_num_seqs=num_seqs,
                                                     max_batch_tokens=8192 + num_seqs, depth=DEPTH))
        self._flights: deque[Step] = deque()
        self._num_made = 0
        for i in range(num_seqs):
            self._add(1 + OUTPUT_LEN * (i + 1) // num_seqs)  # ends are spread evenly

    def _add(self, max_new_tokens: int) -> None:
        self._num_made += 1
        ids = [(self._num_made * 7919 + i) % 32000 for i in range(PROMPT_LEN)]
        params = SamplingParams(do_sample=True, seed=1, max_new_tokens=max_new_tokens)
        self.scheduler.add(Sequence(job_id=f"5f0c7a52-{self._num_made:028d}", token_ids=ids, num_prompt=PROMPT_LEN, params=params,
                                    max_kv_tokens=PROMPT_LEN + max_new_tokens - 1))

    def round(self) -> tuple[float, bool]:
        """Milliseconds, and whether it was decodes only."""
        started = time.perf_counter()
        scheduler = self.scheduler
        step = scheduler.schedule()
        num_ended = 0
        if step.chunks:
            scheduler.batch(step)
            scheduler.advance(step)
            self._flights.append(step)
        if self._flights and (len(self._flights) >= DEPTH or not step.chunks):
            oldest = self._flights.popleft()
            size = len(oldest.sampled)
            for event in scheduler.complete(oldest, range(5, 5 + size), [-1.25] * size):
                encode(event)
                num_ended += sum(row.finish is not None for row in event.rows) if isinstance(event, Tokens) else 0
        took = 1000 * (time.perf_counter() - started)
        for _ in range(num_ended):
            self._add(OUTPUT_LEN)
        return took, len(step.sampled) == len(step.chunks) == step.num_tokens


def main(argv: Seq[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_rounds", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 64, 256], help="sequences that decode side by side")
    parser.add_argument("--rounds", type=int, default=2000)
    arguments = parser.parse_args(argv)
    print("sequences   decode round: median     p99     with admissions: median    (ms)")
    for size in arguments.sizes:
        host = Host(size)
        for _ in range(size + 20):
            host.round()
        rounds = [host.round() for _ in range(arguments.rounds)]
        decodes = sorted(took for took, is_decode in rounds if is_decode)
        mixed = [took for took, is_decode in rounds if not is_decode]
        print(f"{size:9d}   {statistics.median(decodes):20.3f} {decodes[len(decodes) * 99 // 100]:7.3f}     "
              f"{statistics.median(mixed) if mixed else 0:23.3f}")


if __name__ == "__main__":
    main()
