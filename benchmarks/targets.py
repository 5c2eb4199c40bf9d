"""What the project asks of its own numbers. Read at the end of a run and shown; wall time never gates CI."""

from dataclasses import dataclass

from benchmarks.rows import Row


@dataclass(frozen=True)
class Target:
    """ratio >= least, in the fp32 rows of one name, pass and baseline whose workload starts so."""

    name: str
    workload: str
    stage: str
    baseline: str
    least: float
    what: str

    def matches(self, row: Row) -> bool:
        return (
            (row["name"], row["pass"], row["baseline"]) == (self.name, self.stage, self.baseline)
            and row["workload"].startswith(self.workload)
            and row["dtype"] == "float32"
        )


TARGETS = (
    Target("ema_update", "vit_s16", "forward", "loop", 2.0, "the published per-parameter loop"),
    Target("ema_update", "vit_s16", "forward", "lerp", 1.0, "_foreach_lerp_"),
    Target("latent_loss", "ijepa_vit_h14_b32", "backward", "published", 6.0, "the eager chain, batch 32"),
    Target("latent_loss", "ijepa_vit_h14_b32", "backward", "compile", 3.0, "compiled gather-first, batch 32"),
    Target("embed_patches", "ijepa_vit_h14_27", "forward", "conv", 3.0, "dense convolution + gather, 27 % kept"),
    Target("embed_patches", "ijepa_vit_h14_27", "forward", "unfold", 1.0, "unfold + index + linear, 27 % kept"),
    Target("masked_attention", "ragged_1572", "forward", "loop", 1.0, "a loop of SDPA, four sequences"),
    Target("masked_attention", "ragged_1572", "forward", "sdpa_mask", 2.5, "SDPA with a block-diagonal mask"),
    Target("masked_attention", "ragged_1572", "backward", "loop", 1.0, "a loop of SDPA, four sequences"),
    Target("masked_attention", "ragged_1572", "backward", "sdpa_mask", 2.5, "SDPA with a block-diagonal mask"),
    Target("ijepa", "vit_small_16_truncated", "step", "reference", 1.0, "the plain PyTorch training step"),
)


def check(found: list[Row]) -> list[tuple[Target, Row | None, bool | None]]:
    """Every target with the worst row that it speaks of, and whether it holds; None where nothing was measured."""
    return [(t, row, None if row is None else row["ratio"] >= t.least) for t in TARGETS for row in [_worst(t, found)]]


def _worst(target: Target, found: list[Row]) -> Row | None:
    matching = [row for row in found if row["ratio"] is not None and target.matches(row)]
    return min(matching, key=lambda row: row["ratio"], default=None)
