"""Prefill and decode workers: the engine and the process that joins it to the queue."""
