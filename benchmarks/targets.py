"""What the project asks of its own numbers. Read at the end of a run and shown; wall time never gates CI."""

from dataclasses import dataclass

from benchmarks.rows import Row


@dataclass(frozen=True)
class Target:
    """ratio >= least, in the rows of one name, pass, baseline and dtype whose workload starts so; and where that is
    asked, our own time at most most_us microseconds (`timed`: the baseline's, where it is ours too), at least
    least_share of the machine's measured peak, and our peak of memory at most most_memory of the baseline's. least 0:
    no ratio is asked. On a GPU a workload is named in full."""

    name: str
    workload: str
    stage: str
    baseline: str
    least: float
    what: str
    dtype: str = "float32"
    device: str = "cpu"
    most_us: float | None = None
    most_memory: float | None = None
    least_share: float | None = None
    timed: str = "ours_us"

    def matches(self, row: Row) -> bool:
        return (
            (row["name"], row["pass"], row["baseline"]) == (self.name, self.stage, self.baseline)
            and (row["workload"].startswith if self.device == "cpu" else row["workload"].__eq__)(self.workload)
            and (row["dtype"], row["device"]) == (self.dtype, self.device)
        )

    def holds(self, row: Row) -> bool:
        quick = self.most_us is None or row[self.timed]["p50"] <= self.most_us
        used, share = memory_share(row), row["share_of_peak"]
        small = self.most_memory is None or (used is not None and used <= self.most_memory)
        near = self.least_share is None or (share is not None and share >= self.least_share)
        return row["ratio"] >= self.least and quick and small and near


def memory_share(row: Row) -> float | None:
    """Our peak of memory as a share of the baseline's, where both were measured."""
    ours, theirs = row.get("peak_bytes"), row.get("baseline_peak_bytes")
    return None if ours is None or not theirs else ours / theirs


def attention(
    workload: str,
    baseline: str,
    forward: float,
    backward: float,
    what: str,
    dtype: str = "float32",
    least_share: float | None = None,
) -> tuple[Target, Target]:
    """Of both passes; least_share: of the forward pass."""
    what += ", bf16" if dtype == "bfloat16" else ""
    passes = (("forward", forward, least_share), ("backward", backward, None))
    return tuple(Target("masked_attention", workload, p, baseline, least, what, dtype, least_share=share)
                 for p, least, share in passes)  # fmt: skip


def loss(workload: str, baseline: str, single: float, low: float | None, what: str) -> tuple[Target, ...]:
    """Forward and backward, in fp32 and in bf16."""
    dtypes = (("float32", single, ""), ("bfloat16", low, ", bf16"))
    return tuple(Target("latent_loss", workload, "backward", baseline, least, what + also, dtype)
                 for dtype, least, also in dtypes if least is not None)  # fmt: skip


def ema(workload: str, loop: float, lerp: float, least_share: float | None = None) -> tuple[Target, Target]:
    """With no shadow, which the rows with one are held to as well."""
    return (
        Target("ema_update", workload, "forward", "loop", loop, "the published per-parameter loop"),
        Target("ema_update", workload, "forward", "lerp", lerp, "_foreach_lerp_", least_share=least_share),
    )


def layer(workload: str, what: str) -> tuple[Target, Target]:
    """Of both passes."""
    return tuple(Target("linear", workload, p, "mkl", 1.1, f"F.linear, {what}") for p in ("forward", "backward"))


def embedding(workload: str, baseline: str, least: float, what: str) -> tuple[Target, Target]:
    """Of both passes."""
    return tuple(Target("embed_patches", workload, p, baseline, least, what) for p in ("forward", "backward"))


def patched(workload: str, least: float, what: str) -> tuple[Target, Target]:
    """Inference and training."""
    return tuple(Target("huggingface", workload, p, "unpatched", least, what) for p in ("forward", "backward"))


def on_gpu(
    name: str,
    workload: str,
    stage: str,
    baseline: str,
    least: float,
    most_us: float | None = None,
    dtype: str = "bfloat16",
    *,
    most_memory: float | None = None,
) -> Target:
    """Of an H200, in bf16 where nothing else is said."""
    what = baseline if most_us is None else f"{baseline} (asked: {most_us:g} us)"
    return Target(name, workload, stage, baseline, least, what, dtype, "cuda", most_us, most_memory)


def rope(baseline: str, single: float, low: float, what: str) -> tuple[Target, Target]:
    """In fp32 and in bf16."""
    dtypes = (("float32", single, ""), ("bfloat16", low, ", bf16"))
    return tuple(Target("rope", "vjepa2_vit_l_masked", "forward", baseline, least, what + also, dtype)
                 for dtype, least, also in dtypes)  # fmt: skip


def masks(workload: str, what: str) -> Target:
    return Target("masks", workload, "forward", "published", 50.0, what, "int64", most_us=1000)


TARGETS = (
    *ema("vit_s16", 2.0, 1.0),
    *ema("vit_b16", 2.2, 1.0, least_share=0.85),
    Target("ema_update", "vit_ti16", "forward", "lerp", 1.3, "_foreach_lerp_"),
    Target("ema_update", "vit_b16_bf16_shadow", "forward", "lerp", 1.25, "_foreach_lerp_ and _foreach_copy_"),
    Target("ema_update", "tiny_1000", "forward", "lerp", 1.0, "_foreach_lerp_, 1000 tensors of 64", most_us=400),
    Target(
        *("ema_update", "tiny_1000", "forward", "table", 0.0, "our own prepared table, 1000 tensors of 64"),
        most_us=400,
        timed="baseline_us",
    ),
    Target("adamw_ema", "vit_b16", "forward", "fused", 1.05, "fused AdamW, _foreach_lerp_"),
    Target("adamw_ema", "vit_b16_bf16_shadows", "forward", "fused", 1.2, "fused AdamW, _foreach_lerp_, two casts"),
    Target("grad_norm", "vit_b16", "forward", "clip", 1.5, "clip_grad_norm_'s norm"),
    Target("gather_tokens", "ijepa_vit_h14_b32", "forward", "repeat", 10.0, "torch.gather, index repeated, batch 32"),
    Target("gather_tokens", "ijepa_vit_h14_b32", "backward", "repeat", 5.0, "torch.gather, index repeated, batch 32"),
    Target("gather_tokens", "ijepa_vit_h14_b32", "forward", "index_select", 1.0, "index_select, batch 32"),
    Target("gather_tokens", "ijepa_vit_h14_b32", "backward", "index_select", 1.5, "index_select, batch 32"),
    Target(
        "assemble_tokens", "vjepa2_both_masks", "forward", "published", 10.0, "repeat, gather, cat and sort, 2 masks"
    ),
    Target("assemble_tokens", "vjepa2_both_masks", "forward", "cat", 1.0, "expand and cat, 2 masks"),
    Target("assemble_tokens", "ijepa_b32", "forward", "published", 5.0, "repeat, gather and cat, 4 masks"),
    Target("assemble_tokens", "ijepa_b32_packed", "forward", "index_copy", 1.5, "gathered positions and index_copy"),
    Target("assemble_tokens", "ijepa_b32_packed", "backward", "index_copy", 1.5, "gathered positions and index_copy"),
    *loss("ijepa_vit_h14_b32", "published", 6.0, None, "the eager chain, batch 32"),
    *loss("ijepa_vit_h14_b32", "compile", 3.0, None, "compiled gather-first, batch 32"),
    *loss("ijepa_vit_h14_b128", "published", 14.0, 20.0, "the eager chain, batch 128"),
    *loss("ijepa_vit_h14_b128", "compile", 4.0, None, "compiled gather-first, batch 128"),
    *loss("vjepa2_vit_g_b8", "published", 12.0, 12.0, "the eager chain of both norms, 8 clips"),
    *loss("vjepa2_vit_g_b8", "compile", 4.0, None, "compiled gather-first, 8 clips"),
    Target("distance_weights", "vjepa21_16x256", "forward", "cdist", 3.0, "torch.cdist and min"),
    Target("distance_weights", "vjepa21_16x256", "forward", "amin", 1.5, "torch.cdist and amin"),
    Target("info_nce", "b4096", "forward", "published", 1.1, "the whole matrix and two cross-entropies, 4096 pairs"),
    Target("info_nce", "b4096", "backward", "published", 1.1, "the whole matrix and two cross-entropies, 4096 pairs"),
    Target("info_nce", "b4096", "backward", "logsumexp", 1.0, "the whole matrix and two logsumexps, 4096 pairs"),
    *embedding("ijepa_vit_h14_27", "conv", 3.0, "dense convolution + gather, 27 % kept"),
    *embedding("ijepa_vit_h14_27", "unfold", 1.15, "unfold + index + linear, 27 % kept"),
    *embedding("ijepa_vit_h14_27_uint8", "float", 1.0, "our own on float pixels"),
    *embedding("vjepa2_vit_l_31", "conv", 5.0, "two dense convolutions + gathers, 31 % kept"),
    *embedding("vjepa2_vit_l_31", "unfold", 1.15, "unfold + index + linear, 31 % kept"),
    *embedding("vjepa2_vit_l_31_uint8", "float", 1.0, "our own on float pixels"),
    *layer("vit_s_fc1", "4096 rows, 384 to 1536"),
    *layer("vit_s_gelu", "4096 rows, 384 to 1536, GELU"),
    *layer("vit_l_fc1", "2048 rows, 1024 to 4096"),
    *layer("vit_l_fc2", "2048 rows, 4096 to 1024"),
    *layer("planner_qkv", "1056 rows, 384 to 1152"),
    *attention("ragged_1572", "loop", 1.2, 1.2, "a loop of SDPA, four sequences"),
    *attention("ragged_1572", "sdpa_mask", 2.5, 2.5, "SDPA with a block-diagonal mask"),
    *attention("ragged_1572", "loop", 1.8, 2.2, "a loop of SDPA, four sequences", "bfloat16"),
    *attention("ijepa_vit_h14_contexts", "loop", 1.5, 1.5, "a loop of SDPA, 32 contexts"),
    *attention("ijepa_vit_h14_contexts", "loop", 2.2, 4.0, "a loop of SDPA, 32 contexts", "bfloat16"),
    *attention("ijepa_vit_h14_predictor", "loop", 1.5, 1.5, "a loop of SDPA, 64 predictor sequences"),
    *attention("ijepa_vit_h14_predictor", "sdpa_padded", 1.5, 1.5, "padded SDPA, 64 predictor sequences"),
    Target("masked_attention", "vjepa2_vit_l_target", "forward", "sdpa", 1.0, "SDPA, 2 x 1024", least_share=0.70),
    *attention("vjepa2_vit_l_target", "sdpa", 1.5, 1.2, "SDPA, 2 x 1024", "bfloat16", least_share=0.45),
    *attention("vjepa2_ac_frames", "sdpa_mask", 1.6, 1.5, "SDPA with a mask of 4 frames"),
    *attention("vjepa2_ac_frames", "sdpa_prefixes", 1.0, 1.0, "SDPA frame by frame, no mask"),
    Target("masked_attention", "vjepa2_vit_l_rope", "forward", "rope_qk", 1.0, "our rope, then our attention"),
    Target("masked_attention", "vjepa2_vit_l_rope", "forward", "rope_then_sdpa", 1.15, "rope before SDPA"),
    Target(
        "masked_attention", "vjepa2_vit_l_qkv", "backward", "views", 1.0, "three gradients, stacked, bf16", "bfloat16"
    ),
    Target("encoder", "vjepa2_vit_s_two_masks_per_token", "backward", "loop", 1.3, "the published loop over masks"),
    masks("multiblock2d_b128", "the published Python collator"),
    masks("multiblock3d_b24", "the published Python collators"),
    *rope("published", 8.0, 6.0, "the eager formula of q and k, masked clips"),
    *rope("compile", 1.0, 1.0, "the formula of q and k, compiled"),
    Target(
        *("sigreg", "n512_e512_k1024", "backward", "published", 10.0, "the eager chain, 1024 slices drawn a step"),
        most_memory=0.05,
    ),
    Target("sigreg", "n512_e512_k1024", "backward", "compile", 2.0, "the chain on given slices, compiled"),
    Target(
        *("sigreg", "views8_n64_e64_k1024", "backward", "published", 5.0, "the eager chain, eight views of 64 images"),
        most_memory=0.05,
    ),
    Target("collapse_stats", "vit_s16_b64", "forward", "eager", 1.5, "each number by itself, 64 x 196 latents"),
    Target("collapse_stats", "vit_s16_b64", "forward", "short", 1.5, "the same by norms and a product"),
    Target("ijepa", "vit_small_16_truncated", "step", "reference", 1.0, "plain PyTorch, softmax written out"),
    Target("ijepa", "vit_small_16_truncated", "step", "sdpa", 1.0, "plain PyTorch around SDPA"),
    Target("ijepa", "vit_small_16_packed", "step", "reference", 1.0, "plain PyTorch, packed, softmax written out"),
    Target("ijepa", "vit_small_16_packed", "step", "sdpa", 1.0, "plain PyTorch around SDPA, packed"),
    Target("vjepa2", "vit_l_4_layers_truncated", "step", "reference", 1.35, "plain PyTorch, softmax written out"),
    Target(
        *("vjepa2", "vit_l_4_layers_packed_per_token", "step", "reference", 1.35),
        "plain PyTorch, packed, softmax written out",
    ),
    Target("vjepa2", "vit_l_4_layers_packed_per_token", "step", "published", 1.0, "the published loop, packed"),
    Target("lejepa", "vit_tiny_16_64px", "step", "recipe", 1.3, "a batch for each size, eager SIGReg"),
    Target("lejepa", "train_digits", "step", "recipe", 1.3, "a batch for each size, eager SIGReg"),
    Target("vjepa2_ac", "predictor_384_6_layers", "forward", "published", 3.0, "the published planner, two iterations"),
    Target("vl_jepa", "videos_1_to_16_frames", "backward", "padded", 1.4, "the same blocks, padded to the longest"),
    *patched("vjepa2_vit_l_4_layers", 1.15, "the same model, unpatched"),
    # Four layers, or one where a processor has no bf16 products: whichever was measured.
    Target("huggingface", "vjepa2_vit_l_", "forward", "unpatched", 1.3, "the same, bf16", "bfloat16"),
    Target("huggingface", "vjepa2_vit_l_encoder", "forward", "unpatched", 5.0, "all 2048 tokens, where 400 are kept"),
)

# A backward pass is timed together with its forward pass. Of attention, 1.3 x the best of torch's own.
ON_GPU = (
    on_gpu("masked_attention", "ijepa_vit_h14_target_b128", "forward", "sdpa_cudnn", 1.3, 120),
    on_gpu("masked_attention", "ijepa_vit_h14_target_b128", "backward", "sdpa_cudnn", 1.3, 500),
    on_gpu("masked_attention", "ijepa_vit_h14_contexts_b128", "forward", "varlen", 1.3, 52),
    on_gpu("masked_attention", "ijepa_vit_h14_contexts_b128", "backward", "varlen", 1.3),
    on_gpu("masked_attention", "ijepa_vit_h14_predictor_b128", "forward", "sdpa_cudnn", 1.3, 65),
    on_gpu("masked_attention", "ijepa_vit_h14_predictor_b128", "backward", "sdpa_cudnn", 1.3),
    on_gpu("masked_attention", "vjepa2_predictor_b24", "forward", "sdpa_cudnn", 1.3, 260),
    on_gpu("masked_attention", "vjepa2_predictor_b24", "backward", "sdpa_cudnn", 1.3),
    on_gpu("masked_attention", "vjepa2_vit_l_target_b24", "forward", "sdpa", 1.0, 1031),  # 400 TFLOP/s
    on_gpu("masked_attention", "vjepa2_vit_l_target_b24", "forward", "sdpa_cudnn", 1.0, 1031),
    on_gpu("masked_attention", "vjepa2_vit_l_target_b24", "backward", "sdpa", 1.0, 4467),  # and 300 backward
    on_gpu("rope", "vjepa2_vit_g_clip_b24", "forward", "compile", 1.0, 170),
    on_gpu("embed_patches", "ijepa_vit_h14_27_b128", "forward", "unfold", 1.15, 30),
    on_gpu("embed_patches", "ijepa_vit_h14_27_b128", "backward", "unfold", 1.15),
    on_gpu("gather_tokens", "ijepa_vit_h14_b128", "forward", "index_select", 1.0),
    on_gpu("gather_tokens", "ijepa_vit_h14_b128", "backward", "index_select", 1.5),
    on_gpu("latent_loss", "ijepa_vit_h14_b128_42", "backward", "gather_first", 4.0, 55),
    on_gpu("sigreg", "n4096_e512_k1000", "forward", "published", 10.0, 60, "float32"),
    on_gpu("info_nce", "vl_jepa_b24k", "forward", "published", 1.1, 3400),  # half as long again as its product
    on_gpu("ema_update", "vit_h14", "forward", "lerp", 1.0, 1960, "float32"),
    on_gpu("ema_update", "vit_h14_bf16_shadow", "forward", "lerp", 1.25, 2300, "float32"),
    on_gpu("ema_update", "vit_g16", "forward", "lerp", 1.0, 3100, "float32"),
    on_gpu("ema_update", "vit_g16_bf16_shadow", "forward", "lerp", 1.25, 3650, "float32"),
    on_gpu("adamw_ema", "vit_h14_bf16_shadows", "forward", "fused", 1.2, 6600, "float32"),
    on_gpu("grad_norm", "vit_h14", "forward", "clip", 1.5, None, "float32"),
    on_gpu("ijepa", "vit_h14_b128_truncated", "step", "compile", 1.05, 185_000),
    on_gpu("ijepa", "vit_h14_b128_truncated", "step", "reference", 1.5, most_memory=1.0),
    on_gpu("ijepa", "vit_h14_b128_truncated", "step", "sdpa", 1.0, most_memory=1.0),
    on_gpu("ijepa", "vit_h14_b128_packed", "step", "compile", 1.3),
    on_gpu("vjepa2", "vit_l_b24_truncated", "step", "compile", 1.3, 200_000),
    on_gpu("vjepa2", "vit_l_b24_truncated", "step", "reference", 1.8, most_memory=1.0),
    on_gpu("vjepa2", "vit_l_b24_packed_per_token", "step", "compile", 1.3),
    on_gpu("vjepa2_ac", "vit_giant_400_samples_2_steps", "forward", "published", 5.0, 3_000_000),
    on_gpu("vjepa2_ac", "vit_giant_400_samples_2_steps", "forward", "published_autocast", 1.6),
)


def check(found: list[Row]) -> list[tuple[Target, Row | None, bool | None]]:
    """Every target of the device that was measured, with the worst row that it speaks of (one that does not hold goes
    first), and whether it holds; None where nothing was measured."""
    cuda = any(row["device"] == "cuda" for row in found)
    asked = ON_GPU if cuda else TARGETS
    return [(t, row, None if row is None else t.holds(row)) for t in asked for row in [_worst(t, found)]]


def _worst(target: Target, found: list[Row]) -> Row | None:
    matching = [row for row in found if row["ratio"] is not None and target.matches(row)]
    return min(matching, key=lambda row: (target.holds(row), row["ratio"]), default=None)
