"""qcow2 as a node: opening, the hot path of the data, closing.

The hot path is a cluster that is allocated (for a write: to this image alone) and whose L2 table is in memory: the
request's offset becomes the host offset, and the same request goes on to the file in one batch with its neighbours.
Everything else goes through ``MappedDriver``, ``Writer`` and ``Zeroer``.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import trio

from qsd.drivers.base import SECTOR, ChildRole, Host, Mode, limits_above
from qsd.drivers.gather import Gather
from qsd.drivers.mapped import READ
from qsd.drivers.qcow2 import compressed, encryption, internal_snapshots, naming
from qsd.drivers.qcow2.bitmap_image import DriverImage
from qsd.drivers.qcow2.bitmaps import Qcow2Bitmaps
from qsd.drivers.qcow2.bursts import Burst, Bursts
from qsd.drivers.qcow2.geometry import COPIED, ODD, OFFSET_MASK
from qsd.drivers.qcow2.image import Image
from qsd.drivers.qcow2.layout import CORRUPT, CRYPT_AES, CRYPT_NONE, DIRTY, KNOWN_AUTOCLEAR, Header, unmarking
from qsd.drivers.qcow2.loading import read_header, read_snapshots, read_table
from qsd.drivers.qcow2.mending import mend
from qsd.drivers.qcow2.packing import Packer
from qsd.drivers.qcow2.resizing import resize
from qsd.drivers.qcow2.settings import settings_of
from qsd.drivers.qcow2.spotting import spot_of
from qsd.drivers.qcow2.telling import TellingDriver
from qsd.drivers.qcow2.writeback import WriteBack
from qsd.drivers.qcow2.writing import WRITE, Writer
from qsd.drivers.qcow2.zeroing import Zeroer
from qsd.drivers.spot import Spot, end_epoch
from qsd.errors import QmpError, errno_text
from qsd.messages import Flag, Op, Request

log = logging.getLogger("qsd.qcow2")

COMPRESSED: Final = Flag.COMPRESSED.value
PACKED: Final = compressed.COMPRESSED


class Qcow2Driver(TellingDriver):
    """See the module.

    ``writer``, ``bursts``, ``zeroer``, ``packer`` and ``writeback`` exist while the image can be written.
    """

    name: ClassVar[str] = "qcow2"
    child_specs: ClassVar[tuple[tuple[str, ChildRole], ...]] = (
        ("file", ChildRole.DATA),
        ("backing", ChildRole.COW),
        ("data-file", ChildRole.DATA),
    )
    late_children: ClassVar[frozenset[str]] = frozenset({"backing", "data-file"})

    image: Image
    _next: Image
    writer: Writer
    zeroer: Zeroer
    packer: Packer
    writeback: WriteBack

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        super().__init__(node_name, options, mode, host)
        self.is_writable = False
        self._cleaning = trio.CancelScope()
        self._amending = trio.Lock()
        # Found broken: nothing is served any more. And told once that something is wrong.
        self.is_broken = False
        self._has_told = False

    # -- opening ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the header and the L1 table; open the data file and the backing file the image names."""
        try:
            await self._load()
            await naming.open_data_file(self)
            await self._unlock(self.image, self.options)
            await naming.open_backing(self)
            self.children_changed()
            if not self.mode.read_only and self.mode.active:
                await self._prepare_writing(self.image)
                self._begin_writing()
        except BaseException:
            self._let_go()
            raise
        self.bitmap_store = Qcow2Bitmaps(DriverImage(self), self.host.warn)
        self._clean_caches()

    async def _load(self) -> None:
        """Read what every user of the image needs."""
        self._take(await self._read_image(self.options, self.mode))

    async def _read_image(self, options: Any, mode: Mode) -> Image:
        file = self.children["file"]
        header = await read_header(file)
        self._check_openable(header, mode)
        settings = settings_of(options, header, discard_unmap=mode.discard_unmap)
        known = self.image if hasattr(self, "image") else None
        encryption.check_format(header, options, is_reopening=known is not None)
        unlocked = await encryption.unlock_luks(self, header, options, None if known is None else known.encryption)
        l1 = await read_table(file, header.l1_offset, header.l1_size, "Could not read L1 table")
        snapshots = await read_snapshots(file, header)
        image = Image(self, header, settings, options, l1, file)
        image.encryption = unlocked
        image.take_snapshots(*snapshots)
        return image

    async def _unlock(self, image: Image, options: Any) -> None:
        """Let the guest's data go through the cipher, now that all its files are open."""
        if image.encryption is None and image.header.crypt_method == CRYPT_AES:
            image.encryption = await encryption.unlock_aes(self, options)
        if image.encryption is not None:
            image.encryption.cover(image.map)
            image.is_hot = image.is_hot and image.map.numbered is None

    def _take(self, image: Image) -> None:
        self.image = image
        end_epoch()
        self.length = image.header.disk_size
        self.children_changed()

    def children_changed(self) -> None:
        """What they want of buffers is wanted here as well."""
        header = self.image.header
        alignment = SECTOR if header.crypt_method != CRYPT_NONE else 1
        self.limits = limits_above(*(child.limits for child in self.children.values()), request_alignment=alignment)
        self.limits.pwrite_zeroes_alignment = header.subcluster_size
        self.limits.pdiscard_alignment = header.cluster_size

    # The disk is as long as the image says, but a child may have other limits now.
    refresh_length = children_changed

    async def _read_again(self, options: Any, mode: Mode, *, mends: bool = True) -> Image:
        """The image as it is now, with its children open already. Raises QmpError.

        Without ``mends`` nothing is written, whatever has to be done before the guest may write.
        """
        image = None
        try:
            image = await self._read_image(options, mode)
            if image.header.has_data_file:
                image.map.data = self.children["data-file"]
            await self._unlock(image, options)
            if not mode.read_only and mode.active:
                await self._prepare_writing(image, mends=mends)
        except (OSError, QmpError) as error:
            if image is not None:
                image.let_go()
            raise QmpError(errno_text(error.errno or 0)) if isinstance(error, OSError) else error from None
        return image

    def _go_on_with(self, image: Image) -> None:
        self.unpacker.clear()
        self._is_sparse = None
        if image.header.backing_file != self.image.header.backing_file:
            self.own_backing = naming.backing_name(image)
        before = self.image
        self._take(image)
        before.let_go()
        self.is_writable = False
        if not self.mode.read_only and self.mode.active:
            self._begin_writing()

    async def activate(self) -> None:
        """Another owner may have changed anything: read the image anew."""
        self.is_writable = False
        self._go_on_with(await self._read_again(self.options, self.mode))

    def _check_openable(self, header: Header, mode: Mode) -> None:
        compressed.require(header.compression_type)
        if header.incompatible & CORRUPT and not mode.read_only:
            raise QmpError("qcow2: Image is corrupt; cannot be opened read/write")

    async def _prepare_writing(self, image: Image, *, mends: bool = True) -> None:
        """Load what only writers need; unknown autoclear features are no longer to be trusted."""
        if mends and image.header.incompatible & DIRTY:
            await mend(self, image)
        await image.begin_writing()
        header = image.header
        if mends and header.autoclear & ~KNOWN_AUTOCLEAR:
            try:
                await image.change_header(autoclear=header.autoclear & KNOWN_AUTOCLEAR)
            except OSError as error:
                raise QmpError(f"Could not update qcow2 header: {errno_text(error.errno or 0)}") from None

    def _begin_writing(self) -> None:
        image = self.image
        self.writer = Writer(self, image)
        self.bursts = Bursts(self, image, self.writer)
        self.zeroer = Zeroer(self, image, self.writer)
        self.packer = Packer(self, image, self.writer)
        self.writeback = WriteBack(image)
        self.is_writable = True

    # -- reopening --------------------------------------------------------------------------------------------

    async def prepare_reopen(self, options: Any, mode: Mode) -> None:
        """Read the image as the new options want it; the graph has had everything written (``inactivate``)."""
        # What was read-only has children that cannot be written yet: ``become_writable`` sees to the rest.
        self._next = await self._read_again(options, mode, mends=not self.mode.read_only)

    def commit_reopen(self, options: Any, mode: Mode) -> None:
        """Go on with it."""
        super().commit_reopen(options, mode)
        self._go_on_with(self._next)
        self._clean_caches()
        del self._next

    async def become_writable(self) -> None:
        """Do what opening the image to write it would have done. Raises QmpError."""
        header = self.image.header
        if header.incompatible & DIRTY or header.autoclear & ~KNOWN_AUTOCLEAR:
            self.is_broken = True
            end_epoch()
            self._go_on_with(await self._read_again(self.options, self.mode))
            self.is_broken = False
            end_epoch()

    def abort_reopen(self) -> None:
        """Forget it."""
        self._next.let_go()
        del self._next

    can_truncate: ClassVar[bool] = True

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Change the disk's length: see ``resizing``."""
        if self.is_broken:
            raise QmpError(errno_text(errno.EIO))
        await resize(self, size, exact=exact)

    async def create_snapshot(self, name: str, now_ns: int) -> str:
        """See ``internal_snapshots``. Raises OSError."""
        if self.is_broken:
            raise OSError(errno.EIO, "the image is corrupt")
        return await internal_snapshots.create(self, name, now_ns)

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """See ``internal_snapshots``. Raises QmpError."""
        if self.is_broken or not self.is_writable:
            raise QmpError(errno_text(errno.EIO if self.is_broken else errno.EROFS))
        await internal_snapshots.delete(self, snapshot_id)

    async def change_backing_file(self, name: str, kind: str) -> None:
        """See ``naming``. Raises OSError."""
        if self.is_broken or not self.is_writable:
            raise OSError(errno.EIO if self.is_broken else errno.EROFS, "the image cannot be written")
        await naming.change_backing_file(self, name, kind)

    # -- amending ---------------------------------------------------------------------------------------------

    can_amend: ClassVar[bool] = True

    async def amend(self, options: Any, *, force: bool) -> None:
        """Add or erase key slots of an encrypted image."""
        if options.encrypt is None:
            return
        async with self._amending:
            try:
                await encryption.amend_encryption(self.image.encryption, options.encrypt, force=force, driver=self)
            except OSError as error:
                raise QmpError(f"Could not write encryption header: {errno_text(error.errno or 0)}") from None

    # -- caches -----------------------------------------------------------------------------------------------

    def _clean_caches(self) -> None:
        """From now on forget tables that nobody has asked for during an interval (``cache-clean-interval``)."""
        self._cleaning.cancel()
        interval = self.image.settings.clean_interval
        if interval:
            self._cleaning = trio.CancelScope()
            self.host.spawn(self._clean_regularly, self._cleaning, interval, name="clean caches")

    async def _clean_regularly(self, scope: trio.CancelScope, interval: int) -> None:
        with scope:
            while True:
                await trio.sleep(interval)
                self.image.cache.clean()
                if self.is_writable:
                    self.image.refs.cache.clean()

    # -- closing ----------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Bring the rest to the file and leave it as long as it has to be."""
        if self.is_writable and not self.is_broken:
            try:
                await self._finish()
            except (OSError, QmpError) as error:
                log.error("closing %s: %s", self.node_name, error)
        self.is_writable = False
        self._let_go()

    def _let_go(self) -> None:
        """Free what is large at once: node and driver refer to each other until Python looks for such circles."""
        if hasattr(self, "image"):
            self.image.let_go()
        self.unpacker.let_go()
        self.bitmap_store = None
        for name in ("writer", "bursts", "zeroer", "packer"):
            vars(self).pop(name, None)

    async def inactivate(self) -> None:
        """The same, for another owner of the image; or for this one, when something else fails."""
        if self.is_writable and not self.is_broken:
            try:
                await self._finish()
            except OSError as error:
                raise QmpError(errno_text(error.errno or 0)) from None

    async def _finish(self) -> None:
        """Write everything; then the image is clean, and needs no room ahead. Raises OSError, QmpError."""
        image = self.image
        await self.writeback.finish()
        if image.needs_repair and image.header.content_version < 3:
            # It is to stay version 2, which has no mark for a repair.
            await image.cut_room_ahead()
            await mend(self, image)
            self._go_on_with(await self._read_again(self.options, self.mode, mends=False))
            image = self.image
            image.needs_repair = bool(image.header.incompatible & DIRTY)
        if image.header.incompatible & DIRTY:
            await image.write_refcounts()
            await image.file.flush()
            if image.needs_repair:
                log.warning("%s stays marked as dirty: opening it to be written repairs it", self.node_name)
            else:
                await image.header_changes.change(unmarking)
        await image.cut_room_ahead()

    # -- corruption -------------------------------------------------------------------------------------------

    def corrupt(self, text: str, *, offset: int | None = None, size: int | None = None) -> None:
        """Something in the image is wrong. A writable image is marked and served no more."""
        is_fatal = self.is_writable and self.mode.active
        if self.is_broken or (self._has_told and not is_fatal):
            return
        self._has_told = True
        what = "Marking image as corrupt" if is_fatal else "Image is corrupt"
        more = "further corruption events" if is_fatal else "further non-fatal corruption events"
        self.host.warn(f"qcow2: {what}: {text}; {more} will be suppressed")
        place = {name: value for name, value in (("offset", offset), ("size", size)) if value is not None}
        event = {"device": "", "node-name": self.node_name, "msg": text, **place, "fatal": is_fatal}
        self.host.emit("BLOCK_IMAGE_CORRUPTED", event)
        if is_fatal:
            self.is_broken = True
            end_epoch()
            self.started()
            self.host.spawn(self._mark_corrupt, name="mark the image as corrupt")

    async def _mark_corrupt(self) -> None:
        image = self.image
        try:
            if image.header.version >= 3:
                await image.set_incompatible(CORRUPT)
        except OSError as error:
            log.error("marking %s as corrupt: %s", self.node_name, error)
        finally:
            self.finished()

    # -- requests ---------------------------------------------------------------------------------------------

    def submit(self, batch: list[Request]) -> None:
        """Pass on what is one allocated cluster, or lies in the backing file; serve the rest the long way."""
        image = self.image
        geometry = image.geometry
        if not image.is_hot or self.is_broken:
            self._submit_slowly(batch)
            return
        bits = geometry.cluster_bits
        slice_bits = geometry.slice_bits
        slice_mask = geometry.slice_mask
        cluster_mask = geometry.cluster_size - 1
        odd = ODD | cluster_mask
        young = image.cache.young
        data = image.map.data
        data_end = data.length
        backing = self.children.get("backing")
        backing_end = backing.length if backing is not None else -1
        busy: Mapping[int, object] = {}
        burst: Burst | None = None
        burst_end = 0
        if self.is_writable:
            busy = self.writer.busy
            if self.bursts.most:
                burst_end = self.length if backing is None else min(self.length, backing_end)
        guarded = image.metadata.clusters if not geometry.has_data_file else ()
        lends = image.lends
        forward: list[Request] = []
        below: list[Request] = []
        for request in batch:
            op = request.op
            if op <= WRITE:
                offset = request.offset
                within = offset & cluster_mask
                length = request.length
                if within + length <= cluster_mask + 1:
                    cluster = offset >> bits
                    table = young.get(cluster >> slice_bits)
                    if table is not None:
                        entry = table[cluster & slice_mask]
                        if op == READ:
                            if not entry:
                                if offset + length <= backing_end:
                                    below.append(request)
                                    continue
                            elif not entry & odd:
                                where = (entry & OFFSET_MASK) + within
                                if where + length <= data_end:
                                    if request.flags and not lends:
                                        request.flags = 0
                                    request.offset = where
                                    forward.append(request)
                                    continue
                            elif entry & PACKED:
                                self.unpacker.serve(request, entry, within)
                                continue
                        elif request.flags:
                            pass
                        elif not entry:
                            if offset | cluster_mask < burst_end and length <= cluster_mask and cluster not in busy:
                                burst = self.bursts.take(burst, request, cluster)
                                continue
                        elif entry & COPIED and not entry & odd:
                            where = (entry & OFFSET_MASK) + within
                            if where + length <= data_end and where >> bits not in guarded and cluster not in busy:
                                request.offset = where
                                forward.append(request)
                                continue
            self.serve(request)
        if forward:
            data.submit(forward)
        if below:
            assert backing is not None
            backing.submit(below)
        if burst is not None:
            self.bursts.begin(burst)
        if self._outbox or self._resumed:
            self.send()

    def spot(self) -> Spot | None:
        """Through the tables, and those of the images below; see ``spotting``."""
        image = self.image
        if not image.is_hot or self.is_broken:
            return None
        return spot_of(image.map, self.length, self.backing)

    def _submit_slowly(self, batch: list[Request]) -> None:
        if self.is_broken:
            for request in batch:
                request.complete(errno.EIO)
        else:
            super().submit(batch)

    def _write(self, request: Request) -> None:
        if request.flags & COMPRESSED:
            if not self.image.is_encrypted:
                self.packer.write(request)
                return
            # Compressed clusters are not encrypted: what was to be kept secret would lie open in the file.
            request.flags &= ~COMPRESSED
        self.writer.write(request)

    def can_compress(self) -> bool:
        """Yes; with an external data file every write is refused instead, as by the reference."""
        return True

    def _write_zeroes(self, request: Request) -> None:
        self.zeroer.write_zeroes(request)

    def _discard(self, request: Request) -> None:
        self.zeroer.discard(request)

    def _flush(self, request: Request) -> None:
        if not self.is_writable:
            request.complete()
        elif self.writeback.is_clean:
            self._flush_children(request)
        else:
            self.writeback.request(request.complete)

    def _flush_children(self, request: Request) -> None:
        image = self.image
        if not image.geometry.has_data_file:
            self.post(image.file, request)
            return
        gather = Gather(self, request)
        for child in (image.map.data, image.file):
            gather.left += 1
            self.post(child, Request(Op.FLUSH.value, 0, 0, None, gather))
        gather.end()
