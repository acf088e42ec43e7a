"""`tokenmill keys`: make, list and revoke the keys that clients of the REST door show."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coordinator.errors import ConfigError
from coordinator.messages import CLASSES
from producers.api_keys import ApiKey, create_key, read_keys, revoke_key
from producers.job_options import MAX_TENANT_CHARS


def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    try:
        return int({"create": _create, "list": _list, "revoke": _revoke}[flags.action](flags))
    except ConfigError as error:
        print(f"tokenmill keys: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenmill keys", description="Keys for the REST door. The file holds hashes, never keys.",
                                     allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key; it is shown once", allow_abbrev=False)
    create.add_argument("--name", required=True, help="for your own list")
    create.add_argument("--tenant", default="", help="whose jobs these are; keys of one tenant share its limits (default: one per key)")
    create.add_argument("--class", dest="klass", choices=CLASSES, default="normal", help="highest class of its jobs (default: %(default)s)")
    create.add_argument("--max_jobs", type=_bound, default=0, help="open jobs at once; 0: no bound (default)")
    create.add_argument("--max_open_tokens", type=_bound, default=0, help="open tokens at once; 0: no bound (default)")
    create.add_argument("--tokens_per_minute", type=_bound, default=0, help="prompt and max_new_tokens; 0: no bound (default)")
    create.add_argument("--trusted", action="store_true", help="may speak for other tenants (X-Tenant), and join workers to the farm")
    revoke = actions.add_parser("revoke", help="forget a key: running shims refuse it within a second", allow_abbrev=False)
    revoke.add_argument("key_id", help="as `list` shows it")
    for action in (create, actions.add_parser("list", help="who has a key, and what it may do", allow_abbrev=False), revoke):
        action.add_argument("--api_keys_file", type=Path, default=Path("api_keys.json"), help="(default: %(default)s)")
    return parser


def _create(flags: argparse.Namespace) -> int:
    if len(flags.tenant) > MAX_TENANT_CHARS or not flags.tenant.isascii() or not (flags.name + flags.tenant).isprintable():
        raise ConfigError(f"--name: printable characters only; --tenant: of ASCII, at most {MAX_TENANT_CHARS}")
    secret, key = create_key(flags.api_keys_file, flags.name, tenant=flags.tenant, klass=flags.klass, max_jobs=flags.max_jobs,
                             max_open_tokens=flags.max_open_tokens, tokens_per_minute=flags.tokens_per_minute, is_trusted=flags.trusted)
    print(f"key {key.key_id} of tenant {key.tenant} is in {flags.api_keys_file}; it is not shown again:", file=sys.stderr)
    print(secret)
    return 0


def _list(flags: argparse.Namespace) -> int:
    table = Table()
    for name in ("id", "name", "tenant", "class", "jobs", "open tokens", "tokens / min", "trusted", "created"):
        table.add_column(name, no_wrap=name == "id")
    for key in read_keys(flags.api_keys_file):
        table.add_row(*_row(key))
    Console().print(table)
    return 0


def _row(key: ApiKey) -> tuple[str, ...]:
    bounds = (str(bound or "-") for bound in (key.max_jobs, key.max_open_tokens, key.tokens_per_minute))
    return (key.key_id, key.name, key.tenant, key.klass, *bounds, "yes" if key.is_trusted else "", key.created)


def _revoke(flags: argparse.Namespace) -> int:
    if not revoke_key(flags.api_keys_file, flags.key_id):
        raise ConfigError(f"{flags.api_keys_file} has no key {flags.key_id}")
    print(f"key {flags.key_id} is revoked")
    return 0


def _bound(given: str) -> int:
    value = int(given)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value
