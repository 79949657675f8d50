"""The sealed child when its cipher fails: nothing that is not encrypted goes down, and nothing sealed comes up."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qsd.drivers.base import SECTOR
from qsd.drivers.luks.sealed import SealedChild, Sealer
from qsd.host.memory import AlignedPool
from qsd.messages import Op, ReplyQueue, Request


class Cipher:
    """Has no memory for what it is asked to do."""

    def __init__(self, *, is_fast: bool) -> None:
        self.is_fast = is_fast

    def encrypt(self, _runs: object) -> None:
        raise MemoryError

    decrypt = encrypt


class Engine:
    """Runs at once what threads would."""

    def call(self, function: Callable[[], int], done: Callable[[int], None]) -> None:
        try:
            result = function()
        except MemoryError:
            result = -errno.EIO  # as ``ThreadPool`` has it
        done(result)

    def defer(self, function: Callable[[], None]) -> None:
        function()


class Below:
    """Takes everything and ends it."""

    def __init__(self) -> None:
        self.written = 0

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            self.written += request.op == Op.WRITE
            request.complete()


@pytest.mark.parametrize(("is_fast", "error"), [(True, errno.ENOMEM), (False, errno.EIO)])
def test_request_whose_cipher_fails_fails(is_fast: bool, error: int) -> None:
    """On a thread, what the buffer had held before was written in place of what was to be encrypted."""
    driver: Any = SimpleNamespace(host=SimpleNamespace(aio=Engine()), in_flight=0)
    driver.finished = lambda: setattr(driver, "in_flight", driver.in_flight - 1)
    cipher: Any = Cipher(is_fast=is_fast)
    below: Any = Below()
    sealed = SealedChild(Sealer(driver, cipher), below)
    replies = ReplyQueue(lambda: None)
    sealed.submit(
        [
            Request(op.value, place * SECTOR, SECTOR, memoryview(bytearray(SECTOR)), replies)
            for place, op in enumerate((Op.WRITE, Op.READ, Op.WRITE, Op.READ))
        ]
    )
    assert [request.error for request in replies.ready] == [error] * 4
    assert not below.written
    assert not driver.in_flight


def test_write_without_memory_for_its_ciphertext_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was counted before there was any: draining the node waited for ever."""

    def take(_pool: AlignedPool, _length: int) -> tuple[memoryview, int]:
        raise OSError(errno.ENOMEM, "as arranged")

    monkeypatch.setattr(AlignedPool, "take", take)
    driver: Any = SimpleNamespace(host=SimpleNamespace(aio=Engine()), in_flight=0)
    cipher: Any = Cipher(is_fast=True)
    below: Any = Below()
    replies = ReplyQueue(lambda: None)
    request = Request(Op.WRITE.value, 0, SECTOR, memoryview(bytearray(SECTOR)), replies)
    SealedChild(Sealer(driver, cipher), below).submit([request])
    assert [(request.error, below.written, driver.in_flight)] == [(errno.ENOMEM, 0, 0)]
    assert replies.ready == [request]
