"""The CUDA kernels of embed_patches with no GPU: their own sources and binding, built for the host.

tests/kernels/emulation stands in for CUDA: threads that change over at barriers, and products by warps. Loads
that are not aligned fault. Memory is poisoned, so that an element that no thread writes shows.
"""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels._core.case import Case
from jepa_kernels.ops.embed_patches.cases import CASES, EVERY, LAYER, Images, packed, rectangular
from jepa_kernels.testing import cast, check_case, map_tensors, poisoned_memory, public, run
from tests.kernels.on_host import CSRC, HERE, build, take_for_cuda

pytestmark = pytest.mark.compile
OP = "embed_patches"
EMULATION = HERE / "emulation"
SOURCES = (
    EMULATION / "patches.cpp",
    EMULATION / "matrix.cpp",
    CSRC / OP / "cuda_backward.cu",
    CSRC / OP / "cuda_forward.cu",
)
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    flags = ("-mf16c", "-mfma", "-ffp-contract=off")
    return build(tmp_path_factory.mktemp("patches"), "patches", EMULATION, dict.fromkeys(SOURCES, "-O2"), *flags)


@pytest.fixture(autouse=True)
def _cuda_backend_on_the_host(emulated, monkeypatch):
    take_for_cuda(monkeypatch, OP, emulated)


def draw(case, dtype=torch.bfloat16):
    return cast(case.make(torch.Generator().manual_seed(0)), dtype, "cpu")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shared_cases_are_within_the_error_budget(case):
    for dtype in LOW:
        for parity in check_case(OP, "cuda", case, dtype):
            assert parity.ok, f"{dtype} {parity}"


TILES = (  # more than one tile of rows, outputs and pixels; every width of a load; several parts of the rows
    Case("wide", packed(Images(2, 3, (12, 8), 8, 136), [70, 96, 40, 1], rows=230), EVERY),
    Case("pairs", rectangular(Images(2, 3, (6, 5), 14, 130, normalise=True), 3, 22), EVERY),
    Case("odd", packed(Images(3, 2, (8, 9), 5, 131), [72, 30, 60]), EVERY),
    Case("bytes", packed(Images(2, 3, (12, 8), 8, 40, uint8=True), [70, 96]), LAYER),
    Case("parts", packed(Images(40, 1, (8, 8), 2, 24), [64] * 40 + [20] * 40), EVERY),
)


@pytest.mark.parametrize("case", TILES, ids=lambda case: case.name)
def test_several_tiles_are_within_the_error_budget(case):
    for parity in check_case(OP, "cuda", case, torch.bfloat16):
        assert parity.ok, str(parity)


def spread(_, x):
    """Rows further apart than they are long, NaN between them."""
    if not x.is_floating_point():
        return x
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def transpose(_, x):
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.is_floating_point() else x


@pytest.mark.parametrize("layout", [spread, transpose])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("packed_p16", "clips_normalised")], ids=lambda c: c.name
)
def test_strided_tensors_have_the_bits_of_contiguous_ones(case, layout):
    plain = run(public(OP, "cuda"), draw(case), case)
    assert same(plain, run(public(OP, "cuda"), map_tensors(draw(case), layout), case))


def test_images_have_the_bits_they_have_alone_beside_others_full_of_nan():
    images = Images(3, 3, (4, 4), 14, 72)
    inputs = draw(Case("", packed(images, [5, 16, 9]), EVERY))
    ids, starts = inputs["ids"], inputs["packing"].cu_seqlens.tolist()
    with poisoned_memory():
        together = jk.embed_patches(**inputs, backend="cuda")
        for image in range(3):
            rows = slice(starts[image], starts[image + 1])
            pixels = torch.full_like(inputs["pixels"], float("nan"))
            pixels[image] = inputs["pixels"][image]
            beside = jk.embed_patches(**{**inputs, "pixels": pixels}, backend="cuda")
            alone = {**inputs, "pixels": pixels[image : image + 1], "ids": ids[rows]}
            alone["packing"] = Packing.from_lengths([starts[image + 1] - starts[image]])
            assert torch.equal(beside[rows], together[rows])
            assert torch.equal(jk.embed_patches(**alone, backend="cuda"), together[rows])


def test_dropped_patches_are_never_read():
    case = Case("", rectangular(Images(1, 3, (2, 2), 8, 24), 1, 2), EVERY)
    inputs = draw(case)
    inputs["ids"] = torch.tensor([[0, 3]])
    clean = run(public(OP, "cuda"), dict(inputs), case)
    inputs["pixels"] = inputs["pixels"].detach().clone()
    inputs["pixels"][..., :8, 8:] = float("nan")
    inputs["pixels"][..., 8:, :8] = float("nan")
    assert same(clean, run(public(OP, "cuda"), inputs, case))


def test_gradients_that_are_expanded_have_the_bits_of_written_ones():
    inputs = draw(CASES[0])
    leaves = [inputs[name].requires_grad_() for name in EVERY]
    out = jk.embed_patches(**inputs, backend="cuda")
    expanded = torch.ones((), dtype=out.dtype).expand_as(out)
    first = torch.autograd.grad(out, leaves, expanded, retain_graph=True)
    second = torch.autograd.grad(out, leaves, expanded.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_limit_gives_its_reason():
    where = f"{OP}: backend 'cuda' must be able to run this call, got: "
    with pytest.raises(jk.BackendError, match=where + "takes bfloat16, float16, got float32"):
        jk.embed_patches(**draw(CASES[0], torch.float32), backend="cuda")
    inputs = dict(pixels=torch.zeros(1, 65, 2, 2).bfloat16(), ids=None, weight=torch.zeros(4, 65, 2, 2).bfloat16())
    with pytest.raises(jk.BackendError, match=where + "takes mean and std of at most 64 channels, got 65"):
        jk.embed_patches(**inputs, mean=[0.0] * 65, std=[1.0] * 65, backend="cuda")
    with pytest.raises(ValueError, match=f"{OP}: mean and std must be of at most 64 channels; call the public"):
        torch.ops.jepa_kernels.embed_patches_forward(*inputs.values(), *(None,) * 3, [1.0] * 65, [0.0] * 65, "cuda")


def test_until_measured_it_is_taken_only_when_named():
    lines = jk.explain(OP, **draw(CASES[0])).splitlines()
    assert lines[1].split(maxsplit=1) == ["cuda", "not yet measured on a device: taken only when named"]
