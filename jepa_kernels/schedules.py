"""Learning-rate, weight-decay and momentum schedules, as plain functions of the step.

`step` counts from 0: it is the number of finished steps. The published learning-rate and weight-decay schedules
advance before the forward, so that the first step already uses their value at 1; the momentum starts at 0.
`total` is the published T_max = ipe_scale * steps: with ipe_scale > 1 the run ends before the schedules do.

Source: Assran et al. (arXiv:2301.08243), appendix A, and the published code, where nothing else is named.
"""

import math


def learning_rate(step: int, *, start: float, peak: float, final: float, warmup: int, total: int) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then a half cosine to `final` at `total`."""
    step += 1
    if step < warmup:
        return start + step / warmup * (peak - start)
    progress = (step - warmup) / max(1, total - warmup)
    return max(final, final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_stable_decay(
    step: int, *, start: float, peak: float, final: float, warmup: int, anneal: int, total: int
) -> float:
    """Linear from `start` to `peak` over `warmup` steps, `peak`, then linear to `final` over the last `anneal` steps.

    anneal = 0: constant after the warm-up. anneal = total, without a warm-up: V-JEPA 2's cooldown.
    Source: V-JEPA 2 (arXiv:2506.09985) and its published code, which trains the action-conditioned predictor so.
    """
    step += 1
    if step < warmup:
        return start + step / warmup * (peak - start)
    into = step - (total - anneal)
    return peak if into <= 0 or anneal == 0 else peak + min(into / anneal, 1.0) * (final - peak)


def weight_decay(step: int, *, start: float, final: float, total: int) -> float:
    """A half cosine from `start` to `final` at `total`."""
    value = final + (start - final) * 0.5 * (1 + math.cos(math.pi * (step + 1) / total))
    return max(final, value) if final <= start else min(final, value)


def momentum(step: int, *, start: float, final: float, total: int) -> float:
    """Linear from `start` at step 0 to `final` at `total`, and `final` from there on (V-JEPA 2.1 stops there too)."""
    return start + min(step, total) * (final - start) / total


def momentum_cosine(step: int, *, start: float, final: float, total: int) -> float:
    """A half cosine from `start` at step 0 to `final` at `total`, and `final` from there on.

    Source: BYOL (arXiv:2006.07733) section 3.3, with final = 1.
    """
    return final - (final - start) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def context_weight(step: int, *, final: float = 0.5, start: int = 15000, end: int = 30000) -> float:
    """0 before step `start`, then linear to `final` at step `end`, and `final` from there on; at once for start = end.

    Source: V-JEPA 2.1 (arXiv:2603.14482), the weight of the loss on context tokens.
    """
    if not start < step < end:
        return final if step >= end else 0.0
    return final * (step - start) / (end - start)


def momentum_constant(step: int, *, start: float) -> float:
    """`start` at every step. Source: V-JEPA 2 (arXiv:2506.09985), 0.99925."""
    return start


def momentum_warmup(
    step: int,
    *,
    decay: float,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_warmup: bool = False,
    gamma: float = 1.0,
    power: float = 2 / 3,
) -> float:
    """0 (a copy) up to step update_after_step + 1, then decay; with warm-up 1 - (1 + n / gamma)^-power before that.

    n: steps after update_after_step + 1. With warm-up the value stays in [min_decay, decay], min_decay winning.
    Source: `timm.utils.ModelEmaV3`, whose steps count from 1.
    """
    n = step - update_after_step - 1
    if n <= 0:
        return 0.0
    return max(min_decay, min(decay, 1 - (1 + n / gamma) ** -power)) if use_warmup else decay
