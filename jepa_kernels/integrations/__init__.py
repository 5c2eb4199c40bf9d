"""Models of other libraries on the kernels: one instance at a time, verified, and undone to the last bit."""

from jepa_kernels.integrations import huggingface

__all__ = ["huggingface"]
