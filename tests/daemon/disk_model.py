"""A disk as its guest knows it."""

from __future__ import annotations

import random

from nbd_reader import NbdReader


def is_partly_zeroed(now: bytes, before: bytes | bytearray) -> bool:
    """Whether each byte is as it was, or zero."""
    if now == before or not any(now):
        return True
    half = len(now) // 2
    return half > 0 and is_partly_zeroed(now[:half], before[:half]) and is_partly_zeroed(now[half:], before[half:])


class Model:
    """A disk as a guest knows it, and random operations on both."""

    def __init__(self, data: bytes, seed: int) -> None:
        self.data = bytearray(data)
        self.rng = random.Random(seed)

    def range(self) -> tuple[int, int]:
        rng, size = self.rng, len(self.data)
        length = min(size, rng.choice((1, 512, 1000, 4096, 65536, 70_000, 200_000, 1 << 20)))
        offset = rng.randrange(size - length + 1)
        if rng.random() < 0.5:
            offset = offset // 65536 * 65536
        return offset, length

    def step(self, client: NbdReader) -> tuple[int, int] | None:
        """Do something; offset and length of what was written, zeroed or discarded."""
        offset, length = self.range()
        span = slice(offset, offset + length)
        kind = self.rng.randrange(10)
        if kind < 4:
            data = self.rng.randbytes(length)
            client.write(offset, data, fua=self.rng.random() < 0.1)
            self.data[span] = data
        elif kind < 6:
            client.write_zeroes(offset, length, may_unmap=self.rng.random() < 0.5)
            self.data[span] = bytes(length)
        elif kind < 7:
            client.trim(offset, length)
            now = client.read(offset, length)
            # A discard leaves each byte as it was or zero.
            assert is_partly_zeroed(now, self.data[span])
            self.data[span] = now
        elif kind < 9:
            assert client.read(offset, length) == self.data[span], (offset, length)
        else:
            client.flush()
        return (offset, length) if kind < 7 else None
