"""The ops, one folder each. Import them from `jepa_kernels` itself."""

# Public forms of an op that have a name of their own; `explain` knows them too.
FORMS = ("masked_attention_lse", "masked_attention_qkv", "rope_qk")
OPS = (
    "assemble_tokens",
    "collapse_stats",
    "ema_update",
    "embed_patches",
    "gather_tokens",
    "latent_loss",
    "masked_attention",
    "rope",
    "sigreg",
)
