"""The models, one file each: a frozen config, named sizes, `loss(batch, masks)`, `load(state_dict | path)`."""

from jepa_kernels.models import (
    ijepa,
    lejepa,
    lewm,
    probes,
    vjepa,
    vjepa2,
    vjepa2_1,
    vjepa2_ac,
    vl_jepa,
    world,
    world_losses,
)

__all__ = [
    "ijepa",
    "lejepa",
    "lewm",
    "probes",
    "vjepa",
    "vjepa2",
    "vjepa2_1",
    "vjepa2_ac",
    "vl_jepa",
    "world",
    "world_losses",
]
