"""Faults in the Triton kernels."""

from tests.faults.fault import Fault


def of(op: str, kind: str, what: str, old: str, new: str, file: str = "triton.py") -> Fault:
    return Fault(op, "triton", file, kind, what, old, new)


TRITON = [
    of("adamw_ema", "unreset state", "a skipped step moves the second moment",
       "tl.store(exp_avg_sq + i, v, mask=moved)", "tl.store(exp_avg_sq + i, v, mask=mask)"),
    of("assemble_tokens", "wrong group", "mask tokens are chosen by context, not by sequence",
       "token = mask_token + (s // per_token)", "token = mask_token + (own // per_token)"),
    of("collapse_stats", "unmasked tail", "rows past the last count as deviations",
       "d = tl.where((n < rows)[:, None], x - shift, 0.0)", "d = x - shift"),
    of("distance_weights", "missing sequence", "of a block that spans sequences the last is left out",
       "range(tl.min(run), tl.max(tl.where(inside, run, -1)) + 1)",
       "range(tl.min(run), tl.maximum(tl.max(tl.where(inside, run, -1)), tl.min(run) + 1))"),
    of("ema_update", "dropped tail", "a last element that is alone in its block is left alone",
       "for start in range(whole, count, THREADS):", "for start in range(whole, count - 1, THREADS):"),
    of("embed_patches", "wrong stride", "a bias is read as if it were contiguous",
       "tl.load(bias + e.to(tl.int64) * bias_channel", "tl.load(bias + e.to(tl.int64)", "triton_forward.py"),
    of("gather_tokens", "wrong sequence", "sequences are taken as image-major",
       "token = (run % batch).to(tl.int64) * x_image", "token = (run // (runs // batch)).to(tl.int64) * x_image"),
    of("gather_tokens", "truncating cast", "bf16 gradients are cut off instead of rounded",
       "    tl.store(dx + at, total.to(",
       "    if dx.dtype.element_ty == tl.bfloat16:\n"
       "        total = (total.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)\n"
       "    tl.store(dx + at, total.to("),
    of("grad_norm", "lost precision", "squares are taken in fp32",
       ".to(tl.float32).to(tl.float64)\n    return x * x", ".to(tl.float32)\n    return (x * x).to(tl.float64)"),
    of("info_nce", "wrong logarithm", "sums of entries stay in powers of two",
       "other=0.0).to(tl.float64), 0) * LN2", "other=0.0).to(tl.float64), 0)", "triton_forward.py"),
    of("latent_loss", "unmasked tail", "lanes past the last channel count in the variance",
       "tail = tl.where(there, tail, 0.0)", "tail = tail * 1.0"),
    of("latent_loss", "wrong mean", "masks without rows count in the mean over masks",
       "tl.maximum(filled, 1).to(tl.float32)", "tl.maximum(masks, 1).to(tl.float32)"),
    of("masked_attention", "stale accumulator", "earlier blocks of keys are not rescaled when the top rises",
       "total = add_products(times(total, fade), weights,", "total = add_products(total, weights,",
       "triton_forward.py"),
    of("masked_attention", "wrong logarithm", "log-sum-exps stay in powers of two",
       "(top + tl.log2(weight)) * LN2", "(top + tl.log2(weight))", "triton_forward.py"),
    of("masked_attention", "wrong head", "every query head of a group takes the first one's statistics",
       "its = offsets + lse_head.to(tl.int64) * 2 * h", "its = offsets", "triton_backward.py"),
    of("rope", "swapped pairing", "gradients of neighbours turn as the rows did, not back",
       "if BACK:  # the transpose", "if BACK and HALF:  # the transpose"),
    of("sigreg", "unmasked tail", "rows past the last count in every moment",
       "real = tl.where(there[None, :], 1.0, y * 0.0)", "real = y * 0.0 + 1.0", "triton_kernels.py"),
]  # fmt: skip
