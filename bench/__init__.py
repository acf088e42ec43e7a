"""Benchmarks: the load client, the farm's own figures with their bars, and the reports that both write."""
