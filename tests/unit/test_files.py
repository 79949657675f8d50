"""What files are asked for while others change them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qsd.host import files


@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("offset", [512, 1000])
def test_zeroes_up_to_a_new_end_cut_nothing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_unmap: bool, looks: int, offset: int
) -> None:
    """They are written on a thread: the file may have grown since its length was looked at."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * 1000, 0)
    looked: list[int] = []

    def fstat(which: int, _real: Callable[[int], os.stat_result] = os.fstat) -> os.stat_result:
        found = _real(which)
        looked.append(found.st_size)
        if len(looked) == looks:
            os.pwrite(which, b"later", 4096)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat)
        result = files.zero_range(
            fd, offset, 1024 - offset, may_unmap=may_unmap, no_fallback=False, is_device=False
        )
    os.close(fd)
    if result:
        pytest.skip("a file system that zeroes no ranges")
    assert (tmp_path / "file").read_bytes() == b"x" * offset + (
        bytes(4096 - offset) + b"later" if len(looked) >= looks else bytes(1024 - offset)
    )


def test_zeroes_behind_the_end_make_the_file_longer(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert files.zero_range(fd, 1 << 20, 512, may_unmap=True, no_fallback=False, is_device=False) == 0
    assert os.fstat(fd).st_size == (1 << 20) + 512
    assert not any(os.pread(fd, 512, 1 << 20))
    os.close(fd)


def test_empty_file_has_the_alignment_of_one_that_is_not(tmp_path: Path) -> None:
    found = []
    for content in (b"", bytes(8192)):
        path = tmp_path / f"{len(content)}"
        path.write_bytes(content)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            pytest.skip("no O_DIRECT here")
        with os.fdopen(fd, "rb", closefd=True):
            if files.direct_alignment_told(fd) is None:
                pytest.skip("the file system does not tell")
            found.append(files.probe_direct_alignment(fd, is_device=False))
    assert found[0] == found[1]
