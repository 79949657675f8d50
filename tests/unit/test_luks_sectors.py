"""Sectors by the thousand against the library's own modes, one sector at a time."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numpy")
pytest.importorskip("cryptography")

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qsd.drivers.luks.algorithms import BY_NAME, MODES, CipherSpec, check_spec
from qsd.drivers.luks.sectors import CHUNK, SectorCipher, legacy_aes_cipher
from qsd.errors import QmpError

_LIBRARY: dict[str, Any] = {"aes": algorithms.AES, "sm4": algorithms.SM4, "cast5": CAST5}
IVS = (("plain", None), ("plain64", None), ("essiv", "sha256"), ("essiv", "md5"))


def specs() -> list[CipherSpec]:
    found = []
    for name in ("aes-128", "aes-192", "aes-256", "cast5-128", "sm4"):
        for mode in MODES:
            for generator, iv_hash in IVS:
                spec = CipherSpec(BY_NAME[name], mode, generator, iv_hash)
                try:
                    check_spec(spec)
                except QmpError:
                    continue
                found.append(spec)
    return found


def one_sector(spec: CipherSpec, key: bytes, number: int, data: bytes) -> bytes | None:
    """What the library's own mode makes of a sector; None when it has no such mode."""
    library = _LIBRARY[spec.algorithm.family]
    if spec.iv_generator == "plain":
        number &= 0xFFFFFFFF
    iv = number.to_bytes(8, "little").ljust(spec.algorithm.block_bytes, b"\0")
    if spec.iv_hash is not None:
        salt = hashlib.new(spec.iv_hash, key).digest()
        iv = Cipher(_LIBRARY[spec.essiv_algorithm().family](salt), modes.ECB()).encryptor().update(iv)
    kinds: dict[str, Any] = {"ecb": lambda _iv: modes.ECB(), "cbc": modes.CBC, "ctr": modes.CTR, "xts": modes.XTS}
    try:
        return bytes(Cipher(library(key), kinds[spec.mode](iv)).encryptor().update(data))
    except (ValueError, UnsupportedAlgorithm):
        assert spec.algorithm.name != "aes-256", "that it has"
        return None


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: f"{spec.algorithm.name}-{spec.mode_text}")
def test_sectors_are_what_the_library_makes_of_each(spec: CipherSpec) -> None:
    rng = random.Random(1)
    key = rng.randbytes(spec.key_bytes)
    cipher = SectorCipher(spec, key)
    for first in (0, (1 << 32) - 3, (1 << 40) + 5):
        lengths = (1, 3, CHUNK + 88, 1, CHUNK + 1)
        plain = [memoryview(rng.randbytes(512 * count)) for count in lengths]
        made = [memoryview(bytearray(512 * count)) for count in lengths]
        starts = [first + 1000 * index for index in range(len(lengths))]
        cipher.encrypt(list(zip(starts, plain, made, strict=True)))
        for start, before, after, count in zip(starts, plain, made, lengths, strict=True):
            for index in {0, count // 2, count - 1}:
                place = slice(512 * index, 512 * index + 512)
                expected = one_sector(spec, key, start + index, bytes(before[place]))
                assert expected is None or expected == after[place]
        cipher.decrypt([(start, view, view) for start, view in zip(starts, made, strict=True)])
        assert made == plain


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 40)), min_size=1, max_size=12),
    skip=st.integers(0, 15),
    name=st.sampled_from(["xts", "cbc", "ctr"]),
)
def test_runs_of_any_shape_are_their_sectors(runs: list[tuple[int, int]], skip: int, name: str) -> None:
    """Gathered into chunks, wherever the buffers lie, in place or not."""
    spec = CipherSpec(BY_NAME["aes-256"], name, "plain64")
    cipher = SectorCipher(spec, bytes(range(spec.key_bytes)))
    rng = random.Random(2)
    work, expected = [], []
    for first, count in runs:
        memory = bytearray(512 * count + skip)
        view = memoryview(memory)[skip:]
        view[:] = rng.randbytes(512 * count)
        for index in range(count):
            single = bytearray(view[512 * index : 512 * index + 512])
            cipher.encrypt([(first + index, memoryview(single), memoryview(single))])
            expected.append(bytes(single))
        work.append((first, view, view))
    cipher.encrypt(work)
    assert b"".join(bytes(view) for _first, view, _target in work) == b"".join(expected)


def test_source_is_left_alone() -> None:
    spec = CipherSpec(BY_NAME["aes-256"], "xts", "plain64")
    source = b"s" * 1024
    target = bytearray(1024)
    cipher = SectorCipher(spec, bytes(range(64)))
    cipher.encrypt([(7, memoryview(source), memoryview(target))])
    assert source == b"s" * 1024
    assert target != source


def test_xts_known_answer() -> None:
    """IEEE 1619-2007, vector 10 (AES-256, data unit 0xff)."""
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    data = bytearray(bytes(range(256)) * 2)
    SectorCipher(CipherSpec(BY_NAME["aes-256"], "xts", "plain64"), key).encrypt(
        [(0xFF, memoryview(data), memoryview(data))]
    )
    assert data[:32].hex() == "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"


def test_legacy_aes_pads_and_cuts_the_password() -> None:
    for password, key in ((b"pw", b"pw" + bytes(14)), (b"0123456789abcdefXYZ", b"0123456789abcdef")):
        data = bytearray(512)
        legacy_aes_cipher(password).encrypt([(3, memoryview(data), memoryview(data))])
        iv = (3).to_bytes(16, "little")
        assert data == Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor().update(bytes(512))
