"""The ops, one folder each. Import them from `jepa_kernels` itself."""

OPS = ("ema_update", "embed_patches", "gather_tokens", "latent_loss", "masked_attention")
