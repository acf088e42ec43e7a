"""The door: the `tokenmill` console command. Subcommands are imported only when they are called."""

import importlib
import sys

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("coordinator.serve", "start a farm, or one part of it (--run_mode)"),
    "status": ("coordinator.status", "who is alive, what is queued, what is held"),
    "worker": ("coordinator.worker_cli", "look at one worker; give it another role"),
    "drain": ("coordinator.worker_cli:drain", "have a worker end what it has, and leave"),
    "queue": ("coordinator.queue_cli", "show or stop the queue that a config server or pd_master left running"),
    "batch": ("producers.batch_cli", "submit, watch and fetch a file of requests; pipe prompts through the farm"),
    "jobs": ("coordinator.jobs_cli", "what became of a job; stop one"),
    "dlq": ("coordinator.dlq_cli", "dead letters: list, show, replay, drop"),
    "keys": ("producers.keys_cli", "API keys of the REST door: create, list, revoke"),
    "mock-fleet": ("workers.mock_fleet", "many workers without a model in one process, for tests of the control plane"),
    "model": ("workers.model_cli", "fetch the demo model, write random checkpoints, show one"),
}

USAGE = """tokenmill: an inference farm that runs on a message queue

  tokenmill serve --model_dir DIR [--port 8088]     one machine, everything on it
  tokenmill COMMAND --help                          the flags of a command

commands
"""


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE + "\n".join(f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items()))
        return 0
    if args[0] not in COMMANDS:
        print(f"tokenmill: no command {args[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    name, _, function = COMMANDS[args[0]][0].partition(":")
    status: int = getattr(importlib.import_module(name), function or "main")([_with_underscores(arg) for arg in args[1:]])
    return status


def _with_underscores(arg: str) -> str:
    """`--run-mode` and `--run_mode` are the same flag; values keep their hyphens."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


if __name__ == "__main__":
    sys.exit(main())
