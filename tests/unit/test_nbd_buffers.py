"""The pool of reply slabs and receive buffers: what it keeps, and how much of it."""

from __future__ import annotations

import pytest

from qsd.servers.nbd.buffers import POOL_BYTES, RECEIVE_SIZES, SLAB_SIZE, Pool

MIB = 1 << 20


@pytest.mark.parametrize("size", [100, MIB + 32])
def test_buffers_of_common_requests_are_used_again(size: int) -> None:
    pool = Pool()
    slab, receive = pool.slab(size), pool.receive(size)
    assert len(slab.view) >= size
    assert len(receive.view) >= size
    slab.used = 10
    pool.give_back(slab)
    pool.give_back(receive)
    assert pool.slab(size) is slab
    assert not slab.used
    assert pool.receive(size) is receive


def test_enormous_buffers_are_let_go() -> None:
    pool = Pool()
    slab, receive = pool.slab(20 * MIB), pool.receive(20 * MIB)
    pool.give_back(slab)
    pool.give_back(receive)
    assert pool.slab(20 * MIB) is not slab
    assert pool.receive(20 * MIB) is not receive


def test_pool_keeps_a_bounded_amount() -> None:
    pool = Pool()
    buffers = [pool.slab(MIB) for _ in range(30)] + [pool.receive(MIB) for _ in range(30)]
    for buffer in buffers:
        pool.give_back(buffer)
    for make, size in ((pool.slab, SLAB_SIZE), (pool.receive, RECEIVE_SIZES[-1])):
        kept = {id(make(MIB)) for _ in range(30)} & set(map(id, buffers))
        assert POOL_BYTES // size <= len(kept) <= POOL_BYTES // size + 1
