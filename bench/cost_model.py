"""What N GPUs should take, before there are any: `python -m bench.cost_model [--results bench/results] [--out FILE]`.

Steps are predicted from steps measured on one GPU (bench/step_model.py), cut as the ranks cut the model (bench/rank_work.py), with the
links' rates (bench/links.py) for what ranks say to each other. First what the model misses the measured steps by, then the tables.
Nothing is hidden behind anything else: overlap can only make it better.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.links import NVLINK, TWO_NODES, Links
from bench.rank_work import Split, rank_ops, talk_s, weight_bytes
from bench.roofline import Ceilings, Work, step_ops
from bench.shapes import FP8, full_config, named_config
from bench.step_model import Measured, StepModel, fit, read_figures
from bench.tables import markdown_table
from workers.model_config import ModelConfig

RESULTS = Path("bench/results")
H100 = Ceilings(bytes_per_s=3.03e12, bf16_flops=792e12, fp8_flops=1480e12, launch_s=1.01e-6)
H200 = Ceilings(bytes_per_s=4.27e12, bf16_flops=790e12, fp8_flops=1500e12, launch_s=1.1e-6)
PROMPT, CHUNK, HANDOVER_TOKENS = 1024, 8192, 4096
SPARE_BYTES = 6e9           # workspace, graphs and the driver's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Steps of one model that were measured on one GPU."""

    gpu: str
    ceilings: Ceilings
    file: str


_LITE_H100 = Source(gpu="H100", ceilings=H100, file="engine_v2_lite_nvidia_h100_80gb_hbm3.json")
_LITE_H200 = Source(gpu="H200", ceilings=H200, file="engine_v2_lite_nvidia_h200.json")
_V3_H100 = Source(gpu="H100", ceilings=H100, file="engine_v3_layers_4_nvidia_h100_80gb_hbm3.json")
_V3_H200 = Source(gpu="H200", ceilings=H200, file="engine_v3_layers_4_nvidia_h200.json")
# (what the model is fitted to, steps of another GPU that the fit has not seen). Those of the H200 were taken before decode kernels of one
# sequence overlapped their launches; V3's prompts on the H100 leave no arithmetic to fit.
FITS = {"v2-lite": (_LITE_H100, _LITE_H200), "v3-layers:4": (_V3_H200, _V3_H100)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    name: str
    num_gpus: int
    ceilings: Ceilings
    memory_bytes: float       # of each GPU
    links: Links


MACHINES = (
    Machine(name="8 x H100", num_gpus=8, ceilings=H100, memory_bytes=80e9, links=NVLINK),
    Machine(name="8 x H200", num_gpus=8, ceilings=H200, memory_bytes=141e9, links=NVLINK),
    Machine(name="16 x H100", num_gpus=16, ceilings=H100, memory_bytes=80e9, links=TWO_NODES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one step of the whole group."""

    seconds: float
    talk_s: float
    tok_s: float


def predict(config: ModelConfig, model: StepModel, machine: Machine, split: Split, work: Work) -> Prediction:
    """`work`: of one dp group; the rate is that of all of them."""
    talking = talk_s(config, split, work, machine.links)
    seconds = model.seconds(rank_ops(config, split, work), machine.ceilings, config.num_layers, work.phase) + talking
    return Prediction(seconds=seconds, talk_s=talking, tok_s=work.tokens * split.dp / seconds)


def handover_s(config: ModelConfig, num_tokens: int, links: Links, num_source_ranks: int = 1) -> float:
    """Latents of so many tokens to one target rank; every source rank sends its share over a link of its own."""
    return num_tokens * config.num_layers * config.kv_row * 2 / (links.pair_bytes_s * num_source_ranks)


def splits(config: ModelConfig, machine: Machine) -> Iterator[Split]:
    """Those that the model's heads and experts allow on all of the machine's GPUs, and one GPU."""
    yield Split()
    num = machine.num_gpus
    for split in dict.fromkeys((Split(tp=num), Split(tp=num, dp=max(num // 4, 1), is_ep=True), Split(tp=num, dp=num, is_ep=True))):
        has_heads = config.num_heads % split.attn_tp == 0
        block = split.attn_tp * (128 if config.fp8_block else 1)
        has_width = config.moe is None or split.is_ep or config.moe.intermediate_size % block == 0
        if has_heads and has_width:
            yield split


def full_steps(figures: Sequence[Measured]) -> list[Measured]:
    """Without short chunks of prompts, which are the host's and not the GPU's."""
    return [figure for figure in figures if figure.phase == "decode" or figure.batch * figure.context >= CHUNK // 2]


def errors(config: ModelConfig, model: StepModel, figures: Sequence[Measured], ceilings: Ceilings) -> list[tuple[Measured, float]]:
    """How far off the model is for each figure: 0.05 is 5 % too slow."""
    return [(figure, model.seconds(step_ops(config, figure.work), ceilings, config.num_layers, figure.phase) / figure.seconds - 1)
            for figure in figures]


def worst(missed: Sequence[tuple[Measured, float]]) -> str:
    most = {phase: max(abs(error) for figure, error in missed if figure.phase == phase) for phase in ("decode", "prefill")}
    return f"decode steps by {most['decode']:.0%} at most, prefill by {most['prefill']:.0%}"


def full_model(name: str) -> ModelConfig:
    return ModelConfig.parse(full_config("deepseek-v3", quantization_config=FP8) if name == "v3" else named_config(name))


def fitted(results: Path) -> dict[str, tuple[ModelConfig, StepModel, list[Measured]]]:
    """By the name of the measured model, with the steps that it was fitted to. Raises OSError where a results file is missing."""
    found = {}
    for name, (source, _) in FITS.items():
        config, figures = ModelConfig.parse(named_config(name)), full_steps(read_figures(results / source.file))
        found[name] = config, fit(config, figures, source.ceilings), figures
    return found


def table(config: ModelConfig, model: StepModel, machine: Machine) -> str:
    """One line per split: decode at several batches, prefill, hand-over."""
    rows = []
    for split in splits(config, machine):
        room = machine.memory_bytes * 0.95 - SPARE_BYTES - weight_bytes(config, split)
        if room <= 0:
            rows.append([split.name, f"does not fit: {weight_bytes(config, split) / 1e9:.0f} GB of weights per GPU", *[""] * 6])
            continue
        cells = [split.name]
        for batch in (1, 16, 64, 128):  # of each dp group
            decode = predict(config, model, machine, split, Work.decode(batch, PROMPT))
            cells.append(f"{decode.seconds * 1e3:.1f} ms ({decode.talk_s / decode.seconds:.0%} talk), {decode.tok_s:,.0f}")
        prefill = predict(config, model, machine, split, Work.prefill(CHUNK, PROMPT))
        num_tokens = room / (config.num_layers * config.kv_row * 2) * split.dp
        cells += [f"{prefill.tok_s:,.0f} ({prefill.talk_s / prefill.seconds:.0%} talk)", f"{num_tokens / 1e6:.2f} M",
                  f"{handover_s(config, HANDOVER_TOKENS, machine.links, split.attn_tp) * 1e3:.2f} ms"]
        rows.append(cells)
    return markdown_table(("ranks", "decode, 1 per group", "16", "64", "128: ms, tok/s of all", "prefill tok/s", "KV tokens",
                           f"hand-over of {HANDOVER_TOKENS}"), rows)


def report(results: Path, machines: Sequence[Machine] = MACHINES, shapes: Sequence[str] = ("v2-lite", "v3")) -> str:
    parts = ["# Steps that several GPUs should take", "", "Predicted, not measured: " + (__doc__ or "").partition("\n\n")[2].strip(), ""]
    found = fitted(results)
    for name, (config, model, figures) in found.items():
        source, other = FITS[name]
        missed = worst(errors(config, model, figures, source.ceilings))
        if (results / other.file).is_file():
            unseen = worst(errors(config, model, full_steps(read_figures(results / other.file)), other.ceilings))
            missed += f"; on an {other.gpu}, which it was not fitted to: {unseen}"
        parts += [f"**{name}**, measured on one {source.gpu}: bytes {model.over_bytes:.2f} and arithmetic {model.over_flops:.2f} times the "
                  f"floor (prompts {model.prompt_over_flops:.2f}), {model.per_kernel_s * 1e6:.1f} µs per kernel; the model misses "
                  f"{missed}.", ""]
    for links in (NVLINK, TWO_NODES):
        parts += [f"- {links.name}: {links.source}"]
    for shape in shapes:
        config, measured = full_model(shape), "v2-lite" if shape == "v2-lite" else "v3-layers:4"
        title = {"v2-lite": "DeepSeek-V2-Lite, bf16", "v3": "DeepSeek-V3 and R1, FP8"}.get(shape, f"{shape} in FP8")
        for machine in machines:
            parts += ["", f"## {title}, {machine.name}, context {PROMPT}", "", table(config, found[measured][1], machine).rstrip()]
    return "\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cost_model", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the figures of one GPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write it to this file")
    parser.add_argument("--num_gpus", type=int, default=0, help="of one node, instead of the tables for 8 and 16")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    num = arguments.num_gpus
    if num:  # what bench/multi_gpu measures
        text = report(arguments.results, [replace(machine, name=f"{num} x {machine.name.partition(' x ')[2]}", num_gpus=num)
                                          for machine in MACHINES[:2]], ("v2-lite", "v3-layers:4"))
    else:
        text = report(arguments.results)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
