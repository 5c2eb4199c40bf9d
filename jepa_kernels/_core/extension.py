"""The compiled module `_C`: loaded once and lazily, so that a missing build is a reason, not an ImportError."""

import importlib
import importlib.util
from types import ModuleType

_state: dict[str, ModuleType | str] = {}


def load() -> ModuleType | str:
    """`jepa_kernels._C`, or the reason why it is not there."""
    if "C" not in _state:
        try:
            _state["C"] = importlib.import_module("jepa_kernels._C")
        except ImportError as error:
            found = importlib.util.find_spec("jepa_kernels._C") is not None
            _state["C"] = f"jepa_kernels._C does not load: {error}" if found else "jepa_kernels._C is not built"
    return _state["C"]


def reason(backend: str) -> str | None:
    """Why the compiled backend (`cpu` or `cuda`) can't run in this process; None where it can."""
    module = load()
    if isinstance(module, str):
        return f"{module}; build it with `pip install .`"
    if backend == "cuda":
        return module.cuda_reason() or None
    return "this processor lacks AVX2 and FMA" if module.isa() == "none" else None
