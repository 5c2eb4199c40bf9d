"""Where the time of a training step goes: `jk.profile`, and `python -m jepa_kernels profile MODEL`."""

from jepa_kernels.profiling.recorder import profile

__all__ = ["profile"]
