"""Benchmarks, their baselines and the tiny models; outside the wheel."""
