"""The router to compare with: it knows every cache and every backlog, exactly and at once, and sends each turn where it is done first."""

from collections.abc import Callable, Sequence

from bench.conversations import Conversation, prompt_of
from bench.lane_policy import LanePolicy
from bench.virtual_farm import VirtualClock, VirtualJob, VirtualWorker, scheduler_settings
from coordinator.routing import RoutingPolicy
from workers.mock_costs import MockCosts

# Which of the workers gets this prompt.
Choose = Callable[[Sequence[VirtualWorker], Sequence[int]], VirtualWorker]


def cache_aware(workers: Sequence[VirtualWorker], prompt: Sequence[int]) -> VirtualWorker:
    """Least to compute before its first token; of equals the one with fewest jobs, now and then ever."""
    return min(workers, key=lambda worker: (worker.backlog + len(prompt) - worker.cached_tokens(prompt), worker.num_jobs, worker.num_added))


def least_loaded(workers: Sequence[VirtualWorker], prompt: Sequence[int]) -> VirtualWorker:
    """What pulling from one queue comes to: whoever has least to do."""
    return min(workers, key=lambda worker: (worker.backlog, worker.num_jobs, worker.num_added))


def play(conversations: Sequence[Conversation], choose: Choose | RoutingPolicy, *, num_workers: int, num_tokens: int, num_output: int,
         costs: MockCosts) -> list[VirtualJob]:
    """All turns of all conversations; each turn is sent when its user has thought about the answer before.

    `choose` is who decides: a router that knows everything, or the farm's own policy.
    """
    clock, done = VirtualClock(), list[VirtualJob]()
    decide = LanePolicy(clock, choose) if isinstance(choose, RoutingPolicy) else choose
    talks: dict[str, tuple[Conversation, list[list[int]]]] = {}

    def send(number: int, conversation: Conversation, answers: list[list[int]]) -> None:
        job = VirtualJob(job_id=f"{number}-{len(answers)}", prompt=prompt_of(conversation, answers), num_output=num_output,
                         sent_s=clock.now_s)
        talks[job.job_id] = (conversation, answers)
        decide(workers, job.prompt).add(job)

    def on_ended(job: VirtualJob) -> None:
        done.append(job)
        conversation, answers = talks.pop(job.job_id)
        answers.append(job.output)
        if len(answers) < len(conversation.messages):
            number = int(job.job_id.partition("-")[0])
            clock.call_at(clock.now_s + conversation.thinks_s[len(answers) - 1], lambda: send(number, conversation, answers))

    workers = [VirtualWorker(index, clock, costs, scheduler_settings(num_tokens=num_tokens), on_ended) for index in range(num_workers)]
    for number, conversation in enumerate(conversations):
        clock.call_at(conversation.start_s, lambda n=number, c=conversation: send(n, c, []))  # type: ignore[misc]
    clock.run()
    return done
