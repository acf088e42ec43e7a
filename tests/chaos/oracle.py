"""Judge what a scenario left behind: what clients saw, what RESULTS holds, what stands on the chains, what is still held."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.messages import FinalRecord, TokenRun, unpack_ids
from tests.chaos.answer import Answer


@dataclass(slots=True)
class Verdict:
    """Counts that must all be 0, with one line of detail each."""

    num_jobs: int = 0
    num_lost: int = 0                # accepted, without an end or without a final record
    num_duplicated_tokens: int = 0   # seen twice by a client, or stored twice
    num_gaps: int = 0                # an index that was skipped
    num_different: int = 0           # tokens or text unlike the undisturbed run
    num_extra_records: int = 0       # final records beyond the one
    details: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        counts = (self.num_lost, self.num_duplicated_tokens, self.num_gaps, self.num_different, self.num_extra_records)
        return not any(counts) and not self.details


async def judge(bus: Bus, answers: Sequence[Answer], expected: dict[int, tuple[int, ...]], after_seq: int = 0) -> Verdict:
    """`expected`: spec index -> tokens of the undisturbed run. OUT is read from behind `after_seq`."""
    verdict = Verdict(num_jobs=len(answers))
    records, num_records = await _records(bus)
    chains = await stored_runs(bus, after_seq)
    for answer in answers:
        _judge_answer(verdict, answer, expected.get(answer.spec.index), records.get(answer.job_id))
    for job_id in records:
        if (extra := num_records[job_id] - 1) > 0:
            verdict.num_extra_records += extra
            verdict.details.append(f"{job_id}: {extra + 1} final records")
    for job_id, runs in chains.items():
        _judge_chains(verdict, job_id, runs, records.get(job_id))
    return verdict


def _judge_answer(verdict: Verdict, answer: Answer, expected: tuple[int, ...] | None, record: FinalRecord | None) -> None:
    name = f"{answer.job_id} ({answer.spec.kind} {answer.spec.index}, {answer.num_retries} retries)"
    for violation in answer.violations:
        verdict.num_duplicated_tokens += violation.startswith("token ")
        verdict.details.append(f"{name}: {violation}")
    if answer.reason != "length":
        verdict.num_lost += 1
        verdict.details.append(f"{name}: ended as {answer.reason!r} after {len(answer.token_ids)} of {answer.spec.num_tokens} tokens")
    elif expected is not None and tuple(answer.token_ids) != expected:
        verdict.num_different += 1
        at = next((i for i, (a, b) in enumerate(zip(answer.token_ids, expected, strict=False)) if a != b), "the end")
        verdict.details.append(f"{name}: differs from the undisturbed run at token {at} of {len(expected)}")
    if record is None:
        verdict.num_lost += 1
        verdict.details.append(f"{name}: no final record")
    elif unpack_ids(record.token_ids) != answer.token_ids or list(record.texts) != answer.texts or record.reason != answer.reason:
        verdict.num_different += 1
        verdict.details.append(f"{name}: its final record ({record.reason}) is not what its client saw ({answer.reason})")


def _judge_chains(verdict: Verdict, job_id: str, runs: list[tuple[str, TokenRun]], record: FinalRecord | None) -> None:
    """Over all chains together every index stands once, without a hole, and one run ends the job."""
    indices = sorted(index for _, run in runs for index in range(run.first_index, run.first_index + len(run.token_ids)))
    repeated = len(indices) - len(set(indices))
    holes = len(set(range(len(indices) - repeated)) - set(indices))
    num_ends = sum(run.finish is not None for _, run in runs)
    if repeated or holes or num_ends != 1:
        verdict.num_duplicated_tokens += repeated
        verdict.num_gaps += holes
        where = [(subject, run.epoch, run.first_index, len(run.token_ids), run.finish and run.finish.reason) for subject, run in runs]
        verdict.details.append(f"{job_id}: on its chains {repeated} tokens twice, {holes} missing, {num_ends} ends: {where}")
    if record is None:
        verdict.num_lost += 1
        verdict.details.append(f"{job_id}: frames, but no final record")


async def stored_runs(bus: Bus, after_seq: int = 0) -> dict[str, list[tuple[str, TokenRun]]]:
    """job id -> (chain, run) in stored order. Raises AssertionError if a frame stands behind its chain's tombstone."""
    runs: defaultdict[str, list[tuple[str, TokenRun]]] = defaultdict(list)
    fenced: dict[str, int] = {}
    for subject, seq, frame in await bus.read_chain("out.>", start_seq=after_seq + 1):
        if frame.tombstone:
            fenced[subject] = seq
            continue
        assert subject not in fenced, f"{subject}: frame {seq} stands behind the tombstone at {fenced[subject]}"
        for run in frame.runs:
            runs[run.job_id].append((subject, run))
    return runs


async def _records(bus: Bus) -> tuple[dict[str, FinalRecord], Counter[str]]:
    records: dict[str, FinalRecord] = {}
    counted: Counter[str] = Counter()
    for message in await bus.read_stream(subjects.RESULTS, "results.>"):
        record = FinalRecord.decode(message.data)
        records[record.job_id] = record
        counted[record.job_id] += 1
    return records, counted


async def last_out_seq(bus: Bus) -> int:
    """Where OUT ends now."""
    info = await bus.api(f"STREAM.INFO.{subjects.OUT}")
    return int(info["state"]["last_seq"])
