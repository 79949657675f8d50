"""blockdev-create for ``qcow2``: what the options ask for, and writing it into a protocol node.

The header's first sector is written last, when everything else is on the disk: a creation that was cut off leaves
no image, neither the new one nor what stood there.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from qsd.drivers.base import Child
from qsd.drivers.creating import CreateHost
from qsd.drivers.luks.volume import FormatOptions, Formatted, format_volume
from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.encryption import crypto_area
from qsd.drivers.qcow2.extensions import Extension
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.new_image import NewImage, Placement, header_cluster, metadata, place
from qsd.errors import QmpError, failing
from qsd.wire import modified_utf8

if TYPE_CHECKING:
    from qsd.qapi.schema.create import BlockdevCreateOptionsQcow2

SECTOR: Final = 512
_CRYPT_METHODS: Final = {"qcow": layout.CRYPT_AES, "luks": layout.CRYPT_LUKS}
DEFAULT_CLUSTER: Final = 65536
# Zero bytes are written, and space is reserved, in pieces of this size, between which progress is told.
PIECE: Final = 16 << 20
_NEWER: Final = "with compatibility level 1.1 and above (use version=v3 or greater)"
_NEEDS_3: Final = "compatibility level 1.1 or above (use version=v3 or greater)"


async def create_qcow2(host: CreateHost, options: BlockdevCreateOptionsQcow2) -> None:
    """Write a new image. Raises QmpError in the reference's words."""
    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(host.node(options.file))
        image = plan(options)
        data = None
        if options.data_file is not None:
            data = await stack.enter_async_context(host.node(options.data_file))
            name = modified_utf8.encode(_file_name(data))
            if _is_same(file, data):
                raise QmpError(f"'{data.node_name}' cannot be both the image and its data file")
            image = attrs.evolve(image, header=image.header.with_extension(layout.EXT_DATA_FILE, name))
        password = None if options.encrypt is None else _password(host, options)
        if image.header.crypt_method == layout.CRYPT_LUKS:
            image = attrs.evolve(image, crypto_bytes=FormatOptions.from_qapi(options.encrypt).area_bytes)
        placement = place(image)
        _header_cluster(placement.header, options)
        volume = await _volume(placement.header, options, password)
        await _write(host, placement, file, data, options)
        if volume is not None:
            await volume.write(crypto_area(placement.header, file))
        await _finish(file, _header_cluster(placement.header, options))


def plan(options: BlockdevCreateOptionsQcow2) -> NewImage:
    """The image the options ask for. Raises QmpError when they do not go together, in the reference's order."""
    if options.size % SECTOR:
        raise QmpError("Image size must be a multiple of 512 bytes")
    is_v2 = options.version is not None and options.version.value == "v2"
    cluster_bits = _cluster_bits(options)
    _check_extended_l2(options, cluster_bits, is_v2=is_v2)
    preallocation = options.preallocation.value if options.preallocation is not None else "off"
    if preallocation != "off" and options.backing_file and not options.extended_l2:
        raise QmpError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
    if options.backing_fmt is not None and options.backing_file is None:
        raise QmpError("Backing format cannot be used without backing file")
    if is_v2 and options.lazy_refcounts:
        raise QmpError(f"Lazy refcounts only supported {_NEWER}")
    order = _refcount_order(options, is_v2=is_v2)
    _check_data_file(options, is_v2=is_v2)
    zstd = options.compression_type is not None and options.compression_type.value == "zstd"
    if is_v2 and zstd:
        raise QmpError(f"Non-zlib compression type is only supported {_NEWER}")
    has_data_file = options.data_file is not None
    incompatible = (
        (layout.DATA_FILE if has_data_file else 0)
        | (layout.COMPRESSION if zstd else 0)
        | (layout.EXTENDED_L2 if options.extended_l2 else 0)
    )
    header = Header(
        version=2 if is_v2 else 3,
        header_length=layout.V2_LENGTH if is_v2 else layout.FULL_LENGTH,
        cluster_bits=cluster_bits,
        size=options.size,
        crypt_method=layout.CRYPT_NONE if options.encrypt is None else _CRYPT_METHODS[options.encrypt.format.value],
        incompatible=incompatible,
        compatible=layout.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=layout.DATA_FILE_RAW if options.data_file_raw else 0,
        refcount_order=order,
        compression_type=layout.COMPRESSION_ZSTD if zstd else layout.COMPRESSION_ZLIB,
        backing_file=None if options.backing_file is None else modified_utf8.encode(options.backing_file),
        extensions=_backing_format(options),
    )
    # A raw data file must hold every byte where the guest has it.
    return NewImage(header=header, allocates=preallocation != "off" or bool(options.data_file_raw))


def _cluster_bits(options: BlockdevCreateOptionsQcow2) -> int:
    size = DEFAULT_CLUSTER if options.cluster_size is None else options.cluster_size
    bits = size.bit_length() - 1
    if size <= 0 or size != 1 << bits or not layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS:
        raise QmpError("Cluster size must be a power of two between 512 and 2048k")
    return bits


def _check_extended_l2(options: BlockdevCreateOptionsQcow2, cluster_bits: int, *, is_v2: bool) -> None:
    if not options.extended_l2:
        return
    if is_v2:
        raise QmpError(f"Extended L2 entries are only supported {_NEWER}")
    if cluster_bits < layout.MIN_EXTENDED_CLUSTER_BITS:
        smallest = 1 << layout.MIN_EXTENDED_CLUSTER_BITS
        raise QmpError(f"Extended L2 entries are only supported with cluster sizes of at least {smallest} bytes")


def _refcount_order(options: BlockdevCreateOptionsQcow2, *, is_v2: bool) -> int:
    bits = 16 if options.refcount_bits is None else options.refcount_bits
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise QmpError("Refcount width must be a power of two and may not exceed 64 bits")
    if is_v2 and bits != 16:
        raise QmpError(f"Different refcount widths than 16 bits require {_NEEDS_3}")
    return bits.bit_length() - 1


def _check_data_file(options: BlockdevCreateOptionsQcow2, *, is_v2: bool) -> None:
    if options.data_file_raw and options.data_file is None:
        raise QmpError("data-file-raw requires data-file")
    if options.data_file_raw and options.backing_file:
        raise QmpError("Backing file and data-file-raw cannot be used at the same time")
    if is_v2 and options.data_file is not None:
        raise QmpError(f"External data files are only supported {_NEWER}")


def _backing_format(options: BlockdevCreateOptionsQcow2) -> tuple[Extension, ...]:
    if options.backing_fmt is None:
        return ()
    return (Extension(layout.EXT_BACKING_FORMAT, options.backing_fmt.value.encode()),)


def _header_cluster(header: Header, options: BlockdevCreateOptionsQcow2) -> bytes:
    name = options.backing_file or ""
    shown = f"'{name}'" + (f" with format '{options.backing_fmt.value}'" if options.backing_fmt else "")
    if len(modified_utf8.encode(name)) > layout.MAX_BACKING_NAME:
        raise QmpError(f"Could not assign backing file {shown}: Invalid argument")
    try:
        return header_cluster(header)
    except QmpError as error:
        raise error.prefixed(f"Could not assign backing file {shown}: ") if name else error from None


def _password(host: CreateHost, options: BlockdevCreateOptionsQcow2) -> bytes:
    encrypt: Any = options.encrypt
    if encrypt.key_secret is None:
        raise QmpError("Parameter 'encrypt.key-secret' is required for cipher")
    return host.secret(encrypt.key_secret)


async def _volume(header: Header, options: BlockdevCreateOptionsQcow2, password: bytes | None) -> Formatted | None:
    """The LUKS header the image is to have."""
    if header.crypt_method != layout.CRYPT_LUKS:
        return None
    assert password is not None
    return await format_volume(FormatOptions.from_qapi(options.encrypt), password)


def _is_same(file: Child, data: Child) -> bool:
    """Whether metadata and data would be written over each other, where no lock keeps them from it."""
    return _file_name(file) == _file_name(data) != ""


def _file_name(child: Child) -> str:
    name: str = _driver(child).filename()
    return name


def _driver(child: Child) -> Any:
    edge: Any = child
    return edge.node.driver


async def _write(
    host: CreateHost,
    placement: Placement,
    file: Child,
    data: Child | None,
    options: BlockdevCreateOptionsQcow2,
) -> None:
    cluster = placement.header.cluster_size
    size = placement.header.size
    await _make_room(file, placement.end * cluster)
    with failing("Could not write qcow2 header"):
        # What stood there must not be taken for an image while this one is made.
        await file.write(0, bytes(cluster))
        await file.flush()
    with failing("Could not write refcount table"):
        for offset, part in metadata(placement):
            await file.write(offset, part)
            # The page cache takes it on the spot, and where space is allocated there may be gigabytes.
            await trio.lowlevel.checkpoint()
    mode = options.preallocation.value if options.preallocation is not None else "off"
    target, start = file, placement.data * cluster
    end = start + size
    if data is not None:
        # What it holds is the guest's from now on, where all is allocated: an image may be put around a raw disk.
        target, start, end = data, min(data.length, size), size
        if data.length < size or (mode == "off" and not placement.header.is_data_file_raw):
            await data.truncate(size, exact=False)
    if mode in ("falloc", "full"):
        await _give_space(host, target, start, end, is_full=mode == "full")
    if data is not None:
        await data.flush()


async def _make_room(file: Child, size: int) -> None:
    """Empty a file, and let it have ``size`` bytes. A window, which nobody resizes, has to be long enough."""
    try:
        await file.truncate(0, exact=False)
        await file.truncate(size, exact=False)
    except QmpError:
        if file.length < size or not _driver(file).can_truncate:
            raise


async def _finish(file: Child, header: bytes) -> None:
    """Write the header: what makes it one arrives as a whole, for a disk writes sectors."""
    with failing("Could not write qcow2 header"):
        if len(header) > SECTOR:
            await file.write(SECTOR, header[SECTOR:])
        await file.flush()
        await file.write(0, header[:SECTOR])
        await file.flush()


async def _give_space(host: CreateHost, child: Child, start: int, end: int, *, is_full: bool) -> None:
    """Reserve space for a range, or write zero bytes all over it."""
    zeroes = bytes(PIECE) if is_full else b""
    for offset in range(start, end, PIECE):
        length = min(PIECE, end - offset)
        if is_full:
            await child.write(offset, zeroes[:length])
        else:
            await child.write_zeroes(offset, length)
        host.progress(offset + length - start, end - start)
