"""`tokenmill worker` and `tokenmill drain`: look at one worker, give it another role, have it leave."""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable

from coordinator.errors import ConfigError, TokenmillError
from coordinator.farm_access import FarmAccess, add_flags, reach
from coordinator.messages import check_id
from coordinator.orders import ROLES, Order, give
from coordinator.registry import worker_row
from coordinator.store import WorkerView

POLL_S = 0.25
DEFAULT_WAIT_S = 60.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tokenmill worker", description="One worker: what the farm knows of it; another role for it.",
                                     allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="as the registry knows it, as JSON; status 1 when it has no lease")
    show.add_argument("worker")
    show.add_argument("--check", action="store_true", help="print nothing: for probes")
    add_flags(show)
    role = actions.add_parser("set_role", aliases=["set-role"], help="end what it has, and go on under another role with the same weights")
    role.add_argument("worker")
    role.add_argument("role", choices=ROLES)
    _add_order_flags(role)
    return _run_cli("tokenmill worker", parser.parse_args(argv))


def drain(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tokenmill drain", description="Have a worker take nothing new, end what it has, and leave.",
                                     allow_abbrev=False)
    parser.add_argument("worker")
    _add_order_flags(parser)
    return _run_cli("tokenmill drain", parser.parse_args(argv, argparse.Namespace(action="drain")))


def _add_order_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    parser.add_argument("--wait", type=float, default=DEFAULT_WAIT_S, metavar="S", help="until it is done; 0: not (default: %(default)g)")
    parser.add_argument("--force", action="store_true", help="even if the farm then has nobody to do what it did")


def _run_cli(program: str, flags: argparse.Namespace) -> int:
    try:
        return asyncio.run(_run(flags))
    except TokenmillError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1


async def _run(flags: argparse.Namespace) -> int:
    check_id("worker", flags.worker)
    async with reach(flags, needs_model=False) as farm:
        if flags.action == "show":
            views = [view for view in await farm.store.workers() if view.worker == flags.worker and view.is_alive]
            if not flags.check:
                print(json.dumps([worker_row(view) for view in views], indent=2))
            return 0 if views else 1
        order = Order(kind="drain") if flags.action == "drain" else Order(kind="set_role", role=flags.role)
        return await _order(farm, flags, order)


async def _order(farm: FarmAccess, flags: argparse.Namespace, order: Order) -> int:
    workers = await farm.store.workers()
    if not flags.force and (missing := would_miss(workers, flags.worker, order)):
        raise ConfigError(f"without {flags.worker} nobody could {missing}: start another worker first, or say --force")
    print(f"{flags.worker}: {await give(farm.bus, flags.worker, order)}")
    if not flags.wait:
        return 0

    def is_done(mine: list[WorkerView]) -> bool:
        return not mine if order.kind == "drain" else any(view.role == order.role for view in mine)

    if not await _until(farm, flags.worker, is_done, flags.wait):
        print(f"{flags.worker}: not done after {flags.wait:g} s; it goes on", file=sys.stderr)
        return 1
    print(f"{flags.worker}: " + ("has left" if order.kind == "drain" else f"is {order.role} now"))
    return 0


async def _until(farm: FarmAccess, worker: str, is_done: Callable[[list[WorkerView]], bool], wait_s: float) -> bool:
    give_up_at = time.monotonic() + wait_s
    while not is_done([view for view in await farm.store.workers() if view.worker == worker and view.is_alive]):
        if time.monotonic() > give_up_at:
            return False
        await asyncio.sleep(POLL_S)
    return True


def would_miss(workers: list[WorkerView], worker: str, order: Order) -> str:
    """What the living workers of its model could not do any more ("prefill", "decode") once this one has followed; "" if nothing."""
    alive = [view for view in workers if view.is_alive and view.info.get("state", "serving") == "serving"]
    model = next((view.info.get("model") for view in alive if view.worker == worker), None)
    before = [view.role for view in alive if view.info.get("model") == model]
    after = [view.role for view in alive if view.info.get("model") == model and view.worker != worker]
    if order.kind == "set_role":
        after.append(order.role)
    lost = [job for job in ("prefill", "decode") if _can(before, job) and not _can(after, job)]
    return " and ".join(lost)


def _can(roles: list[str], job: str) -> bool:
    return job in roles or "both" in roles


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
