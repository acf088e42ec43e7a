"""How long a step takes, from what steps were measured to take on one GPU: floors of its operations, with what they were missed by.

    step = over_bytes x (operations bound by bandwidth) + over_flops x (operations bound by arithmetic) + per_kernel x kernels

The numbers are fitted to the figures of one file of bench.engine, relative errors squared: all three to its decode steps, and
over_flops anew to its prompts, whose products and attention are other kernels. Steps with prompts are launched kernel by kernel: below a
time per layer they are the host's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.roofline import KERNELS_PER_LAYER, Ceilings, Op, Phase, Work, step_ops
from workers.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure of bench.engine, as far as it is modelled."""

    phase: Phase
    batch: int
    context: int
    experts: float | None
    seconds: float

    @property
    def work(self) -> Work:
        if self.phase == "decode":
            return Work.decode(self.batch, self.context, self.experts)
        return Work.prefill(self.batch * self.context, self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Fitted to one model on one GPU; used for any split of models of that precision."""

    over_bytes: float
    over_flops: float
    prompt_over_flops: float
    per_kernel_s: float
    host_per_layer_s: float      # prompts: what launching a layer's kernels takes the host

    def seconds(self, ops: Sequence[Op], ceilings: Ceilings, num_layers: int, phase: Phase) -> float:
        parts = _parts(ops, ceilings, num_layers)
        over_flops = self.over_flops if phase == "decode" else self.prompt_over_flops
        on_device = float(parts @ np.array([self.over_bytes, over_flops, self.per_kernel_s]))
        return max(on_device, self.host_per_layer_s * num_layers) if phase == "prefill" else on_device


def fit(config: ModelConfig, figures: Sequence[Measured], ceilings: Ceilings) -> StepModel:
    """Raises ValueError if a phase has no figures."""
    decodes, prompts = ([figure for figure in figures if figure.phase == phase] for phase in ("decode", "prefill"))
    if not decodes or not prompts:
        raise ValueError("both decode steps and prompts are needed")
    host_s = min(figure.seconds for figure in prompts)
    # Several lengths that took the same were bound by the host: they say nothing about the device.
    of_host = [figure for figure in prompts if figure.seconds < 1.05 * host_s]
    if len(of_host) > 1:
        prompts = [figure for figure in prompts if figure not in of_host]

    def parts(figures: Sequence[Measured]) -> np.ndarray:
        return np.array([_parts(step_ops(config, figure.work), ceilings, config.num_layers) / figure.seconds for figure in figures])

    over_bytes, over_flops, per_kernel_s = _non_negative(parts(decodes))
    by_bytes, by_flops, kernels = parts(prompts).T
    left = 1.0 - over_bytes * by_bytes - per_kernel_s * kernels
    return StepModel(over_bytes=over_bytes, over_flops=over_flops, prompt_over_flops=float(by_flops @ left / (by_flops @ by_flops)),
                     per_kernel_s=per_kernel_s, host_per_layer_s=host_s / config.num_layers if len(of_host) > 1 else 0.0)


def read_figures(path: Path) -> list[Measured]:
    """Decode steps and prefill chunks of a results file of bench.engine."""
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return [Measured(phase=figure["kind"], batch=figure["batch"], context=figure["context"], experts=figure["experts"],
                     seconds=figure["step_ms"] / 1e3) for figure in figures if figure["kind"] in ("decode", "prefill")]


def _parts(ops: Sequence[Op], ceilings: Ceilings, num_layers: int) -> np.ndarray:
    by_bytes = by_flops = 0.0
    for op in ops:
        if op.num_bytes / ceilings.bytes_per_s >= op.num_flops / ceilings.flops(op.rate):
            by_bytes += op.floor_s(ceilings)
        else:
            by_flops += op.floor_s(ceilings)
    return np.array([by_bytes, by_flops, num_layers * KERNELS_PER_LAYER])


def _non_negative(a: np.ndarray) -> tuple[float, float, float]:
    """Least squares of three unknowns whose sums should be 1; one that would be negative is left out."""
    kept = [0, 1, 2]
    while True:
        solved, *_ = np.linalg.lstsq(a[:, kept], np.ones(len(a)), rcond=None)
        if (solved >= 0).all():
            found = dict(zip(kept, solved.tolist(), strict=True))
            return found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0)
        kept.pop(int(solved.argmin()))
