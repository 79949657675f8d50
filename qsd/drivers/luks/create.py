"""blockdev-create for ``luks``: a new volume in one node, or its header in one and its data in another."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qsd.drivers.base import Child
from qsd.drivers.creating import CreateHost
from qsd.drivers.luks.volume import ChildArea, FormatOptions, Formatted, format_volume
from qsd.errors import QmpError, errno_text

if TYPE_CHECKING:
    from qsd.qapi.schema.luks import BlockdevCreateOptionsLUKS

MAX_LENGTH = (1 << 63) - 1
TOO_LARGE = "The requested file size is too large"
# How much is preallocated between two looks at whether the job was cancelled.
PIECE = 1 << 20


async def create_luks(host: CreateHost, options: BlockdevCreateOptionsLUKS) -> None:
    """Format a volume. Raises QmpError in the reference's words.

    The keys are made before anything is written; an image that was there stays until then.
    """
    if options.file is None and options.header is None:
        raise QmpError("Either the parameter 'header' or 'file' must be specified")
    preallocation = "off" if options.preallocation is None else options.preallocation.value
    if options.file is None and preallocation != "off":
        raise QmpError("Parameter 'preallocation' requires 'file' to be specified for formatting LUKS disk")
    try:
        await _create(host, options, preallocation)
    except OSError as error:
        raise QmpError(f"Could not write the LUKS volume: {errno_text(error.errno or errno.EIO)}") from None


async def _create(host: CreateHost, options: BlockdevCreateOptionsLUKS, preallocation: str) -> None:
    if options.file is None:
        async with host.node(options.header) as header:
            formatted = await _format(host, options, is_detached=True)
            await _write(header, formatted, 0)
    elif options.header is None:
        async with host.node(options.file) as file:
            formatted = await _format(host, options, is_detached=False)
            start = formatted.header.payload_offset
            await _write(file, formatted, options.size)
            await _allocate(host, file, start, options.size, preallocation)
    else:
        async with host.node(options.file) as file, host.node(options.header) as header:
            formatted = await _format(host, options, is_detached=True)
            await _write(header, formatted, 0)
            if preallocation == "metadata":
                # The file's word: it has no metadata that could be written beforehand.
                raise QmpError(errno_text(errno.EOPNOTSUPP))
            await file.truncate(options.size)
            await _allocate(host, file, 0, options.size, preallocation)


async def _format(host: CreateHost, options: BlockdevCreateOptionsLUKS, *, is_detached: bool) -> Formatted:
    if options.key_secret is None:
        raise QmpError("Parameter 'key-secret' is required for cipher")
    password = host.secret(options.key_secret)
    wanted = FormatOptions.from_qapi(options)
    if options.size > MAX_LENGTH - wanted.area_bytes:
        raise QmpError(TOO_LARGE)
    return await format_volume(wanted, password, is_detached=is_detached)


async def _write(node: Child, formatted: Formatted, payload: int) -> None:
    try:
        await node.truncate(formatted.header.area_bytes + payload)
    except QmpError as error:
        if errno_text(errno.EFBIG) in error.desc:
            raise QmpError(TOO_LARGE) from None
        raise
    await formatted.write(ChildArea(node))


async def _allocate(host: CreateHost, node: Child, start: int, length: int, preallocation: str) -> None:
    """Take space for the payload: reserved (falloc), or written (full). ``metadata`` is nothing here."""
    if preallocation not in ("falloc", "full"):
        return
    zeroes = bytes(PIECE)
    for done in range(0, length, PIECE):
        host.progress(done, length)
        size = min(PIECE, length - done)
        if preallocation == "full":
            await node.write(start + done, zeroes[:size])
        else:
            await node.write_zeroes(start + done, size)
    await node.flush()
