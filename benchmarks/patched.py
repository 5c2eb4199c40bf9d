"""A model of another library into rows: patched against as it is, same weights, same clip."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import DRAWS, OURS, verdict, with_backward
from benchmarks.modelrun import ModelRun
from jepa_kernels import testing

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Patched:
    """Inference or training of a model, each with its own forward.

    name      as in the row
    model     model() -> the model, with the same weights at every call
    small     small() -> one of fewer layers, on which parity is checked
    patch     patch(model) puts the kernels into it
    inputs    inputs(model) -> keyword arguments of a call; floating tensors are cast. inputs(model, draw=1) are others
    outputs   outputs(model's return value) -> tensors that both give
    own       own(model, **inputs) -> the outputs by the unpatched model's parts, where the model as a whole computes
              something else
    """

    name: str
    model: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    patch: Callable[[nn.Module], Any]
    inputs: Callable[..., Inputs]
    outputs: Callable[[Any], tuple[Tensor, ...]]
    own: Callable[..., tuple[Tensor, ...]] | None = None
    stages: tuple[str, ...] = ("forward", "backward")
    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    smoke: bool = False


class PatchedRun(ModelRun):
    """The model with our kernels, against itself."""

    kind, rivals = "patched", ("unpatched",)

    def call(self, model: nn.Module, own: bool = False, draw: int = 0) -> Callable[[], tuple[Tensor, ...]]:
        weight, dtype = next(model.parameters()), getattr(torch, self.dtype)

        def change(_: str, x: Tensor) -> Tensor:
            x = x.to(weight.device)
            return x.to(dtype).to(weight.dtype) if x.is_floating_point() else x

        inputs = testing.map_tensors(self.workload.inputs(model, draw=draw), change)
        if own and self.workload.own is not None:
            return partial(self.workload.own, model, **inputs)
        return lambda: self.workload.outputs(model(**inputs))

    def pair(self, build: Callable[[], nn.Module]) -> dict[str, nn.Module]:
        """Ours and the model as it is."""
        model = build().to(self.settings.device, getattr(torch, self.dtype)).eval()
        patched = copy.deepcopy(model)
        self.workload.patch(patched)
        return {OURS: patched, "unpatched": model}

    def results(self, model: nn.Module, own: bool = True) -> dict[str, Tensor]:
        """Outputs, and the gradient of every parameter that has one, [DRAWS, ..] of as many inputs."""
        drawn = [self.result(model, own, draw) for draw in range(DRAWS)]
        return {name: torch.stack([found[name] for found in drawn]) for name in drawn[0]}

    def result(self, model: nn.Module, own: bool, draw: int) -> dict[str, Tensor]:
        call, training = self.call(model, own, draw), self.stage == "backward"
        with torch.set_grad_enabled(training):
            outputs = call()
        found = {f"output{i}": x.detach() for i, x in enumerate(outputs)}
        if not training:
            return found
        named, loss = dict(model.named_parameters()), sum(x.square().mean() for x in outputs)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return found | {f"d{n}": g for n, g in zip(named, grads, strict=True) if g is not None}

    def parity(self) -> dict[str, Any]:
        """Outputs and gradients within the error budget of the model as it is.

        The largest errors of DRAWS inputs together, for that of one bias alone is luck; the RMS errors of each.
        """
        pair = self.pair(self.workload.small)
        ours, model = self.results(pair[OURS], own=False), pair["unpatched"]
        eager, exact = self.results(model), self.results(copy.deepcopy(model).double())
        found = verdict([testing.hold(n, ours[n], exact[n], eager[n]) for n in exact])
        each = (testing.hold(n, *(x[n][i] for x in (ours, exact, eager))) for n in exact for i in range(DRAWS))
        return {**found, "pass": found["pass"] and all(one.rms_err <= one.rms_budget for one in each)}

    def functions(self) -> dict[str, Callable[[], object]]:
        once = self.trained if self.stage == "backward" else lambda model: torch.no_grad()(self.call(model))
        return {name: once(model) for name, model in self.pair(self.workload.model).items()}

    def trained(self, model: nn.Module) -> Callable[[], Any]:
        return with_backward(self.call(model), list(model.parameters()), allow_unused=True)
