"""The models, one file each: a frozen config, named sizes, `loss(batch, masks)`, `load(state_dict | path)`."""
