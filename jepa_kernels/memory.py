"""Memory that outputs of CPU kernels have left; see csrc/common/blocks.h."""

from jepa_kernels._core import extension


def empty_cache() -> None:
    """Give back to the system the memory that waits for the next large outputs of CPU kernels.

    Outputs of 4 MiB and more lie in blocks that are kept when their tensors end, and taken by later outputs of about
    their size: the system clears pages before it gives them, which takes longer than to fill them. No more waits than
    lived at once since the last call of this, or 256 MiB; torch's own tensors can't take it: call this where memory is
    short. Tensors that live are not touched. Those in blocks can't be resized to more than they have, and torch's
    profiler does not see them. On Linux alone; on a GPU torch keeps memory itself: torch.cuda.empty_cache.
    """
    module = extension.load()
    if not isinstance(module, str):
        module.release_blocks()
