"""Fold a job's frames into its answer: what readers were shown, each token once, in order. Pure; used by workers and producers alike."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.messages import FinalRecord, Finish, Job, TokenRun, TopLogprobs, pack_floats, pack_ids, pack_tops
from coordinator.subjects import chain_parts


@dataclass(slots=True)
class Shown:
    """The tokens of one job that are stored so far. `emitters` are the owners that wrote them, in token order."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)   # empty unless the job asked for them
    emitters: list[str] = field(default_factory=list)
    finish: Finish | None = None
    epoch: int = 0
    has_gap: bool = False       # later runs are stored, but not the next one: its frame has aged out

    def add(self, owner: str, run: TokenRun) -> bool:
        """Take what is new of `run`. False when it starts past the end: an earlier run is still missing, nothing was taken."""
        start = len(self.token_ids) - run.first_index
        if start < 0:
            return False
        is_news = start < len(run.token_ids) or (run.finish is not None and self.finish is None)
        if is_news and owner not in self.emitters:
            self.emitters.append(owner)
        self.token_ids += run.token_ids[start:]
        self.logprobs += run.logprobs[start:]
        self.texts += run.texts[start:]
        self.top_logprobs += run.top_logprobs[start:]
        self.epoch = max(self.epoch, run.epoch)
        if run.finish is not None and self.finish is None:
            self.finish = run.finish
        return True

    def record(self, job: Job) -> FinalRecord:
        """The final record; only for a job whose last run is in."""
        assert self.finish is not None
        return FinalRecord(
            job_id=job.job_id, origin=job.origin, model=job.model, reason=self.finish.reason, error=self.finish.error, epoch=self.epoch,
            prompt_tokens=self.finish.prompt_tokens, cached_tokens=self.finish.cached_tokens, token_ids=pack_ids(self.token_ids),
            logprobs=pack_floats(self.logprobs), texts=tuple(self.texts), workers=tuple(self.emitters),
            top_logprobs=pack_tops(self.top_logprobs))


def fold(runs: Iterable[tuple[str, TokenRun]]) -> Shown:
    """Runs of one job as (chain subject, run), in any order, with repeats. Stops at the first gap."""
    shown = Shown()
    for subject, run in sorted(runs, key=lambda pair: (pair[1].first_index, pair[1].finish is not None, pair[1].epoch)):
        _, worker, incarnation = chain_parts(subject)
        if not shown.add(f"{worker}.{incarnation}", run):
            shown.has_gap = True
            break
    return shown
