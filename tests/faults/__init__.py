"""Faults seeded in the source of our own kernels: `python -m tests.faults` builds, runs and lists each one.

One at a time is put into a copy of the sources, and the cases of `python -m jepa_kernels verify` for that op and
backend run on the copy: what a user would run must notice. results.json holds what was found, docs/faults.md shows it.
"""
