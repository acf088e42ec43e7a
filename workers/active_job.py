"""One job while this worker owns it: what was generated, what of it is stored, and when its text says stop. Knows no socket."""

import enum
from dataclasses import dataclass, field, replace

from coordinator.detokenizer import IncrementalDetokenizer
from coordinator.fold import Shown
from coordinator.messages import CLASSES, FinalRecord, Finish, Job, TokenRun, TopLogprobs
from coordinator.stop_strings import StopStringMatcher
from coordinator.tokenizer import Tokenizer
from workers.engine_messages import Failed, Pinned, TokenRow


class Phase(enum.Enum):
    """Where a job is in this worker. The owner in Redis is this incarnation in all of them but CLAIMING and IMPORTING."""

    CLAIMING = "claiming"      # in the engine already, so that prefill does not wait for Redis; nothing is said before the claim stands
    RUNNING = "running"        # in the engine: waiting, in prefill or in decode
    OFFERED = "offered"        # role prefill: pages pinned, a handle is out
    IMPORTING = "importing"    # role decode: pages being copied; the giver still owns the job
    FINISHING = "finishing"    # the last run is on its way to the chain, or stored and being folded
    GONE = "gone"              # finished, handed over or lost: late events are dropped


@dataclass(slots=True, eq=False)
class ActiveJob:
    """Tokens in three stages: generated (in `shown` and `pending`), sent in a frame, stored on the chain (`num_stored`)."""

    job: Job
    key: str                           # the engine's name for this life of the job: an earlier life's late events do not match it
    epoch: int
    ack_subject: str
    chains: tuple[str, ...]            # owners whose chains may hold frames of this job, ours included
    prompt_ids: list[int]
    shown: Shown
    detokenizer: IncrementalDetokenizer
    matcher: StopStringMatcher
    phase: Phase = Phase.RUNNING
    cached_tokens: int = 0
    num_stored: int = 0
    finish: Finish | None = None
    generation: int = -1               # of the pin, role prefill
    offered_pages: tuple[int, ...] = ()
    num_pinned_tokens: int = 0
    offered_at: float = 0.0            # monotonic seconds
    is_cancelled: bool = False
    has_record: bool = False           # its final record is stored
    is_swept: bool = True              # Redis knows everybody who may have emitted for it; false after it was asserted
    pending: list[TokenRun] = field(default_factory=list)
    early: list[TokenRow | Pinned | Failed] = field(default_factory=list)   # what the engine said while CLAIMING

    @property
    def is_background(self) -> bool:
        return self.job.klass == CLASSES[-1]

    @property
    def num_output(self) -> int:
        return len(self.shown.token_ids)

    def push(self, owner: str, token_id: int, logprob: float, engine_finish: str | None, top_logprobs: TopLogprobs | None = None) -> bool:
        """Add a generated token. True when it ends the job (by the engine's word, or by a stop string in the text)."""
        if engine_finish == "stop" and not self.job.params.print_eos_token and token_id in self.detokenizer.tokenizer.eos_token_ids:
            piece = ""
        else:
            piece = self.detokenizer.add(token_id)
        visible, is_matched = self.matcher.feed(piece)
        reason = "stop" if is_matched else engine_finish
        if reason is not None and not is_matched:
            tail, tail_matched = self.matcher.feed(self.detokenizer.flush())
            visible += tail
            if tail_matched:
                reason = "stop"
            else:
                visible += self.matcher.flush()
        finish = None
        if reason is not None:
            finish = self.finish = Finish(reason=reason, prompt_tokens=len(self.prompt_ids), cached_tokens=self.cached_tokens)  # type: ignore[arg-type]
        run = TokenRun(job_id=self.job.job_id, epoch=self.epoch, first_index=self.num_output, token_ids=(token_id,), logprobs=(logprob,),
                       texts=(visible,), finish=finish, top_logprobs=() if top_logprobs is None else (top_logprobs,))
        self._take(owner, run)
        return finish is not None

    def end(self, owner: str, reason: str, error: str = "") -> None:
        """End the job without another token: cancelled, expired or failed. Text still held back stays unseen."""
        self.finish = Finish(reason=reason, prompt_tokens=len(self.prompt_ids), cached_tokens=self.cached_tokens, error=error)  # type: ignore[arg-type]
        self._take(owner, TokenRun(job_id=self.job.job_id, epoch=self.epoch, first_index=self.num_output, token_ids=(), logprobs=(),
                                   texts=(), finish=self.finish))

    def _take(self, owner: str, run: TokenRun) -> None:
        taken = self.shown.add(owner, run)
        assert taken, "own tokens are contiguous"
        self.pending.append(run)

    def drain_pending(self) -> TokenRun | None:
        """All that was generated since the last call as one run, or None."""
        if not self.pending:
            return None
        runs, self.pending = self.pending, []
        if len(runs) == 1:
            return runs[0]
        return replace(runs[0], token_ids=tuple(t for r in runs for t in r.token_ids), logprobs=tuple(p for r in runs for p in r.logprobs),
                       texts=tuple(x for r in runs for x in r.texts), finish=runs[-1].finish,
                       top_logprobs=tuple(t for r in runs for t in r.top_logprobs))

    def record(self) -> FinalRecord:
        return self.shown.record(self.job)


def open_job(tokenizer: Tokenizer, job: Job, *, epoch: int, ack_subject: str, chains: tuple[str, ...], prompt_ids: list[int],
             shown: Shown, life: str = "") -> ActiveJob:
    """A job as a new owner takes it up: text state is rebuilt by replaying the tokens that were shown.

    `life` tells this life from others of the same job in the engine (default: its epoch).
    """
    params = job.params
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens,
                                         spaces_between_special_tokens=params.add_spaces_between_special_tokens)
    matcher = StopStringMatcher(params.stop_strings)
    for token_id in shown.token_ids:
        matcher.feed(detokenizer.add(token_id))
    return ActiveJob(job=job, key=f"{job.job_id}:{life or epoch}", epoch=epoch, ack_subject=ack_subject, chains=chains,
                     prompt_ids=prompt_ids, shown=shown, detokenizer=detokenizer, matcher=matcher, num_stored=len(shown.token_ids))
