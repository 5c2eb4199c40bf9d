"""The models, one file each: a frozen config, named sizes, `loss(batch, masks)`, `load(state_dict | path)`."""

from jepa_kernels.models import ijepa, lejepa, probes, vjepa, vjepa2, vjepa2_1, vl_jepa

__all__ = ["ijepa", "lejepa", "probes", "vjepa", "vjepa2", "vjepa2_1", "vl_jepa"]
