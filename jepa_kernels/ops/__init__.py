"""The ops, one folder each. Import them from `jepa_kernels` itself."""

# Public forms of an op that have a name of their own; `explain` knows them too.
FORMS = ("masked_attention_lse", "masked_attention_qkv", "rope_qk")
OPS = (
    "adamw_ema",
    "assemble_tokens",
    "collapse_stats",
    "distance_weights",
    "ema_update",
    "embed_patches",
    "gather_tokens",
    "grad_norm",
    "info_nce",
    "latent_loss",
    "linear",
    "masked_attention",
    "rope",
    "sigreg",
)
