"""The parts of a training run: its processes, what each step shows to them, the networks as they share them, saves."""
