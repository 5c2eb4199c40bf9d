"""The public forms that JEPA kernels are measured against, at JEPA's shapes. Needs torch alone.

Each generator yields `Form`s; `small` shrinks batches and lengths so that a CPU finishes. Inputs are made when a form's
turn comes and freed after it. Floors count each input read once and each output written once; a multiply-add is two
operations, and "backward" is forward + backward.
"""

from benchmarks.rival_forms import attention, latents, weights
from benchmarks.rival_forms.form import Form

__all__ = ["Form", "forms"]
GROUPS = (
    attention.dense_attention, attention.ragged_attention, attention.block_causal_attention, weights.weight_updates,
    latents.latent_loss, latents.patch_embedding, latents.contrastive, latents.sigreg, latents.rope,
    latents.nearest_distance,
)  # fmt: skip


def forms(small: bool) -> list[Form]:
    """Every form, those that compile last."""
    return sorted((form for group in GROUPS for form in group(small)), key=lambda f: f.compiles)
