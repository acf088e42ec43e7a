"""`tokenmill batch`: submit a file of requests, look at it, fetch its answers; or pipe prompts through the farm with `run`."""

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from coordinator.batch_store import LAST_STATUSES
from coordinator.errors import ConfigError, InvalidField, TokenmillError
from producers.batch_client import BatchClient
from producers.batch_lines import ENDPOINTS, index_of
from producers.batch_progress import BatchProgress
from producers.batch_prompts import Template, write_requests
from producers.batch_results import Results

LOOK_S = 0.5
API_KEY_VARIABLE = "TOKENMILL_API_KEY"
EPILOG = """\
examples
  tokenmill batch submit requests.jsonl --watch
  tokenmill batch fetch batch_… --output out.jsonl --errors errors.jsonl
  cat prompts.txt | tokenmill batch run - --params '{"max_tokens": 64}' > out.jsonl

A batch goes on in the farm whatever happens to this command: the same `run` again finds it and computes nothing twice.
The exit status is 0 when every request was answered, 1 when some were not, 2 when a flag or an input is wrong.
"""


def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    try:
        return asyncio.run(_run(flags))
    except (InvalidField, ConfigError) as error:
        print(f"tokenmill batch: {error}", file=sys.stderr)
        return 2
    except (TokenmillError, OSError) as error:
        print(f"tokenmill batch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nthe batch goes on: look with `tokenmill batch status`, stop it with `tokenmill batch cancel`", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenmill batch", description="Many requests as one file.", epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, text: str, subject: str, subject_help: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, allow_abbrev=False)
        made.add_argument(subject, help=subject_help)
        made.add_argument("--url", default="http://127.0.0.1:8088", help="REST shims of the farm, by commas (default: %(default)s)")
        made.add_argument("--api_key", default="", help=f"(default: environment {API_KEY_VARIABLE})")
        return made

    submit = action("submit", "upload a file of requests (OpenAI's batch format) and begin it; prints the batch id", "file", "JSON lines")
    submit.add_argument("--endpoint", default="", help="(default: the first line's url)")
    submit.add_argument("--metadata", action="append", default=[], metavar="KEY=VALUE", help="kept with the batch; may be repeated")
    submit.add_argument("--watch", action="store_true", help="stay until it is over")
    action("status", "the Batch object, as JSON", "batch_id", "as `submit` printed it")
    action("watch", "a progress bar until it is over", "batch_id", "as `submit` printed it")
    fetch = action("fetch", "write the answers", "batch_id", "as `submit` printed it")
    fetch.add_argument("--output", "-o", default="-", help="file for answers; - is standard output (default)")
    fetch.add_argument("--errors", default="", help="file for lines that were not answered (default: they are only counted)")
    action("cancel", "stop it; what is answered is kept", "batch_id", "as `submit` printed it")
    run = action("run", "prompts in, answers out", "file", "a line of text, or a JSON request, per line; - is standard input")
    run.add_argument("--endpoint", choices=ENDPOINTS, default=ENDPOINTS[0], help="asked with each line of text (default: %(default)s)")
    run.add_argument("--model", default="", help="for the endpoints that name one (default: what the farm serves)")
    run.add_argument("--params", default="{}", help="further fields of each request, as a JSON object (/generate: its `parameters`)")
    run.add_argument("--as_completed", action="store_true", help="answers as they come (default: in the order of the input)")
    run.add_argument("--output", "-o", default="-", help="file to write, or to go on with; - is standard output (default)")
    run.add_argument("--again", default="", metavar="NAME", help="run the same input anew, under a name of your own")
    return parser


async def _run(flags: argparse.Namespace) -> int:
    actions: dict[str, Callable[[BatchClient, argparse.Namespace], Awaitable[int]]] = {
        "submit": _submit, "status": _status, "watch": _watch, "fetch": _fetch, "cancel": _cancel, "run": _pipe}
    async with BatchClient(flags.url.split(","), flags.api_key or os.environ.get(API_KEY_VARIABLE, "")) as client:
        return await actions[flags.action](client, flags)


async def _submit(client: BatchClient, flags: argparse.Namespace) -> int:
    metadata = dict(_pair(text) for text in flags.metadata)
    with _opened(flags.file, "rb") as file:
        endpoint = flags.endpoint or _endpoint_of(file)
        file_id = await client.upload(Path(flags.file).name, file)
    batch = await client.create(file_id, endpoint, metadata)
    print(batch["id"], flush=True)
    return _status_code(await _watched(client, batch["id"])) if flags.watch else 0


async def _status(client: BatchClient, flags: argparse.Namespace) -> int:
    print(orjson.dumps(await client.batch(flags.batch_id), option=orjson.OPT_INDENT_2).decode())
    return 0


async def _watch(client: BatchClient, flags: argparse.Namespace) -> int:
    return _status_code(await _watched(client, flags.batch_id))


async def _fetch(client: BatchClient, flags: argparse.Namespace) -> int:
    batch = await client.batch(flags.batch_id)
    if batch["status"] not in LAST_STATUSES:
        raise ConfigError(f"{flags.batch_id} is {batch['status']}: fetch it when it is over (tokenmill batch watch)")
    for path, file_id in ((flags.output, batch["output_file_id"]), (flags.errors, batch["error_file_id"])):
        if path:
            with _opened(path, "wb") as out:
                async for line in client.lines(file_id):
                    out.write(line + b"\n")
    return _status_code(batch)


async def _cancel(client: BatchClient, flags: argparse.Namespace) -> int:
    print((await client.cancel(flags.batch_id))["status"])
    return 0


async def _pipe(client: BatchClient, flags: argparse.Namespace) -> int:
    batch = await _begin(client, flags)
    seen = _kept(Path(flags.output), batch["id"]) if flags.output != "-" else set()
    results = Results(client, batch["id"], is_ordered=not flags.as_completed, seen=seen)
    with _opened(flags.output, "ab") as out, BatchProgress() as progress:
        while True:
            batch = await client.batch(batch["id"])
            progress.show(batch)
            is_over = batch["status"] in LAST_STATUSES
            async for row in results.rest(batch) if is_over else results.arrived():
                out.write(orjson.dumps(row) + b"\n")
            out.flush()
            if is_over:
                return _status_code(batch)
            await asyncio.sleep(LOOK_S)


async def _begin(client: BatchClient, flags: argparse.Namespace) -> dict[str, Any]:
    """The batch of this input: a new one, or the one that an earlier run began."""
    model = flags.model or await client.model() if flags.endpoint.startswith("/v1/") else ""
    template = Template(endpoint=flags.endpoint, model=model, params=_object(flags.params))
    with tempfile.TemporaryFile() as requests:
        with _opened(flags.file, "rb") as lines:
            num_requests, digest = await asyncio.to_thread(write_requests, lines, template, requests)
        if not num_requests:
            raise InvalidField("input", "has no lines")
        requests.seek(0)
        endpoint = _endpoint_of(requests)
        file_id = await client.upload("run.jsonl", requests)
    batch = await client.create(file_id, endpoint, {}, key=f"run-{digest}-{flags.again}")
    print(f"{batch['id']}: {num_requests} requests", file=sys.stderr)
    if batch["input_file_id"] != file_id:
        await client.delete_file(file_id)
    return batch


async def _watched(client: BatchClient, batch_id: str) -> dict[str, Any]:
    with BatchProgress() as progress:
        while True:
            batch = await client.batch(batch_id)
            progress.show(batch)
            if batch["status"] in LAST_STATUSES:
                return batch
            await asyncio.sleep(LOOK_S)


def _status_code(batch: dict[str, Any]) -> int:
    """0 when every request was answered. Says on stderr what became of it."""
    counts = batch["request_counts"]
    print(f"{batch['id']}: {batch['status']}, {counts['completed']} answered, {counts['failed']} not", file=sys.stderr)
    for error in (batch["errors"] or {"data": []})["data"]:
        print(f"  line {error['line']}: {error['message']}", file=sys.stderr)
    return 0 if batch["status"] == "completed" and not counts["failed"] else 1


def _kept(path: Path, batch_id: str) -> set[int]:
    """Which answers of this batch an earlier run wrote to the file. A last line that was cut off is removed."""
    if not path.exists():
        return set()
    kept: set[int] = set()
    with path.open("r+b") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            end += len(line)
            row = _row(path, line)
            if not row["id"].startswith(f"batch_req_{batch_id.removeprefix('batch_')}_"):
                raise ConfigError(f"--output {path}: has answers of another batch; name another file")
            kept.add(index_of(row))
    return kept


def _row(path: Path, line: bytes) -> dict[str, Any]:
    try:
        row: dict[str, Any] = orjson.loads(line)
        index_of(row)
        return row
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"--output {path}: is not a file of answers; name another file") from None


@contextlib.contextmanager
def _opened(path: str, mode: str) -> Any:
    if path == "-":
        yield sys.stdin.buffer if "r" in mode else sys.stdout.buffer
        sys.stdout.flush()
        return
    with open(path, mode) as file:
        yield file


def _endpoint_of(file: BinaryIO) -> str:
    """What the first request names; the farm says what is wrong with it if it names nothing."""
    line = next((line for line in file if line.strip()), b"")
    file.seek(0)
    try:
        return str(orjson.loads(line)["url"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise InvalidField("file", "its first line is not a request with a url; give --endpoint") from None


def _object(text: str) -> dict[str, Any]:
    with contextlib.suppress(orjson.JSONDecodeError):
        if isinstance(given := orjson.loads(text), dict):
            return given
    raise InvalidField("--params", f"must be a JSON object, got {text!r:.80}")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InvalidField("--metadata", f"must be KEY=VALUE, got {text!r:.80}")
    return key, value
