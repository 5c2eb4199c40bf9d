"""Names that are nearly right."""

import difflib
from collections.abc import Collection

from jepa_kernels._core.check import fail


def nearest(name: str, known: Collection[str], otherwise: str) -> str:
    """The remedy of an unknown name: the known one that is most like it, or `otherwise`."""
    near = difflib.get_close_matches(name, known, 1, 0.4)
    return f"did you mean {near[0]}?" if near else otherwise


def check_known(op: str, argument: str, name: str, known: Collection[str], otherwise: str) -> None:
    """ValueError where `name` is not one of `known`."""
    if name not in known:
        fail(op, argument, f"be one of {', '.join(known)}", repr(name), nearest(name, known, otherwise))
