"""A LUKS volume's header area: opened with a password, laid out anew, its key slots filled and erased.

The area is where header and key material are: the start of an image, a file of its own, or clusters of a qcow2
image. What takes long (deriving keys) is run through the caller's ``in_thread``; the loop goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import secrets
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import trio

from qsd.drivers.base import Child
from qsd.drivers.luks import header as layout
from qsd.drivers.luks.algorithms import BY_NAME, CipherSpec, check_hash, check_spec, load_library, parse_cipher
from qsd.drivers.luks.header import Header, KeySlot, parse_header, serialise_header
from qsd.errors import QmpError
from qsd.host.shield import shield

if TYPE_CHECKING:
    from qsd.drivers.luks.sectors import SectorCipher

InThread = Callable[..., Awaitable[Any]]
FindSecret = Callable[[str], bytes]

DEFAULT_ITER_TIME: Final = 2000  # milliseconds
WRONG_PASSWORD: Final = "Invalid password, cannot unlock any keyslot"


class Readable(Protocol):
    """A header and its key slots, to look at. Offsets are bytes from the header's start."""

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; zeroes beyond the end. Raises OSError."""


class Area(Readable, Protocol):
    """The same, to be changed too."""

    async def write(self, offset: int, data: bytes) -> None:
        """Raises OSError."""

    async def flush(self) -> None:
        """Raises OSError."""


@attrs.frozen
class ChildArea:
    """The bytes of a child from ``start`` on, ``size`` of them."""

    child: Child
    start: int = 0
    size: int | None = None

    def _check(self, offset: int, length: int) -> None:
        if self.size is not None and offset + length > self.size:
            raise QmpError("Request for data outside of extension header")

    async def read(self, offset: int, length: int) -> bytes:
        """Read; what lies beyond the child's end is zero. Raises QmpError beyond ``size``."""
        self._check(offset, length)
        offset += self.start
        inside = max(0, min(length, self.child.length - offset))
        data = await self.child.read(offset, inside) if inside else b""
        return data.ljust(length, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        """Write. Raises QmpError beyond ``size``."""
        self._check(offset, len(data))
        await self.child.write(self.start + offset, data)

    async def flush(self) -> None:
        """Flush."""
        await self.child.flush()


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run on a thread that is left behind when nobody waits for it any more: hashing cannot be interrupted."""
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


# -- opening ----------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Volume:
    """An open volume. ``header`` changes when key slots do.

    ``left``: a slot that an amendment used for a while and could not erase when it failed.
    """

    area: Area
    header: Header
    spec: CipherSpec
    cipher: SectorCipher
    left: KeySlot | None = None

    def renew(self, before: Header, found: Header) -> None:
        """Take the header that was ``found`` when ``before`` was known: an amendment since then knows better."""
        if self.header is before:
            self.header = found


async def open_volume(
    area: Area, password: bytes, *, is_detached: bool = False, run: InThread = in_thread
) -> Volume:
    """Read the header and unlock the volume with ``password``. Raises QmpError, OSError."""
    header, spec, master = await find_key(area, password, is_detached=is_detached, run=run)
    from qsd.drivers.luks.sectors import SectorCipher

    return Volume(area, header, spec, SectorCipher(spec, master))


async def find_key(
    area: Readable, password: bytes, *, is_detached: bool = False, run: InThread = in_thread
) -> tuple[Header, CipherSpec, bytes]:
    """The header, its cipher, and the master key ``password`` leads to. Raises QmpError, OSError."""
    header = parse_header(await area.read(0, layout.LENGTH), is_detached=is_detached)
    spec = parse_cipher(header)
    await run(load_library)
    return header, spec, await unlock(area, header, spec, password, run)


async def read_again(volume: Volume, area: Area) -> Header | None:
    """The header as it is now in ``area``; None when its master key is another. Raises QmpError, OSError."""
    old = volume.header
    new = parse_header(await area.read(0, layout.LENGTH), is_detached=not old.payload_offset)
    keeps = attrs.evolve(new, slots=old.slots, payload_offset=old.payload_offset, uuid=old.uuid) == old
    return new if keeps else None


async def unlock(
    area: Readable, header: Header, spec: CipherSpec, password: bytes, run: InThread = in_thread
) -> bytes:
    """The master key. Raises QmpError when no active slot is opened by ``password``."""
    from qsd.drivers.luks.keys import check_work

    check_work(header)
    for index in header.active_slots:
        master = await _try_slot(area, header, spec, header.slots[index], password, run)
        if master is not None:
            return master
    raise QmpError(WRONG_PASSWORD)


async def _try_slot(
    area: Readable, header: Header, spec: CipherSpec, slot: KeySlot, password: bytes, run: InThread
) -> bytes | None:
    from qsd.drivers.luks.keys import open_slot

    material = await area.read(slot.offset, header.material_bytes)
    master: bytes | None = await run(open_slot, header, spec, slot, material, password)
    return master


def volume_info(volume: Volume) -> dict[str, Any]:
    """``QCryptoBlockInfoLUKS`` as JSON."""
    header, spec = volume.header, volume.spec
    info: dict[str, Any] = {
        "cipher-alg": spec.algorithm.name,
        "cipher-mode": spec.mode,
        "ivgen-alg": spec.iv_generator,
        "hash-alg": header.hash_name,
        "detached-header": not header.payload_offset,
        "payload-offset": header.payload_offset,
        "master-key-iters": header.digest_iterations,
        "uuid": header.uuid_text,
        "slots": [
            {"active": True, "iters": slot.iterations, "stripes": slot.stripes, "key-offset": slot.offset}
            if slot.is_active
            else {"active": False, "key-offset": slot.offset}
            for slot in header.slots
        ],
    }
    if spec.iv_generator == "essiv":
        info["ivgen-hash-alg"] = spec.iv_hash
    return info


# -- formatting -------------------------------------------------------------------------------------------------


@attrs.frozen
class FormatOptions:
    """``QCryptoBlockCreateOptionsLUKS`` without the secret, as plain names; None is the default."""

    cipher_alg: str | None = None
    cipher_mode: str | None = None
    ivgen_alg: str | None = None
    ivgen_hash_alg: str | None = None
    hash_alg: str | None = None
    iter_time: int | None = None

    @classmethod
    def from_qapi(cls, options: Any) -> FormatOptions:
        """From anything that has the members of ``QCryptoBlockCreateOptionsLUKS``."""
        names = ("cipher_alg", "cipher_mode", "ivgen_alg", "ivgen_hash_alg", "hash_alg")
        given = {name: getattr(options, name) for name in names}
        plain = {name: value.value if value is not None else None for name, value in given.items()}
        return cls(**plain, iter_time=options.iter_time)

    @property
    def hash_name(self) -> str:
        """The hash of PBKDF2 and of the splitter."""
        return self.hash_alg or "sha256"

    def cipher(self) -> CipherSpec:
        """The cipher asked for. Raises QmpError when there is no such combination."""
        generator = self.ivgen_alg or "plain64"
        iv_hash = self.ivgen_hash_alg or ("sha256" if generator == "essiv" else None)
        spec = CipherSpec(BY_NAME[self.cipher_alg or "aes-256"], self.cipher_mode or "xts", generator, iv_hash)
        for name in (self.hash_name, iv_hash):
            if name is not None:
                check_hash(name)
        check_spec(spec)
        return spec

    @property
    def area_bytes(self) -> int:
        """Bytes of header and key slots, aligned: where the payload begins. Raises QmpError as ``cipher`` does."""
        key_bytes = self.cipher().key_bytes
        last = layout.new_slots(key_bytes)[-1].offset + layout.material_bytes(key_bytes)
        return -(-last // layout.ALIGNMENT) * layout.ALIGNMENT


@attrs.frozen
class Formatted:
    """A new volume before it is written. ``material``: of slot 0."""

    header: Header
    material: bytes
    spec: CipherSpec
    master: bytes

    async def write(self, area: Area) -> None:
        """Write it: the header's first sector last. Cut off, it is no LUKS volume, nor what was there before.

        Raises OSError.
        """
        header = serialise_header(self.header)
        await area.write(0, bytes(layout.SECTOR))
        await area.flush()
        await area.write(self.header.slots[0].offset, self.material)
        await area.write(layout.SECTOR, header[layout.SECTOR :])
        await area.flush()
        await area.write(0, header[: layout.SECTOR])
        await area.flush()


async def format_volume(
    options: FormatOptions, password: bytes, *, is_detached: bool = False, run: InThread = in_thread
) -> Formatted:
    """Make a new master key and a header with one slot that ``password`` opens. Raises QmpError."""
    options.cipher()
    await run(load_library)
    formatted: Formatted = await run(_format, options, password, is_detached)
    return formatted


def _format(options: FormatOptions, password: bytes, is_detached: bool) -> Formatted:
    from qsd.drivers.luks import keys

    spec, name = options.cipher(), options.hash_name
    master = secrets.token_bytes(spec.key_bytes)
    time = DEFAULT_ITER_TIME if options.iter_time is None else options.iter_time
    digest_iterations = keys.count_iterations(name, layout.DIGEST_BYTES, time, keys.DIGEST_SHARE)
    iterations = keys.count_iterations(name, spec.key_bytes, time)
    header = Header(
        cipher_name=spec.algorithm.family,
        cipher_mode=spec.mode_text,
        hash_name=name,
        payload_offset=0 if is_detached else options.area_bytes,
        key_bytes=spec.key_bytes,
        digest=b"",
        digest_salt=b"",
        digest_iterations=digest_iterations,
        uuid=str(uuid.uuid4()).encode(),
        slots=layout.new_slots(spec.key_bytes),
    )
    first = attrs.evolve(header.slots[0], is_active=True, iterations=iterations)
    # Before it is done: what takes too long to open takes as long to make.
    keys.check_work(header.with_slot(0, first))
    digest_salt, digest = keys.master_digest(name, master, digest_iterations)
    salt, material = keys.seal_slot(name, spec, master, password, iterations)
    header = attrs.evolve(header, digest=digest, digest_salt=digest_salt)
    return Formatted(header.with_slot(0, attrs.evolve(first, salt=salt)), material, spec, master)


# -- key slots --------------------------------------------------------------------------------------------------


async def add_key(
    volume: Volume, index: int, master: bytes, new: bytes, iter_time: int | None, run: InThread = in_thread
) -> None:
    """Fill slot ``index`` so that the password ``new`` leads to the key ``master``, ``iter_time`` ms of hashing on.

    The key material reaches the disk before the header says so. Who is cancelled waits once that has begun. Raises
    QmpError, OSError.
    """
    from qsd.drivers.luks import keys

    header, spec = volume.header, volume.spec
    time = DEFAULT_ITER_TIME if iter_time is None else iter_time
    iterations = await run(keys.count_iterations, header.hash_name, spec.key_bytes, time)
    slot = attrs.evolve(header.slots[index], is_active=True, iterations=iterations)
    keys.check_work(header.with_slot(index, slot))
    salt, material = await run(keys.seal_slot, header.hash_name, spec, master, new, iterations)
    slot = attrs.evolve(slot, salt=salt)
    with shield():
        if header.slots[index].is_active:
            await _overwrite(volume, index, slot, material)
        else:
            await _fill(volume, index, slot, material)
    await _erase_left(volume, new, run)


async def _erase_left(volume: Volume, password: bytes, run: InThread) -> None:
    """Erase what an earlier attempt has left, if it is there as it was and ``password``, now in a slot, opens it.

    Otherwise it may be all that opens the volume for somebody. Raises QmpError, OSError.
    """
    header, left = volume.header, volume.left
    if left in header.slots and await _try_slot(volume.area, header, volume.spec, left, password, run) is not None:
        await erase_key(volume, header.slots.index(left))
        volume.left = None


async def _overwrite(volume: Volume, index: int, slot: KeySlot, material: bytes) -> None:
    """Fill a slot that is in use, and may be the only one.

    As long as it is neither the old nor the new, another that is free has the new password: a torn write must not
    leave a volume that nothing opens. Raises OSError, and the slots are as before if the disk lets them be.
    """
    before = volume.header
    spare = next((number for number in range(layout.SLOTS) if not before.slots[number].is_active), None)
    kept = await volume.area.read(before.slots[index].offset, before.material_bytes)
    try:
        if spare is not None:
            await _fill(volume, spare, slot, material)
        await erase_key(volume, index)
        await _fill(volume, index, slot, material)
        if spare is not None:
            await erase_key(volume, spare)
    except OSError:
        with contextlib.suppress(OSError):
            await _put_back(volume, index, before.slots[index], kept, spare)
        if spare is not None and volume.header.slots[spare].is_active:
            volume.left = volume.header.slots[spare]
        raise


async def _put_back(volume: Volume, index: int, slot: KeySlot, material: bytes, spare: int | None) -> None:
    """Let a slot be what it was, and the spare one free. Raises OSError."""
    is_spare_in_use = spare is not None and volume.header.slots[spare].is_active
    now = volume.header.slots[index]
    if now != slot:
        if now.is_active:
            if not is_spare_in_use:
                # All is done but for the key material of the spare slot. Nothing else may open the volume.
                return
            await _write_header(volume, volume.header.with_slot(index, KeySlot(slot.offset)))
        await _fill(volume, index, slot, material)
    if spare is not None and is_spare_in_use:
        await erase_key(volume, spare)


async def _fill(volume: Volume, index: int, slot: KeySlot, material: bytes) -> None:
    place = volume.header.slots[index].offset
    await volume.area.write(place, material)
    await volume.area.flush()
    await _write_header(volume, volume.header.with_slot(index, attrs.evolve(slot, offset=place)))


async def erase_key(volume: Volume, index: int) -> None:
    """Make slot ``index`` useless: inactive in the header, its key material overwritten. Raises OSError.

    Who is cancelled meanwhile waits: what the header does not name any more must not stay.
    """
    header = volume.header
    with shield():
        await _write_header(volume, header.with_slot(index, KeySlot(header.slots[index].offset)))
        await volume.area.write(header.slots[index].offset, secrets.token_bytes(header.material_bytes))
        await volume.area.flush()


async def find_slots(volume: Volume, password: bytes, run: InThread = in_thread) -> list[int]:
    """The active slots that ``password`` opens. Raises QmpError, OSError."""
    from qsd.drivers.luks.keys import check_work

    header = volume.header
    # It may have been read again since the volume was opened.
    check_work(header)
    return [
        index
        for index in header.active_slots
        if await _try_slot(volume.area, header, volume.spec, header.slots[index], password, run) is not None
    ]


async def _write_header(volume: Volume, header: Header) -> None:
    try:
        await volume.area.write(0, serialise_header(header))
        await volume.area.flush()
    except OSError:
        # It may have arrived all the same.
        with contextlib.suppress(OSError):
            await volume.area.write(0, serialise_header(volume.header))
            await volume.area.flush()
        raise
    volume.header = header
