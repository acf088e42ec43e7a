"""A bounded set of ids that forgets the oldest."""

from collections import OrderedDict


class RecentIds:
    """Remember the last `limit` ids."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, new_id: str) -> None:
        self._ids[new_id] = None
        self._ids.move_to_end(new_id)
        if len(self._ids) > self._limit:
            self._ids.popitem(last=False)

    def __contains__(self, wanted: object) -> bool:
        return wanted in self._ids
