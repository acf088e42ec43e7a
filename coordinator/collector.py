"""Python's garbage collector in a process that has started up."""

import gc

THRESHOLDS = (20_000, 20, 20)


def settle() -> None:
    """What is loaded by now lives for good: collections need not look at it any more, and may come less often. Call when ready to serve."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
