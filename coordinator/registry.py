"""Everybody who is in the farm, as one map: for /registry and `tokenmill status`. A Redis that cannot tell raises: stale is not empty."""

from typing import Any

from coordinator.members import MemberView, members
from coordinator.store import Store, WorkerView


async def registry(store: Store, model: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Config servers, masters and workers (of one model). Raises Unavailable."""
    known = await members(store)
    return {
        "config_servers": [_member(view) for view in known if view.kind == "config_server"],
        "masters": [_member(view) for view in known if view.kind == "pd_master" and model in (None, view.info.get("model"))],
        "workers": [worker_row(view) for view in await store.workers(model)],
    }


def worker_row(view: WorkerView) -> dict[str, Any]:
    info = view.info
    return {"worker": view.worker, "incarnation": view.incarnation, "role": view.role,
            "engine": info.get("engine", "model"), "model": info.get("model", ""), "device": info.get("device", ""),
            "mps": info.get("mps", ""), "kv_transfer": info.get("kv_transfer", ""),
            "alive": view.is_alive, "lease_left_s": round(view.expires_in_s, 1), "claims": view.num_owned, "host": info.get("host", ""),
            "pid": info.get("pid", 0), "finished": info.get("finished", 0), "layout": info.get("layout", {}),
            "state": info.get("state", "serving"), "stats": view.stats, "group": info.get("group")}


def _member(view: MemberView) -> dict[str, Any]:
    return {"name": view.name, "alive": view.is_alive, **{key: value for key, value in view.info.items() if key != "kind"}}
