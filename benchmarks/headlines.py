"""What the README says of the committed results: a row or two for each op and model, and where the rest is."""

from benchmarks import rows, tables, targets, text
from benchmarks.tables import Document

# (name, workload, pass, baseline) of targets, in fp32: the published form, and the best short one
HEADLINES = (
    ("linear", "vit_l_fc1", "backward", "mkl"),
    ("masked_attention", "ijepa_vit_h14_contexts", "backward", "loop"),
    ("masked_attention", "vjepa2_ac_frames", "backward", "sdpa_prefixes"),
    ("rope", "vjepa2_vit_l_masked", "forward", "published"),
    ("rope", "vjepa2_vit_l_masked", "forward", "compile"),
    ("embed_patches", "vjepa2_vit_l_31", "backward", "conv"),
    ("embed_patches", "vjepa2_vit_l_31", "backward", "unfold"),
    ("gather_tokens", "ijepa_vit_h14_b32", "backward", "repeat"),
    ("gather_tokens", "ijepa_vit_h14_b32", "backward", "index_select"),
    ("assemble_tokens", "vjepa2_both_masks", "forward", "published"),
    ("assemble_tokens", "vjepa2_both_masks", "forward", "cat"),
    ("assemble_tokens", "ijepa_b32_packed", "backward", "index_copy"),
    ("latent_loss", "ijepa_vit_h14_b128", "backward", "published"),
    ("latent_loss", "ijepa_vit_h14_b128", "backward", "compile"),
    ("distance_weights", "vjepa21_16x256", "forward", "cdist"),
    ("distance_weights", "vjepa21_16x256", "forward", "amin"),
    ("info_nce", "b4096", "backward", "published"),
    ("info_nce", "b4096", "backward", "logsumexp"),
    ("sigreg", "n512_e512_k1024", "backward", "published"),
    ("sigreg", "n512_e512_k1024", "backward", "compile"),
    ("collapse_stats", "vit_s16_b64", "forward", "eager"),
    ("collapse_stats", "vit_s16_b64", "forward", "short"),
    ("ema_update", "vit_b16", "forward", "loop"),
    ("ema_update", "vit_b16_bf16_shadow", "forward", "lerp"),
    ("adamw_ema", "vit_b16", "forward", "fused"),
    ("grad_norm", "vit_b16", "forward", "clip"),
    ("masks", "multiblock2d_b128", "forward", "published"),
    ("masks", "multiblock3d_b24", "forward", "published"),
    ("encoder", "vjepa2_vit_s_two_masks_per_token", "backward", "loop"),
    ("ijepa", "vit_small_16_truncated", "step", "reference"),
    ("ijepa", "vit_small_16_truncated", "step", "sdpa"),
    ("ijepa", "vit_small_16_packed", "step", "reference"),
    ("ijepa", "vit_small_16_packed", "step", "sdpa"),
    ("vjepa2", "vit_l_4_layers_truncated", "step", "reference"),
    ("vjepa2", "vit_l_4_layers_packed_per_token", "step", "published"),
    ("lejepa", "train_digits", "step", "recipe"),
    ("vjepa2_ac", "predictor_384_6_layers", "forward", "published"),
    ("vl_jepa", "videos_1_to_16_frames", "backward", "padded"),
    ("huggingface", "vjepa2_vit_l_4_layers", "backward", "unpatched"),
)
PAGE = "docs/measured.md"


def held(document: Document) -> list[tuple[targets.Target, rows.Row | None]]:
    """The headlines of a machine's results, with the worst row of each; None where it was not measured."""
    found = {(t.name, t.workload, t.stage, t.baseline): (t, row) for t, row, _ in targets.check(document["rows"])
             if t.dtype != "bfloat16"}  # fmt: skip
    return [found[headline] for headline in HEADLINES if headline in found]


def on_cpus(documents: dict[str, Document]) -> list[Document]:
    """Machines that have a row of these."""
    return [d for d in tables.machines(documents).values() if any(row for _, row in held(d))]


def section(documents: dict[str, Document]) -> str:
    """Between the README's markers."""
    return "\n\n".join(filter(None, (speed(on_cpus(documents)), probes(documents), others(documents))))


def speed(shown: list[Document]) -> str:
    """A column for each machine."""
    if not shown:
        return ""
    cells = []
    for same in zip(*map(held, shown), strict=True):
        target = same[0][0]
        stage = {"backward": "forward + backward"}.get(target.stage, target.stage)
        cells.append((f"`{target.name}`", f"{target.what}; {stage}", *(one(row) for _, row in same)))
    columns = [f"{d['machine']['cpu']}, {d['machine']['isa']}" for d in shown]
    return "\n".join(
        [*tables.table(("", "against", *columns), cells), "",
         f"![How many times faster, with intervals]({PAGE.removesuffix('.md')}/speedups.svg)", "",
         f"Every row that we hold ourselves to, and the rooflines of both machines: [{PAGE}]({PAGE})."]
    )  # fmt: skip


def one(row: rows.Row | None) -> str:
    if row is None:
        return "-"
    took = text.duration(row["ours_us"]["p50"]) + (" a token" if row["kind"] == "model, per token" else "")
    rate = f", {row['tokens_per_s']:.0f} tokens/s" if row.get("tokens_per_s") else ""
    return f"**{text.times(row['ratio'])}** ({text.interval(row)}), {took}{rate}"


def probes(documents: dict[str, Document]) -> str:
    """What training is worth, by a linear map of the features."""
    cells = []
    for model, name in tables.PROBES.items():
        if f"{model}-probe" in documents:
            asked = documents[f"{model}-probe"]["probes"][0]
            of = asked.get("linear") or asked["held out"]
            against, difference = [k for k in of if k not in ("trained", "raw_pixels")][:2]
            title = f"`train {model}` ({name}): {asked['question']}"
            also = "" if against == "random_init" else f", of a {against.replace('_', ' ')}"
            trained, other, apart = (tables.score(of[k]) for k in ("trained", against, difference))
            raw = tables.score(of["raw_pixels"]) if "raw_pixels" in of else "-"
            cells.append((title, trained, other + also, apart, raw))
    if not cells:
        return ""
    asked = "run, and what is asked of features"
    columns = asked, "trained", "random initialisation", "difference, paired", "raw pixels"
    return "\n".join(tables.table(columns, cells))


def others(documents: dict[str, Document]) -> str:
    """A line for each of what is measured besides."""
    links = [f"[{title.lower()}]({PAGE}#{title.lower().replace(' ', '-')})" for name, (_, title, _) in
             tables.ALONE.items() if name in documents]  # fmt: skip
    plans = [f"[planning]({PAGE}#planning)"] if any(name.endswith("-plan") for name in documents) else []
    return f"Measured besides: {', '.join([*plans, *links])}." if plans or links else ""
