"""Key slots: what a password opens, and what it is sealed with.

Pure, but slow by design (PBKDF2): callers run these functions on a thread. A slot holds the volume's master key,
blown up to 4000 times its size so that a few unreadable bytes destroy it (anti-forensic split), encrypted like the
data with a key derived from the password. Follows the LUKS1 specification 1.2.3, sections 2.4 (AFsplit) and 4.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Final

from qsd.drivers.luks.algorithms import CipherSpec, digest_size, pbkdf2
from qsd.drivers.luks.header import (
    DIGEST_BYTES,
    MAX_ITERATIONS,
    MIN_ITERATIONS,
    SALT_BYTES,
    STRIPES,
    Header,
    KeySlot,
    material_bytes,
)
from qsd.drivers.luks.sectors import SectorCipher
from qsd.errors import QmpError

# Rounds of PBKDF2 that opening a volume may take at most, all its active slots and blocks of keys together: about
# two minutes of sha256 with AES-256-XTS. An image can ask for 2**32 rounds in each of eight slots, which would keep
# a thread busy for hours; the reference does that, on its main loop.
MAX_WORK: Final = 1 << 30
# The master key's digest takes an eighth of the time, as in the reference.
DIGEST_SHARE: Final = 8
# The speed of PBKDF2 is measured with a run of at least this long.
_BENCHMARK_SECONDS: Final = 0.05
_UINT64: Final = 1 << 64


# -- the anti-forensic splitter ---------------------------------------------------------------------------------


def _diffuse(block: bytes, hash_name: str, size: int) -> bytes:
    # Each piece of a digest's size is hashed with its number in front.
    make = hashlib.new(hash_name).copy
    pieces = []
    for index in range(-(-len(block) // size)):
        piece = make()
        piece.update(index.to_bytes(4, "big") + block[index * size : (index + 1) * size])
        pieces.append(piece.digest())
    return b"".join(pieces)[: len(block)]


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")


def split_key(key: bytes, hash_name: str) -> bytes:
    """Blow ``key`` up to ``STRIPES`` times its length. All of it is needed to get the key back."""
    size, length = digest_size(hash_name), len(key)
    noise = secrets.token_bytes(length * (STRIPES - 1))
    return noise + _xor(_condense(noise, length, hash_name, size), key)


def merge_key(material: bytes, length: int, hash_name: str) -> bytes:
    """The key of ``length`` bytes that ``split_key`` was given."""
    last = length * (STRIPES - 1)
    condensed = _condense(material[:last], length, hash_name, digest_size(hash_name))
    return _xor(condensed, material[last : last + length])


def _condense(noise: bytes, length: int, hash_name: str, size: int) -> bytes:
    condensed = bytes(length)
    for start in range(0, len(noise), length):
        condensed = _diffuse(_xor(condensed, noise[start : start + length]), hash_name, size)
    return condensed


# -- slots ------------------------------------------------------------------------------------------------------


def check_work(header: Header) -> None:
    """Raise QmpError when trying the slots would take unreasonably long."""
    rounds = sum(header.slots[index].iterations for index in header.active_slots)
    work = rounds * _blocks(header, header.key_bytes)
    work += len(header.active_slots) * header.digest_iterations * _blocks(header, DIGEST_BYTES)
    if work > MAX_WORK:
        raise QmpError(f"PBKDF iterations {work} larger than {MAX_WORK}: Numerical result out of range")


def _blocks(header: Header, length: int) -> int:
    return -(-length // digest_size(header.hash_name))


def open_slot(header: Header, spec: CipherSpec, slot: KeySlot, material: bytes, password: bytes) -> bytes | None:
    """The master key, or None when this slot is not opened by the password."""
    key = pbkdf2(header.hash_name, password, slot.salt, slot.iterations, header.key_bytes)
    plain = bytearray(material)
    view = memoryview(plain)
    SectorCipher(spec, key).decrypt([(0, view, view)])
    master = merge_key(bytes(plain), header.key_bytes, header.hash_name)
    digest = pbkdf2(header.hash_name, master, header.digest_salt, header.digest_iterations, DIGEST_BYTES)
    return master if hmac.compare_digest(digest, header.digest) else None


def seal_slot(
    hash_name: str, spec: CipherSpec, master: bytes, password: bytes, iterations: int
) -> tuple[bytes, bytes]:
    """Salt and key material of a slot that ``password`` opens."""
    salt = secrets.token_bytes(SALT_BYTES)
    key = pbkdf2(hash_name, password, salt, iterations, len(master))
    plain = bytearray(split_key(master, hash_name).ljust(material_bytes(len(master)), b"\0"))
    view = memoryview(plain)
    SectorCipher(spec, key).encrypt([(0, view, view)])
    return salt, bytes(plain)


def master_digest(hash_name: str, master: bytes, iterations: int) -> tuple[bytes, bytes]:
    """Salt and digest that tell the right master key."""
    salt = secrets.token_bytes(SALT_BYTES)
    return salt, pbkdf2(hash_name, master, salt, iterations, DIGEST_BYTES)


def count_iterations(hash_name: str, length: int, milliseconds: int, share: int = 1) -> int:
    """How many rounds for a key of ``length`` bytes take ``milliseconds`` of a thread here, divided by ``share``.

    At least ``MIN_ITERATIONS``. A negative time is taken for the huge unsigned number it would be in C. Raises
    QmpError when the result does not fit the header.
    """
    speed = _measure(hash_name, length)
    wanted = milliseconds % _UINT64
    if speed * wanted >= _UINT64:
        raise QmpError(f"PBKDF iterations {speed} too large to scale: Numerical result out of range")
    iterations = speed * wanted // 1000 // share
    if iterations > MAX_ITERATIONS:
        raise QmpError(f"PBKDF iterations {iterations} larger than {MAX_ITERATIONS}: Numerical result out of range")
    return max(iterations, MIN_ITERATIONS)


def _measure(hash_name: str, length: int) -> int:
    """Rounds a second, in this thread's own time: other load does not make passwords weaker."""
    rounds = 1 << 14
    while True:
        before = time.thread_time()
        pbkdf2(hash_name, b"password", bytes(SALT_BYTES), rounds, length)
        took = time.thread_time() - before
        if took >= _BENCHMARK_SECONDS:
            return int(rounds / took)
        rounds *= 2
