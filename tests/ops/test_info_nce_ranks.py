"""info_nce over gloo process groups: equal to the single-process result, or one clear error on every rank."""

import tempfile

import pytest
import torch
from torch import distributed as dist

import jepa_kernels as jk
from tests.processes import gloo, side_by_side

SIZES = {2: (5, 8), 3: (4, 0, 30)}  # rows a rank
E = 24


def rows(world: int, dtype: torch.dtype = torch.float32) -> dict:
    """What one process would be given."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, sum(SIZES[world]), E, generator=generator)
    labels = torch.randint(6, (len(x),), generator=generator)
    return dict(x=x.to(dtype), y=(x + noise).to(dtype), temperature=torch.tensor(0.1), duplicates=labels)


def own(whole: dict, rank: int, world: int) -> dict:
    at = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    return {n: t if n == "temperature" else t[at] for n, t in whole.items()}


def value_and_grads(given: dict, scale: float = 1.0, **options) -> tuple:
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in given.items()}
    loss = jk.info_nce(**leaves, **options)
    return loss.detach(), torch.autograd.grad(scale * loss, [leaves[n] for n in ("x", "y", "temperature")])


OPTIONS = (
    {},
    dict(normalize=False, label_smoothing=0.1),
    dict(duplicates=None),
    dict(label_smoothing=0.2, duplicates=None),
    dict(backend="reference", label_smoothing=0.1),
)


def equals_one_process(rank: int, world: int) -> None:
    for options in OPTIONS:
        whole = {n: t for n, t in rows(world).items() if n not in options}
        loss, (dx, dy, heat) = value_and_grads(whole, **options)
        found = value_and_grads(own(whole, rank, world), group=dist.group.WORLD, **options)
        assert torch.allclose(found[0], loss, rtol=1e-6), (options, found[0], loss)
        expected = own(dict(x=dx, y=dy, temperature=heat), rank, world)
        # Of the sum over ranks; the temperature is a leaf on each.
        for actual, one, ranks in zip(found[1], expected.values(), (world, world, 1), strict=True):
            assert torch.allclose(actual, ranks * one, rtol=1e-4, atol=1e-6 * dx.abs().max().item() * world), options


def averages_like_ddp(rank: int, world: int) -> None:
    """A shared layer's gradient, averaged over ranks, is the single-process one; ranks return the same loss."""
    whole = rows(world)
    layer = torch.nn.Linear(E, E, bias=False)
    torch.nn.init.eye_(layer.weight)

    def gradient(given: dict, **options) -> torch.Tensor:
        loss = jk.info_nce(layer(given["x"]), layer(given["y"]), 0.1, **options)
        return torch.cat([torch.autograd.grad(loss, layer.weight)[0].flatten(), loss.detach()[None]])

    one, mine = gradient(whole), gradient(own(whole, rank, world), group=dist.group.WORLD)
    dist.all_reduce(mine)
    assert torch.allclose(mine / world, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def takes_bf16_and_repeats_its_bits(rank: int, world: int) -> None:
    given = own(rows(world, torch.bfloat16), rank, world)
    first, second = (value_and_grads(given, group=dist.group.WORLD) for _ in range(2))
    assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[1], second[1]))
    assert [g.dtype for g in first[1]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    as_float = {n: t.float() if t.is_floating_point() else t for n, t in given.items()}
    loss, grads = value_and_grads(as_float, group=dist.group.WORLD)
    assert torch.equal(first[0], loss) and all(torch.equal(a, b.to(a)) for a, b in zip(first[1], grads, strict=True))


def adds_what_each_rank_asks_for(rank: int, world: int) -> None:
    given = own(rows(world), rank, world)
    plain, scaled = (value_and_grads(given, scale, group=dist.group.WORLD)[1] for scale in (1.0, 1.0 + rank))
    asked = [world, world, 1], [sum(range(1, world + 1))] * 2 + [1 + rank]
    for a, b, once, times in zip(plain, scaled, *asked, strict=True):
        assert torch.allclose(a / once * times, b, rtol=1e-5)


def disagreement_is_an_error_everywhere(rank: int, world: int) -> None:
    given = own(rows(world), rank, world)
    last = rank == world - 1
    changes = {
        "agree on E": lambda g: {**g, "x": g["x"][:, 1:], "y": g["y"][:, 1:]},
        "agree on dtype": lambda g: {**g, "x": g["x"].half(), "y": g["y"].half()},
        "agree on temperature": lambda g: {**g, "temperature": torch.tensor(0.2)},
        "agree on label_smoothing": lambda g: {**g, "label_smoothing": 0.1},
        "agree on normalize": lambda g: {**g, "normalize": False},
        "agree on duplicates": lambda g: {**g, "duplicates": None},
        "agree on requires_grad": lambda g: {**g, "x": g["x"].clone().requires_grad_()},
        "agree on backend": lambda g: {**g, "backend": "reference"},
    }
    for what, change in changes.items():
        with pytest.raises(ValueError, match=f"info_nce: group must {what}, got another on rank {world - 1} than .+; "):
            jk.info_nce(**(change(given) if last else given), group=dist.group.WORLD)
    elsewhere = f"group must have fitting arguments on every rank, got an error on rank {world - 1}; "
    for bad in (0.0, 10**400):  # of the second, float raises OverflowError
        with pytest.raises(ValueError, match=f"info_nce: {'temperature must be positive' if last else elsewhere}"):
            jk.info_nce(**{**given, "temperature": bad if last else 0.1}, group=dist.group.WORLD)


def other_leaves_are_an_error_everywhere(rank: int, world: int) -> None:
    """x needs a gradient on one rank, y on the others: none of the reference's backward would be whole."""
    given = own(rows(world), rank, world)
    given["x" if rank == 0 else "y"].requires_grad_()
    with pytest.raises(ValueError, match="group must agree on requires_grad, got another on rank 1 than on rank 0; "):
        jk.info_nce(**given, backend="reference", group=dist.group.WORLD)


def a_temperature_has_its_own_ranks_gradient(rank: int, world: int) -> None:
    """Also where what the ranks ask for adds up to 0."""
    given = own(rows(world), rank, world)
    plain = value_and_grads(given, group=dist.group.WORLD)[1]
    scale = 1.0 if rank else -(world - 1.0)
    found = value_and_grads(given, scale, group=dist.group.WORLD)[1]
    assert plain[2] != 0 and torch.allclose(found[2], scale * plain[2], rtol=1e-6)
    assert all(not grad.any() for grad in found[:2])


CHECKS = (
    equals_one_process,
    averages_like_ddp,
    takes_bf16_and_repeats_its_bits,
    adds_what_each_rank_asks_for,
    a_temperature_has_its_own_ranks_gradient,
    disagreement_is_an_error_everywhere,
    other_leaves_are_an_error_everywhere,
)


def run(rank: int, world: int, store: str) -> None:
    with gloo(rank, world, store):
        for check in CHECKS:
            check(rank, world)


@pytest.mark.parametrize("world", SIZES)
def test_ranks(world):
    with tempfile.TemporaryDirectory() as folder:
        side_by_side(run, (world, f"{folder}/store"), world)
