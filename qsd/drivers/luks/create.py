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
# Preallocation that takes space. ``metadata`` is nothing in a volume that is one with its header.
ALLOCATING = ("falloc", "full")
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
            await _resize(host, header, formatted.header.area_bytes, "off")
            await formatted.write(ChildArea(header))
    elif options.header is None:
        async with host.node(options.file) as file:
            formatted = await _format(host, options, is_detached=False)
            size = formatted.header.area_bytes + options.size
            if preallocation in ALLOCATING and file.length > size:
                raise QmpError("Cannot use preallocation for shrinking files")
            await _resize(host, file, size, preallocation)
            await formatted.write(ChildArea(file))
    else:
        async with host.node(options.file) as file, host.node(options.header) as header:
            formatted = await _format(host, options, is_detached=True)
            if preallocation == "metadata" or (preallocation in ALLOCATING and file.length > options.size):
                # It has no metadata that could be written beforehand, and needs no space for what it loses.
                raise QmpError(errno_text(errno.EOPNOTSUPP))
            await _resize(host, file, options.size, preallocation)
            await _resize(host, header, formatted.header.area_bytes, "off")
            await formatted.write(ChildArea(header))


async def _format(host: CreateHost, options: BlockdevCreateOptionsLUKS, *, is_detached: bool) -> Formatted:
    if options.key_secret is None:
        raise QmpError("Parameter 'key-secret' is required for cipher")
    password = host.secret(options.key_secret)
    wanted = FormatOptions.from_qapi(options)
    if options.size > MAX_LENGTH - wanted.area_bytes:
        raise QmpError(TOO_LARGE)
    return await format_volume(wanted, password, is_detached=is_detached)


async def _resize(host: CreateHost, node: Child, size: int, preallocation: str) -> None:
    """Let a node have ``size`` bytes, a device at least; what it holds there stays, new space is taken."""
    old = node.length
    try:
        await node.truncate(size, exact=False)
    except QmpError as error:
        if errno_text(errno.EFBIG) in error.desc:
            raise QmpError(TOO_LARGE) from None
        raise
    if preallocation in ALLOCATING:
        await _allocate(host, node, old, size - old, is_full=preallocation == "full")


async def _allocate(host: CreateHost, node: Child, start: int, length: int, *, is_full: bool) -> None:
    """Reserve space, or write zero bytes all over it (``is_full``)."""
    zeroes = bytes(PIECE)
    for done in range(0, length, PIECE):
        host.progress(done, length)
        size = min(PIECE, length - done)
        if is_full:
            await node.write(start + done, zeroes[:size])
        else:
            await node.write_zeroes(start + done, size)
    await node.flush()
