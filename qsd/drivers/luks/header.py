"""The LUKS1 header: 592 bytes that say how a volume is encrypted, and where the eight key slots are.

Pure. Follows the LUKS1 on-disk format specification 1.2.3 (figures 1 to 3); the order of the checks and the error
texts are the reference's. On disk all numbers are big endian and positions are sectors of 512 bytes; in the values
here they are bytes.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from qsd.errors import QmpError

SECTOR: Final = 512
LENGTH: Final = 592
MAGIC: Final = b"LUKS\xba\xbe"
VERSION: Final = 1
SLOTS: Final = 8
STRIPES: Final = 4000
SALT_BYTES: Final = 32
DIGEST_BYTES: Final = 20
# Key slots and payload are aligned to this (the specification's recommendation, and the reference's layout).
ALIGNMENT: Final = 4096
MIN_ITERATIONS: Final = 1000
MAX_ITERATIONS: Final = (1 << 32) - 1

_ENABLED: Final = 0x00AC71F3
_DISABLED: Final = 0x0000DEAD

_HEAD = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
assert _HEAD.size + SLOTS * _SLOT.size == LENGTH


@attrs.frozen
class KeySlot:
    """One key slot. ``offset``: where its key material begins, in bytes."""

    offset: int
    is_active: bool = False
    iterations: int = 0
    salt: bytes = bytes(SALT_BYTES)
    stripes: int = STRIPES


@attrs.frozen(kw_only=True)
class Header:
    """A header whose fields fit together; whether its algorithms exist is for ``algorithms.find_cipher`` to say.

    ``payload_offset`` in bytes; 0 means that the header is detached from the data, which may then begin anywhere.
    """

    cipher_name: str
    cipher_mode: str
    hash_name: str
    payload_offset: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    # As it stands there, up to 40 bytes: it is text that anybody may have written.
    uuid: bytes
    slots: tuple[KeySlot, ...]

    @property
    def uuid_text(self) -> str:
        """The UUID to be shown."""
        return self.uuid.split(b"\0")[0].decode(errors="replace")

    @property
    def material_bytes(self) -> int:
        """Bytes of one slot's key material, whole sectors."""
        return material_bytes(self.key_bytes)

    @property
    def area_bytes(self) -> int:
        """Bytes from the header's start to the end of the last slot, aligned."""
        return _aligned(max(slot.offset for slot in self.slots) + self.material_bytes)

    @property
    def active_slots(self) -> tuple[int, ...]:
        """The numbers of the slots in use."""
        return tuple(index for index, slot in enumerate(self.slots) if slot.is_active)

    def with_slot(self, index: int, slot: KeySlot) -> Header:
        """The same with another slot ``index``."""
        return attrs.evolve(self, slots=(*self.slots[:index], slot, *self.slots[index + 1 :]))


def material_bytes(key_bytes: int) -> int:
    """Bytes of the key material for a key of ``key_bytes``, rounded up to whole sectors."""
    return -(-key_bytes * STRIPES // SECTOR) * SECTOR


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def new_slots(key_bytes: int) -> tuple[KeySlot, ...]:
    """Eight inactive slots behind the header, where the reference puts them."""
    step = _aligned(material_bytes(key_bytes))
    return tuple(KeySlot(ALIGNMENT + index * step) for index in range(SLOTS))


def parse_header(data: bytes, *, is_detached: bool = False) -> Header:
    """Read the header from the first ``LENGTH`` bytes (zeroes where the image is shorter).

    ``is_detached``: the payload is elsewhere, so its offset may be anything. Raises QmpError. Nothing here takes
    more than the header's own bytes, whatever they say; slots lie inside the 2 TiB that their fields can name.
    """
    magic, version, *names, payload, key_bytes, digest, salt, iterations, uuid = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise QmpError("Volume is not in LUKS format")
    if version != VERSION:
        raise QmpError(f"LUKS version {version} is not supported")
    cipher_name, cipher_mode, hash_name = (
        _text(raw, what) for raw, what in zip(names, ("cipher name", "cipher mode", "hash spec"), strict=True)
    )
    header = Header(
        cipher_name=cipher_name,
        cipher_mode=cipher_mode,
        hash_name=hash_name,
        payload_offset=payload * SECTOR,
        key_bytes=key_bytes,
        digest=digest,
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=uuid.rstrip(b"\0"),
        slots=(),
    )
    if payload * SECTOR < ALIGNMENT and not is_detached:
        raise QmpError("LUKS payload is overlapping with the header")
    if not iterations:
        raise QmpError("LUKS key iteration count is zero")
    raw_slots = tuple(_SLOT.iter_unpack(data[_HEAD.size : LENGTH]))
    return attrs.evolve(header, slots=_check_slots(raw_slots, header, is_detached=is_detached))


def _text(raw: bytes, what: str) -> str:
    text, nul, _rest = raw.partition(b"\0")
    if not nul:
        raise QmpError(f"LUKS header {what} is not NUL terminated")
    return text.decode(errors="replace")


def _check_slots(
    raw_slots: tuple[tuple[int, int, bytes, int, int], ...], header: Header, *, is_detached: bool
) -> tuple[KeySlot, ...]:
    # A slot takes whole units of the alignment, as in the reference.
    length = _aligned(header.material_bytes)
    for index, (state, iterations, _salt, sector, stripes) in enumerate(raw_slots):
        offset = sector * SECTOR
        if stripes != STRIPES:
            # The reference prints a signed number.
            shown = stripes - (1 << 32) if stripes >> 31 else stripes
            raise QmpError(f"Keyslot {index} is corrupted (stripes {shown} != {STRIPES})")
        if state not in (_ENABLED, _DISABLED):
            raise QmpError(f"Keyslot {index} state (active/disable) is corrupted")
        if state == _ENABLED and not iterations:
            raise QmpError(f"Keyslot {index} iteration count is zero")
        if offset < ALIGNMENT:
            raise QmpError(f"Keyslot {index} is overlapping with the LUKS header")
        if not is_detached and offset + length > header.payload_offset:
            raise QmpError(f"Keyslot {index} is overlapping with the encrypted payload")
        for later, (_state, _iterations, _later_salt, other, _stripes) in enumerate(raw_slots):
            if later > index and offset < other * SECTOR + length and other * SECTOR < offset + length:
                raise QmpError(f"Keyslots {index} and {later} are overlapping in the header")
    return tuple(
        KeySlot(sector * SECTOR, state == _ENABLED, iterations, salt)
        for state, iterations, salt, sector, _stripes in raw_slots
    )


def serialise_header(header: Header) -> bytes:
    """The 592 bytes of ``header``; ``parse_header`` undoes it."""
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        header.cipher_name.encode(),
        header.cipher_mode.encode(),
        header.hash_name.encode(),
        header.payload_offset // SECTOR,
        header.key_bytes,
        header.digest,
        header.digest_salt,
        header.digest_iterations,
        header.uuid,
    )
    slots = (
        _SLOT.pack(
            _ENABLED if slot.is_active else _DISABLED,
            slot.iterations,
            slot.salt,
            slot.offset // SECTOR,
            slot.stripes,
        )
        for slot in header.slots
    )
    return head + b"".join(slots)
