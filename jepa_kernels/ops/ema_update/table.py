"""Public face of `EmaTable`."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from jepa_kernels._core.check import fail
from jepa_kernels._core.select import short
from jepa_kernels.chunks import look, unchanged
from jepa_kernels.ops.ema_update.check import OP, ROLES, Shadow, Source, check, names, reread
from jepa_kernels.ops.ema_update.op import ema_update, update


class EmaTable:
    """The lists of an `ema_update` that stay the same, checked once: each update compares addresses alone.

    target, online, shadow: as in `ema_update`; of a module, the parameters that it has now. The table holds the
    tensors, which `torch.utils.swap_tensors` then refuses. A CUDA graph that captured an update reads the table's
    memory: keep the table as long as the graph.

    Raises what `ema_update` raises for lists that do not match.
    """

    def __init__(
        self,
        target: Source,
        online: Source,
        *,
        shadow: Shadow = None,
    ):
        sources = (target, online, shadow)
        self._lists = check(sources)
        self._names = names(sources, self._lists.given)
        readable = self._lists.local if self._lists.known is not None else ()
        self._looks = [[look(t) for t in tensors] for tensors in readable]
        # References of C++: torch then reads a tensor, and counts its versions, without taking and dropping Python's.
        # It swaps no tensor that has them, so that there are none where modules swap their parameters.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        self._held = [] if swaps else [to_dlpack(t) for tensors in readable for t in tensors]
        self._prepared: dict[str, Any] = {}

    def update(self, momentum: float | Tensor, *, form: str = "lerp", backend: str | None = None) -> None:
        """`ema_update` of the table's lists, bit for bit.

        Raises ValueError, before the first write, for a tensor that was freed, resized, moved or given other memory
        since the table was built, and what `ema_update` raises for momentum and form.
        """
        lists = self._lists
        target, online, shadow = lists.given
        if torch.compiler.is_compiling() or lists.known is None:
            return ema_update(target, online, momentum, shadow=shadow, form=form, backend=backend)
        if lists.local is lists.given:
            same = unchanged(lists.known, lists.given)
        else:  # the shards of DTensors, looked up anew
            lists = reread(lists.given)
            same = lists.known == self._lists.known
        if not same:
            self._refuse(lists.local)
        update(lists, self._prepared, momentum, form, backend)

    def _refuse(self, local: tuple[list[Tensor], ...]) -> NoReturn:
        """Name the first tensor that is another than it was."""
        for role, tensors, looks in zip(ROLES, local, self._looks, strict=True):
            for i, (t, before) in enumerate(zip(tensors, looks, strict=True)):
                if t.layout is not torch.strided or look(t) != before:
                    wanted = f"stay as it was when the table was built: {_told(before)}"
                    actual = _told(look(t)) if t.layout is torch.strided else str(t.layout)
                    fail(OP, self._names[role][i], wanted, actual, "build a new EmaTable")
        fail(OP, "the lists", "stay as they were when the table was built", "others", "build a new EmaTable")


def _told(looks: tuple[Any, ...]) -> str:
    address, shape, _, dtype, device = looks
    return f"{short(dtype)} {tuple(shape)} on {device} at {address:#x}"
