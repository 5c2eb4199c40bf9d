"""Files written whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(path: Path) -> None:
    """Before the work: OSError where `replacing(path)` has no place to write."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not _is_special(path):
        beside = _beside(Path(os.path.realpath(path)))
        beside.touch()
        beside.unlink()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which then takes its place: a full disk or a crash leaves the old one whole.

    A link's file is replaced, not the link; what is no file (a device, a FIFO) is written to as it is.
    """
    if _is_special(path):
        yield path
        return
    path = Path(os.path.realpath(path))
    beside = _beside(path)
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
