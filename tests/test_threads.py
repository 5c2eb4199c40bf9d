"""The bits do not depend on the thread count: inputs above every size at which cpu kernels share out work or stream."""

import pytest
import torch

from jepa_kernels import _C
from jepa_kernels._core.case import Case
from jepa_kernels._core.select import short
from jepa_kernels.ops import OPS
from jepa_kernels.testing import DTYPES, cast, hold, op_module, poisoned_memory, public, run, upcast

THREADS = (1, 2, 3, 5)
LEVELS = [level for level in ("avx2", "avx512", "avx512_bf16") if _C.set_isa(level)]
_C.set_isa("best")


def ema_update(generator):
    shapes = ((3, 5), (400, 1501), (120_001,), (1,))
    target, online = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2))
    return dict(target=target, online=online, momentum=0.996, shadow=[torch.zeros(s).bfloat16() for s in shapes])


def large(op, name, grads, make, *arguments, dtypes=DTYPES, **options):
    """Parameters of the test: one call of `make` in the op's cases, in each dtype."""
    case = Case(name, getattr(op_module(op, "cases"), make)(*arguments, **options), grads)
    return [pytest.param(op, case, dtype, id=f"{op}-{name}-{short(dtype)}") for dtype in dtypes]


EMBED = op_module("embed_patches", "cases")
IMAGES, CLIPS = EMBED.Images(4, 3, (10, 10), 14, 130), EMBED.Images(4, 3, (3, 6, 6), 8, 70, tubelet=2, uint8=True)
EMA = Case("shards", ema_update, mutates=("target", "shadow"), keep=("target",))
SHARDS = dict(shapes=((3, 5), (400, 301), (70_001,), (1,)))
ADAMW = op_module("adamw_ema", "cases")
LENGTHS = (60, 0, 100, 41, 75, 100, 1, 90)  # two masks of four images
WIDE, ROWS, LOW_ROWS = 1024, 2_301, 4_301  # rows of which fp32 and bf16 outputs are streamed
STREAMED = 8 << 20  # bytes; of fewer, none are
LOW = (torch.float32, torch.bfloat16)
ASSEMBLED, MANY = ("context", "mask_token"), (75, 900, 1, 90) * 3
EACH = [
    *(
        pytest.param("adamw_ema", ADAMW.case(name, ADAMW.make(**SHARDS | options)), dtype, id=f"{name}-{short(dtype)}")
        for name, options in (
            ("adamw_ema-shards", dict(shadows=(torch.bfloat16, torch.float16), missing=4)),
            ("adamw_ema-streamed", dict(shapes=((2_301, 1001),), targets=False, shadows=(torch.bfloat16, None))),
        )
        for dtype in DTYPES
    ),
    *large("assemble_tokens", "packed", ASSEMBLED, "packed", LENGTHS[:4], MANY, 130, count=1000, groups=3, unused=9),
    *large("assemble_tokens", "streamed", ASSEMBLED, "packed", (600, 1500), (1300, 1000), WIDE, dtypes=LOW),
    *large("collapse_stats", "rows", (), "embeddings", 5000, 200),
    *large(
        "distance_weights",
        "packed",
        (),
        "packed",
        (8, 16, 16),
        (900, 1, 0, 333),
        (700, 9, 5, 1111),
        1250,
        dtypes=LOW[:1],
    ),
    *(pytest.param("ema_update", EMA, dtype, id=f"ema_update-{short(dtype)}") for dtype in DTYPES),
    *large("embed_patches", "packed", ("pixels", "weight", "bias", "pos_embed"), "packed", IMAGES, LENGTHS, 480),
    *large("embed_patches", "clips", EMBED.LAYER, "packed", CLIPS, LENGTHS, 480, dtypes=DTYPES[:2]),
    *large("gather_tokens", "packed", ("x",), "packed", 4, 300, 200, LENGTHS, 480),
    *large("gather_tokens", "streamed", ("x",), "rectangular", 1, LOW_ROWS, WIDE, 2, ROWS, dtypes=LOW),
    *large("grad_norm", "shards", (), "make", **SHARDS),
    *large("info_nce", "pairs", ("x", "y", "temperature"), "pairs", 700, 330, items=300, label_smoothing=0.125),
    *large("latent_loss", "packed", ("pred",), "packed", 4, 300, 200, LENGTHS, 480),
    *large("latent_loss", "streamed", ("pred",), "packed", 1, 3000, WIDE, (3000, LOW_ROWS - 3000), dtypes=LOW),
    *large(
        "latent_loss", "levels", ("pred",), "packed", 4, 300, 264, LENGTHS, levels=2, kind="l1", power=3.0, dtypes=LOW
    ),
    *large("linear", "layer", ("x", "weight", "bias"), "layer", 1_030, 330, width=290, dtypes=LOW[:1]),
    *large("linear", "deep", ("x", "weight", "bias"), "layer", 3, 40, 1_700, width=130, dtypes=LOW[:1]),
    *large("masked_attention", "packed", ("q", "k", "v"), "packed", (0, 300, 1, 241, 64), (4, 2), 24, unused=5),
    *large("sigreg", "tiles", ("z",), "embeddings", 2, 700, 130, slices=300),
    *large("rope", "packed", ("x",), "packed", 700, 3, 64, pairing="tiled"),
]


def test_every_op_has_a_large_case():
    assert {row.values[0] for row in EACH} == set(OPS)
    assert ROWS * WIDE * 4 > STREAMED and LOW_ROWS * WIDE * 2 > STREAMED


@pytest.fixture
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    _C.set_isa("best")


def runs(op, case, drawn, dtype):
    """The case's results for every thread count."""
    for threads in THREADS:
        torch.set_num_threads(threads)
        with poisoned_memory():
            yield run(public(op, "cpu"), cast(drawn, dtype, "cpu", case.keep), case)


@pytest.mark.parametrize("op, case, dtype", EACH)
def test_any_thread_count_gives_the_same_bits_within_the_error_budget(op, case, dtype, restored):
    reference, caps = op_module(op, "reference"), getattr(op_module(op, "cases"), "CAPS", {})
    drawn = case.make(torch.Generator().manual_seed(0))
    exact = run(reference.forward, upcast(cast(drawn, dtype, "cpu", case.keep)), case)
    eager = run(reference.forward, cast(drawn, dtype, "cpu", case.keep), case)
    for level in LEVELS:
        assert _C.set_isa(level)
        first, *others = runs(op, case, drawn, dtype)
        for threads, other in zip(THREADS[1:], others, strict=True):
            for name, expected in first.items():
                assert torch.equal(other[name], expected), f"{level}, {threads} threads: {name}"
        for name, actual in first.items():
            parity = hold(name, actual, exact[name], eager[name], caps.get(dtype, float("inf")))
            assert parity.ok, f"{level} {parity}"
