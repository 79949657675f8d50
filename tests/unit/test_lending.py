"""Loans of cached pages: what is lent, what is not, and that a loan outlives the driver's descriptor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qsd.drivers.lending import LEND_MIN, Lender
from qsd.host import files
from qsd.messages import Flag, Loan, Op, ReplyQueue, Request

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> int:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(SIZE))
    path.read_bytes()
    fd = os.open(path, os.O_RDWR)
    try:
        files.is_cached(fd, 0, 4096)
    except OSError:
        pytest.skip("the kernel has no cachestat")
    return fd


def read(offset: int, length: int) -> Request:
    replies = ReplyQueue(lambda: None)
    return Request(Op.READ.value, offset, length, memoryview(bytearray(length)), replies, Flag.MAY_LEND.value)


def descriptors() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _exists(name)}


def _exists(name: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{name}")


def loan_of(request: Request) -> Loan:
    loan = request.result
    assert isinstance(loan, Loan)
    return loan


def test_cached_range_is_lent(image: int) -> None:
    lender = Lender()
    request = read(4096, 100_000)
    assert lender.lend(image, SIZE, request)
    assert request.reply.ready == [request]
    loan = loan_of(request)
    assert (loan.offset, len(loan)) == (4096, 100_000)
    assert loan.fd != image, "the driver's own descriptor carries its locks"
    assert os.pread(loan.fd, len(loan), loan.offset) == os.pread(image, 100_000, 4096)
    loan.advance(96_000)
    assert (loan.offset, len(loan)) == (100_096, 4000)
    loan.give_back()
    lender.forget()
    os.close(image)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, LEND_MIN - 1), (SIZE - LEND_MIN + 1, LEND_MIN), (SIZE, LEND_MIN)]
)
def test_small_reads_and_those_beyond_the_end_are_not(image: int, offset: int, length: int) -> None:
    lender = Lender()
    request = read(offset, length)
    assert not lender.lend(image, SIZE, request)
    assert not request.reply.ready
    lender.forget()
    os.close(image)


def test_what_is_not_cached_is_not_lent(image: int) -> None:
    os.fsync(image)
    files.drop_cache(image)
    lender = Lender()
    if files.is_cached(image, 0, SIZE):
        pytest.skip("the kernel keeps the pages")
    assert not lender.lend(image, SIZE, read(0, SIZE))
    lender.forget()
    os.close(image)


def test_loans_keep_their_descriptor_until_the_last_is_given_back(image: int) -> None:
    lender = Lender()
    name = os.readlink(f"/proc/self/fd/{image}")
    requests = [read(0, 65536), read(65536, 65536)]
    assert all(lender.lend(image, SIZE, request) for request in requests)
    first, second = map(loan_of, requests)
    assert first.fd == second.fd
    data = os.pread(image, 65536, 0)
    lender.forget()
    os.close(image)
    assert name in descriptors()
    first.give_back()
    assert os.pread(second.fd, 65536, 0) == data
    second.give_back()
    assert name not in descriptors()


def test_lender_lends_again_from_another_file(image: int, tmp_path: Path) -> None:
    lender = Lender()
    old = read(0, 65536)
    assert lender.lend(image, SIZE, old)
    lender.forget()
    (tmp_path / "other").write_bytes(b"o" * SIZE)
    other = os.open(tmp_path / "other", os.O_RDONLY)
    new = read(0, 65536)
    assert lender.lend(other, SIZE, new)
    assert os.pread(loan_of(new).fd, 3, 0) == b"ooo"
    assert os.pread(loan_of(old).fd, 65536, 0) == os.pread(image, 65536, 0)
    for request in (old, new):
        loan_of(request).give_back()
    lender.forget()
    os.close(image)
    os.close(other)


def test_kernel_that_does_not_tell_is_asked_once(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_args: object) -> bool:
        asked.append(1)
        raise OSError(38, "no such call")

    monkeypatch.setattr(files, "is_cached", refuse)
    lender = Lender()
    assert not lender.lend(image, SIZE, read(0, 65536))
    assert not lender.lend(image, SIZE, read(0, 65536))
    assert len(asked) == 1
    lender.forget()
    os.close(image)
