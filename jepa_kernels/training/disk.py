"""Files of checkpoints: written by torch.distributed.checkpoint, counted on their way, published by a rename."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

PIECE = 1 << 20  # bytes


class Writer(dcp.FileSystemWriter):
    """Counts what it writes, and publishes it as the last thing that a save does: its errors are the save's."""

    def __init__(self, folder: Path, publish: Callable[[dict[str, list[int]]], None]) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)  # the copies are on the CPU: no stream of a GPU
        self.fs = self._disk = _Disk()
        self._publish = publish

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = _Written(super().write_data(plan, planner).value())
        written.files = self._disk.files
        future: Any = torch.futures.Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        files = {name: told for written in results for name, told in written.files.items()}
        self._publish(dict(sorted({**files, **self._disk.files}.items())))


class _Written(list):
    """What a rank wrote, with {file: [size, crc32]}, on its way to the first one."""

    files: dict[str, list[int]]


class _Disk(FileSystem):
    """.files: {name: [size, crc32]} of what was written."""

    def __init__(self) -> None:
        self.files: dict[str, list[int]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with open(path, mode) as file:
            stream = _Stream(file)
            try:
                yield stream
            finally:
                stream.check()
        self.files[Path(path).name] = [stream.size, stream.crc]

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class _Stream:
    """A file that is counted. It keeps an error until `check`: torch.save would raise another one in its place."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.crc = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.size, self.crc = self.size + count, zlib.crc32(data, self.crc)
        self._try(partial(self.file.write, data))
        return count

    def flush(self) -> None:
        self._try(self.file.flush)

    close = flush

    def _try(self, action: Callable[[], Any]) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = error

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self.flush()
        self.check()
        return self.file.fileno()


def sync(folder: Path) -> None:
    """The names in a folder reach the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """What has the name of a checkpoint is never half of one."""
    gone = path.with_name(f".{path.name}.old.part")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def measure(path: Path) -> list[int]:
    """[size, crc32] of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]
