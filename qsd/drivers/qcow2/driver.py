"""qcow2 as a node: opening, the hot path of the data, facts.

The hot path is a cluster that is allocated and whose L2 table is in memory: the request's offset becomes the host
offset, and the same request goes on to the file in one batch with its neighbours. Everything else goes through
``MappedDriver``.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from typing import Any, ClassVar, Final

from qsd.drivers.base import Child, ChildRole, Host, Mode
from qsd.drivers.filenames import tree_of
from qsd.drivers.implicit import format_options, full_name, plain_options
from qsd.drivers.mapped import READ, MappedDriver, Run
from qsd.drivers.qcow2 import compressed
from qsd.drivers.qcow2.bitmap_image import ReadOnlyImage
from qsd.drivers.qcow2.bitmaps import Qcow2Bitmaps
from qsd.drivers.qcow2.geometry import COPIED, OFFSET_MASK, Geometry, empty_table, swap
from qsd.drivers.qcow2.layout import (
    CORRUPT,
    CRYPT_NONE,
    DIRTY,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    LAZY_REFCOUNTS,
    PROBE_LENGTH,
    Header,
    parse_header,
    probe_cluster_size,
)
from qsd.drivers.qcow2.mapping import ClusterMap
from qsd.drivers.qcow2.settings import Settings, settings_of
from qsd.drivers.qcow2.tables import SliceCache
from qsd.errors import QmpError, errno_text
from qsd.messages import Request
from qsd.qapi.core import NULL

# What a plain entry has none of, apart from its offset and COPIED: then it is an ordinary cluster.
_ODD: Final = ~(OFFSET_MASK | COPIED) & ((1 << 64) - 1)


class Qcow2Driver(MappedDriver):
    """See the module."""

    name: ClassVar[str] = "qcow2"
    child_specs: ClassVar[tuple[tuple[str, ChildRole], ...]] = (
        ("file", ChildRole.DATA),
        ("backing", ChildRole.COW),
        ("data-file", ChildRole.DATA),
    )

    header: Header
    settings: Settings
    geometry: Geometry
    map: ClusterMap

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        super().__init__(node_name, options, mode, host)
        self._backing_name = ""
        self._is_backing_overridden = False
        self._is_sparse: bool | None = None

    # -- opening ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the header and the L1 table; open the data file and the backing file the image names."""
        file = self.children["file"]
        self.header = header = await _read_header(file)
        self._check_openable(header)
        self.settings = settings_of(self.options, header, discard_unmap=self.mode.discard_unmap)
        self.geometry = geometry = Geometry.of(header, self.settings.slice_bytes)
        l1 = await _read_table(file, header.l1_offset, header.l1_size, "Could not read L1 table")
        cache = SliceCache(geometry.slice_bytes, self.settings.l2_cache, lambda _number: False)
        self.map = ClusterMap(geometry, l1, cache, file, self.fetch, self._corrupt)
        await self._open_data_file()
        await self._open_backing()
        self._bind()
        self.bitmap_store = Qcow2Bitmaps(ReadOnlyImage(file, header), self.host.warn)

    def _check_openable(self, header: Header) -> None:
        self.require_read_only()
        if header.crypt_method != CRYPT_NONE:
            raise QmpError("Encrypted images are not supported yet")
        if self.options.encrypt is not None:
            raise QmpError(
                f"No encryption in image header, but options specified format '{self.options.encrypt.format.value}'"
            )
        compressed.require(header.compression_type)

    async def _open_data_file(self) -> None:
        if not self.header.has_data_file:
            if self.options.data_file is not None:
                raise QmpError("'data-file' can only be set for images with an external data file")
            return
        if "data-file" not in self.children:
            name = self.header.extension(EXT_DATA_FILE)
            if not name:
                raise QmpError("'data-file' is required for this image")
            options = plain_options(_text(name), self._image_name())
            await self.host.open_child("data-file", ChildRole.DATA, options)
        self.map.data = self.children["data-file"]

    async def _open_backing(self) -> None:
        name = self.header.backing_file
        if self.options.backing is not None or not name:
            self._is_backing_overridden = self.options.backing is not None and (
                self.options.backing is not NULL or bool(name)
            )
            return
        kind = self.header.extension(EXT_BACKING_FORMAT)
        try:
            options = format_options(_text(name), self._image_name(), _text(kind) if kind else None)
            await self.host.open_child("backing", ChildRole.COW, options)
        except QmpError as error:
            raise error.prefixed("Could not open backing file: ") from None

    def _image_name(self) -> str:
        file: Any = self.children["file"]
        name: str = file.node.driver.filename()
        return name

    def _bind(self) -> None:
        header = self.header
        self.length = header.size
        self.limits.pwrite_zeroes_alignment = header.subcluster_size
        self.limits.pdiscard_alignment = header.cluster_size

    # -- mapping ----------------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run:
        """The run at ``offset``."""
        return self.map.lookup(offset, length)

    def status(self, offset: int, length: int) -> tuple[int, int]:
        """Kind and length of the run at ``offset``."""
        return self.map.status(offset, length)

    @property
    def asks_data(self) -> bool:
        """True where much of the file is a hole: metadata was preallocated, and reads as zeroes."""
        if self._is_sparse is None:
            file: Any = self.children["file"]
            used = file.node.driver.allocated_size()
            self._is_sparse = used is not None and not self.header.has_data_file and used < file.length * 9 // 10
        return self._is_sparse

    def locate(self, where: int) -> tuple[Child, int, int]:
        """Where the bytes of a compressed L2 entry are."""
        offset, length = compressed.decode_entry(where, self.geometry.cluster_bits)
        return self.children["file"], offset, length

    def unpack(self, where: int, data: bytearray) -> bytes | bytearray:
        """Inflate a cluster."""
        return compressed.inflate(bytes(data), self.geometry.cluster_size, self.header.compression_type)

    def packed_skip(self, offset: int) -> int:
        """How far into its cluster an offset is."""
        return offset & (self.geometry.cluster_size - 1)

    def _corrupt(self, text: str) -> None:
        self.host.warn(
            f"qcow2: Marking image as corrupt: {text}; further non-fatal corruption events will be suppressed"
        )

    # -- the hot path -----------------------------------------------------------------------------------------

    def submit(self, batch: list[Request]) -> None:
        """Pass on what is one allocated cluster, or lies in the backing file; serve the rest the long way."""
        if self.geometry.words == 2:
            super().submit(batch)
            return
        geometry = self.geometry
        bits = geometry.cluster_bits
        slice_bits = geometry.slice_bits
        slice_mask = (1 << slice_bits) - 1
        cluster_mask = geometry.cluster_size - 1
        odd = _ODD | cluster_mask
        young = self.map.cache.young
        data = self.map.data
        data_end = data.length
        backing = self.children.get("backing")
        backing_end = backing.length if backing is not None else -1
        forward: list[Request] = []
        below: list[Request] = []
        for request in batch:
            if request.op == READ:
                offset = request.offset
                within = offset & cluster_mask
                length = request.length
                if within + length <= cluster_mask + 1:
                    cluster = offset >> bits
                    table = young.get(cluster >> slice_bits)
                    if table is not None:
                        entry = table[cluster & slice_mask]
                        if not entry:
                            if offset + length <= backing_end:
                                below.append(request)
                                continue
                        elif not entry & odd:
                            where = (entry & OFFSET_MASK) + within
                            if where + length <= data_end:
                                request.offset = where
                                forward.append(request)
                                continue
            self.serve(request)
        if forward:
            data.submit(forward)
        if below:
            assert backing is not None
            backing.submit(below)
        if self._outbox or self._resumed:
            self._send()

    # -- facts ------------------------------------------------------------------------------------------------

    def allocated_size(self) -> int | None:
        """Bytes used on the host, by the image and its data file."""
        total = 0
        for name in ("file", "data-file"):
            child: Any = self.children.get(name)
            if child is not None:
                size = child.node.driver.allocated_size()
                if size is None:
                    return None
                total += size
        return total

    def dirty_flag(self) -> bool | None:
        """True when refcounts may be out of date."""
        return bool(self.header.incompatible & DIRTY)

    def filename(self) -> str:
        """The file's name, unless another backing file makes it another disk."""
        file: Any = self.children["file"]
        if not self._is_backing_overridden:
            name: str = file.node.driver.filename()
            return name
        backing: Any = self.children.get("backing")
        below = None if backing is None else tree_of(backing.node.driver)
        tree = {"backing": below, "driver": self.name, "file": tree_of(file.node.driver)}
        return "json:" + json.dumps(tree)

    def image_facts(self) -> dict[str, Any]:
        """Cluster size and what the header says about a backing file."""
        header = self.header
        facts: dict[str, Any] = {"cluster-size": header.cluster_size}
        if header.backing_file is not None:
            name = _text(header.backing_file)
            facts["backing-filename"] = name
            with contextlib.suppress(QmpError):  # relative to an image without a directory
                facts["full-backing-filename"] = full_name(name, self._image_name())
            kind = header.extension(EXT_BACKING_FORMAT)
            if kind:
                facts["backing-filename-format"] = _text(kind)
        return facts

    def format_specific(self) -> dict[str, Any] | None:
        """``ImageInfoSpecificQCow2``."""
        header = self.header
        data: dict[str, Any] = {
            "compat": "0.10" if header.version < 3 else "1.1",
            "compression-type": compressed.COMPRESSION_NAMES[header.compression_type],
            "refcount-bits": header.refcount_bits,
        }
        if header.version >= 3:
            data["lazy-refcounts"] = bool(header.compatible & LAZY_REFCOUNTS)
            data["corrupt"] = bool(header.incompatible & CORRUPT)
            data["extended-l2"] = header.has_extended_l2
        if header.has_data_file:
            name = header.extension(EXT_DATA_FILE)
            if name:
                data["data-file"] = _text(name)
            data["data-file-raw"] = header.is_data_file_raw
        if self.bitmap_store is not None and (bitmaps := self.bitmap_store.facts()):
            data["bitmaps"] = bitmaps
        return {"type": "qcow2", "data": data}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


async def _read_header(file: Child) -> Header:
    try:
        start = await _read(file, 0, PROBE_LENGTH)
        cluster = await _read(file, 0, probe_cluster_size(start))
    except OSError as error:
        raise QmpError(f"Could not read qcow2 header: {errno_text(error.errno or 0)}") from None
    return parse_header(cluster)


async def _read(file: Child, offset: int, length: int) -> bytes:
    return await file.read(offset, max(0, min(length, file.length - offset)))


async def _read_table(file: Child, offset: int, entries: int, failure: str) -> array[int]:
    """A table of 64-bit words; what lies beyond the end of the file is zeroes."""
    table = empty_table(entries * 8)
    try:
        found = await _read(file, offset, entries * 8)
    except OSError as error:
        raise QmpError(f"{failure}: {errno_text(error.errno or 0)}") from None
    with memoryview(table).cast("B") as view:
        view[: len(found)] = found
    swap(table)
    return table
