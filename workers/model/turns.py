"""Computations that pause: generators that yield wherever data is under way to other ranks and something else could be computed."""

from collections.abc import Callable, Generator

from torch import Tensor

from workers.model.step import Step

Steps = Generator[None, None, Tensor]
Mlp = Callable[[Tensor, Step], Tensor]          # a feed-forward block: [T, D] -> [T, D], or [T, k, D] to be summed over k
MlpSteps = Callable[[Tensor, Step], Steps]      # the same with pauses


def at_once(mlp: Mlp) -> MlpSteps:
    """A block that never pauses."""

    def steps(x: Tensor, step: Step) -> Steps:
        return mlp(x, step)
        yield

    return steps


def run(steps: Steps) -> Tensor:
    """Straight on."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Tensor = end.value
            return result


def run_both(first: Steps, second: Steps) -> tuple[Tensor, Tensor]:
    """In turns, `first` ahead: what one has sent travels while the other computes. Both pause equally often, as all passes do."""
    while True:
        try:
            next(first)
        except StopIteration as end:
            return end.value, run(second)
        next(second)
