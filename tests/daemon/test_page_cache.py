"""The page cache at hand-over: an image that another host has written is not read from what is remembered of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Qmp, RunningDaemon

from qsd.host import files

Start = Callable[..., RunningDaemon]
SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image whose pages can be dropped and are all in the cache."""
    path = tmp_path / "img"
    path.write_bytes(b"x" * SIZE)
    with path.open("rb") as file:
        files.drop_cache(file.fileno())
        if files.has_cached_pages(file.fileno(), SIZE):
            pytest.skip("the file system keeps its pages")
    path.read_bytes()
    assert is_cached(path)
    return path


def is_cached(path: Path) -> bool:
    with path.open("rb") as file:
        return files.has_cached_pages(file.fileno(), SIZE)


def hand_over(qmp: Qmp, image: Path, **options: bool) -> None:
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image), **options)
    qmp.execute("blockdev-set-active", node_name="f", active=False)
    assert is_cached(image)
    qmp.execute("blockdev-set-active", node_name="f", active=True)


def test_activation_drops_the_page_cache(daemon: Start, image: Path) -> None:
    hand_over(daemon().qmp(), image, x_check_cache_dropped=True)
    assert not is_cached(image)


def test_drop_cache_off_keeps_it(daemon: Start, image: Path) -> None:
    hand_over(daemon().qmp(), image, drop_cache=False, x_check_cache_dropped=True)
    assert is_cached(image)


def test_pages_that_stay_are_an_error_if_asked_for(daemon: Start, image: Path) -> None:
    qmp = daemon().qmp()
    with image.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapped:
        assert mapped[0] == mapped[-1] == ord("x")  # mapped pages cannot be dropped
        hand_over(qmp, image)
        qmp.execute("blockdev-del", node_name="f")
        qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image), x_check_cache_dropped=True)
        qmp.execute("blockdev-set-active", node_name="f", active=False)
        refusal = qmp.refusal("blockdev-set-active", node_name="f", active=True)
    assert refusal == "page cache still in use!"
    assert [node["active"] for node in qmp.execute("query-named-block-nodes")] == [False]
    qmp.execute("blockdev-set-active", node_name="f", active=True)
    qmp.execute("blockdev-del", node_name="f")


def test_cached_pages_are_found_behind_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MINCORE_WINDOW", 4 * mmap.PAGESIZE)
    path = tmp_path / "img"
    path.write_bytes(b"x" * (13 * mmap.PAGESIZE + 5))
    with path.open("r+b") as file:
        fd, size = file.fileno(), os.path.getsize(path)
        files.drop_cache(fd)
        if files.has_cached_pages(fd, size):
            pytest.skip("the file system keeps its pages")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        os.pread(fd, 1, size - 1)
        assert files.has_cached_pages(fd, size)
        assert not files.has_cached_pages(fd, size - 5)
