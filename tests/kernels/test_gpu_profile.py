"""A profile on a GPU: steps end with the kernels that they launched, though the host has long gone on."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.profiling.report import Report
from tests.test_profile import roofs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 5


def test_marked_steps_hold_all_of_their_kernels():
    a, ids = torch.randn(8192, 8192, device="cuda"), torch.arange(64, device="cuda").expand(8, 64).contiguous()
    tokens = torch.randn(8, 256, 1024, device="cuda")

    def step():
        a @ a
        jk.gather_tokens(tokens, ids)

    step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with jk.profile() as p:
        begin.record()
        for _ in range(STEPS):
            step()
            p.step()
        end.record()
    s = Report(p.events(), p._notes, roofs, str, {}).summary
    ops = {op.label: op for op in s.ops}
    assert (s.device, s.steps) == ("cuda", STEPS)
    assert ops["mm"].calls == pytest.approx(1) and ops["gather_tokens forward"].calls == pytest.approx(1)
    assert ops["mm"].flops == pytest.approx(2 * 8192**3)
    assert ops["mm"].seconds <= s.seconds and s.seconds == pytest.approx(begin.elapsed_time(end) / 1e3 / STEPS, rel=0.2)
