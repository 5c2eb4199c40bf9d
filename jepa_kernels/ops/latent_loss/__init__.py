"""Distance between predicted and target latents."""
