"""What the cuda row of KERNELS can't run, and why. A call is described by how many channels are normalised."""

MOST_CHANNELS = 64  # whose scale and shift a launch carries


def few_channels(normalised: int) -> str | None:
    if normalised > MOST_CHANNELS:
        return f"takes mean and std of at most {MOST_CHANNELS} channels, got {normalised}"
    return None


def only_named(normalised: int) -> str | None:
    return "not yet measured on a device: taken only when named"
