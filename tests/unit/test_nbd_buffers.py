"""The pool of reply slabs and receive buffers: what it keeps, and how much of it."""

from __future__ import annotations

import weakref

import pytest

from qsd.servers.nbd.buffers import POOL_BYTES, RECEIVE_SIZES, SLAB_SIZE, Pool
from qsd.servers.nbd.incoming import Incoming

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


def test_a_client_that_has_gone_leaves_no_buffer() -> None:
    """A hundred that broke off large writes left 1.5 GB, until Python looked for circles."""
    incoming = Incoming(Pool(), b"", wanted=32 << 20)
    incoming.room()
    held = weakref.ref(incoming.buffer.view)
    incoming.let_go()
    assert held() is None


def test_a_buffer_is_given_back_once() -> None:
    pool = Pool()
    incoming = Incoming(pool, b"", wanted=28)
    mine = incoming.buffer
    incoming.let_go()
    incoming.let_go()
    taken = [pool.receive(mine.size) for _client in range(3)]
    assert taken[0] is mine
    assert len(set(map(id, taken))) == 3
