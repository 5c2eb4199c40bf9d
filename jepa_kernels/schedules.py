"""Learning-rate, weight-decay and momentum schedules of I-JEPA, as plain functions of the step.

`step` counts from 0: it is the number of finished steps. The published learning-rate and weight-decay schedules
advance before the forward, so that the first step already uses their value at 1; the momentum starts at 0.
`total` is the published T_max = ipe_scale * steps: with ipe_scale > 1 the run ends before the schedules do.

Source: Assran et al. (arXiv:2301.08243), appendix A, and the published code.
"""

import math


def learning_rate(step: int, *, start: float, peak: float, final: float, warmup: int, total: int) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then a half cosine to `final` at `total`."""
    step += 1
    if step < warmup:
        return start + step / warmup * (peak - start)
    progress = (step - warmup) / max(1, total - warmup)
    return max(final, final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def weight_decay(step: int, *, start: float, final: float, total: int) -> float:
    """A half cosine from `start` to `final` at `total`."""
    value = final + (start - final) * 0.5 * (1 + math.cos(math.pi * (step + 1) / total))
    return max(final, value) if final <= start else min(final, value)


def momentum(step: int, *, start: float, final: float, total: int) -> float:
    """Linear from `start` at step 0 to `final` at `total`."""
    return start + step * (final - start) / total
