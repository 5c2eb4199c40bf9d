"""Models of other libraries on the kernels: one instance at a time, verified, and undone to the last bit."""

from jepa_kernels.integrations import huggingface, meta, timm

__all__ = ["huggingface", "meta", "timm"]
