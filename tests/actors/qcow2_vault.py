"""LUKS inside qcow2 images that are made and opened in memory: one key for all, and no thread that derives it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final

from qsd.drivers.luks.header import serialise_header
from qsd.drivers.luks.volume import FormatOptions, Formatted, format_volume, open_volume
from qsd.drivers.qcow2 import encryption

PASSWORD: Final = b"s"
# The smallest there is: half a MiB.
OPTIONS: Final = FormatOptions(cipher_alg="aes-128", cipher_mode="cbc", iter_time=0)


async def _on_the_spot(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def derive_on_the_spot() -> None:
    """From now on images are opened without a thread, which would end when it likes."""
    encryption.open_volume = partial(open_volume, run=_on_the_spot)


@cache
def luks_area() -> bytes:
    """A LUKS header and its key slots, the first of which ``PASSWORD`` opens."""
    work = format_volume(OPTIONS, PASSWORD, run=_on_the_spot)
    try:
        work.send(None)
    except StopIteration as done:
        formatted: Formatted = done.value
    area = bytearray(OPTIONS.area_bytes)
    header = serialise_header(formatted.header)
    slot = formatted.header.slots[0].offset
    area[: len(header)] = header
    area[slot : slot + len(formatted.material)] = formatted.material
    return bytes(area)
