"""`files.replacing`: whole or not at all, and only what is a file is replaced."""

import os
import stat
import threading
from pathlib import Path

import pytest

from jepa_kernels.files import check_writable, replacing
from jepa_kernels.profiling.report import Report


def write(path, text):
    with replacing(path) as beside:
        beside.write_text(text)


def test_an_error_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a"
    write(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_links_file_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "deep").mkdir()
    target, link = tmp_path / "deep" / "a", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and os.listdir(tmp_path / "deep") == ["a"]


@pytest.fixture
def fifo(tmp_path):
    """A FIFO and what arrives there. Tests replace no device: were one lost, it would be the machine's."""
    path, read = tmp_path / "fifo", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()), daemon=True)
    reader.start()
    yield path, lambda: (reader.join(10), read)[1]
    assert stat.S_ISFIFO(os.stat(path).st_mode)


def test_what_is_no_file_is_written_to(fifo, tmp_path):
    path, arrived = fifo
    link = tmp_path / "link"
    link.symlink_to(path)
    check_writable(link)
    write(link, "through")
    assert arrived() == ["through"] and link.is_symlink()


def test_a_trace_goes_through_too(fifo):
    def export(name):  # as torch's does
        Path(name + ".tmp").write_text("trace")
        os.replace(name + ".tmp", name)

    Report([], [], lambda device: {}, export, {}).trace(fifo[0])
    assert fifo[1]() == ["trace"]


def test_what_can_not_be_written_is_known_before(tmp_path):
    check_writable(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    for path in (tmp_path, tmp_path / "no" / "a", tmp_path / ("x" * 252)):
        with pytest.raises(OSError):
            check_writable(path)
