"""Packed bits at another granularity: every bit joined from several, or every bit made several. From tables.

Bit n is bit n % 8 of byte n // 8.
"""

from __future__ import annotations


def _coarser_byte(step: int, part: int, byte: int) -> int:
    """The bits that byte number ``part`` of ``2**step`` sets in the byte they are joined to."""
    factor = 1 << step
    width = 8 // factor
    group = (1 << factor) - 1
    return sum(1 << (part * width + i) for i in range(width) if byte >> (i * factor) & group)


def _finer_byte(step: int, part: int, byte: int) -> int:
    """Byte number ``part`` of the ``2**step`` that ``byte`` becomes."""
    factor = 1 << step
    width = 8 // factor
    group = (1 << factor) - 1
    return sum(group << (i * factor) for i in range(width) if byte >> (part * width + i) & 1)


# By the logarithm of the factor (three bits at most at a time: a byte to a bit), then by the byte's place.
_COARSER = {k: tuple(bytes(_coarser_byte(k, j, b) for b in range(256)) for j in range(1 << k)) for k in (1, 2, 3)}
_FINER = {k: tuple(bytes(_finer_byte(k, j, b) for b in range(256)) for j in range(1 << k)) for k in (1, 2, 3)}


def coarser(data: bytes, steps: int) -> bytes:
    """Join every ``2**steps`` bits to one; ``data`` is a multiple of as many bytes."""
    while steps:
        step = min(3, steps)
        joined = 0
        for part, table in enumerate(_COARSER[step]):
            joined |= int.from_bytes(data[part :: 1 << step].translate(table), "little")
        data = joined.to_bytes(len(data) >> step, "little")
        steps -= step
    return data


def finer(data: bytes, steps: int) -> bytes:
    """Make every bit ``2**steps`` bits."""
    while steps:
        step = min(3, steps)
        made = bytearray(len(data) << step)
        for part, table in enumerate(_FINER[step]):
            made[part :: 1 << step] = data.translate(table)
        data = bytes(made)
        steps -= step
    return data
