"""Benchmarks, pass@1 with intervals, and chat."""
