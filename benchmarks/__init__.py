"""Measurements: every op and model against the best rivals, parity first. Front end: `python -m benchmarks`."""
