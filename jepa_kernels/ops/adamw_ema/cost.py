"""Bytes and FLOPs of `adamw_ema`: 40 bytes and 17 operations a parameter with a target and two shadows."""

from itertools import zip_longest
from typing import Any

from jepa_kernels.cost import Cost, elements, nbytes


def forward(
    params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, steps: Any, targets: Any,
    online_shadow: Any, target_shadow: Any, *options: Any,
) -> Cost:  # fmt: skip
    """What is trained and its moments are read and written, targets too; gradients read, shadows written.

    14 operations of a parameter that is trained: 3 of the first moment, 4 of the second, 7 of the step; 3 of a target.
    """
    others = zip_longest(targets, online_shadow, target_shadow)  # all, or none
    trained = [p for p, g in zip(params, grads, strict=True) if elements(g)]
    followed = [p for p, g, o in zip(params, grads, others, strict=False) if not elements(g) and elements(*o)]
    moved = 2 * nbytes(trained, exp_avgs, exp_avg_sqs, targets) + nbytes(followed, grads, online_shadow, target_shadow)
    return Cost(moved, 14 * elements(trained) + 3 * elements(targets))
