"""Key slots: what is sealed opens, what is not does not, and nothing takes longer than it may."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numpy")
pytest.importorskip("cryptography")

from qsd.drivers.luks import keys
from qsd.drivers.luks.algorithms import BY_NAME, CipherSpec, pbkdf2
from qsd.drivers.luks.header import Header, new_slots
from qsd.errors import QmpError

TOO_MUCH = r"PBKDF iterations \d+ larger than \d+"
HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3")


@pytest.mark.parametrize("name", HASHES)
@pytest.mark.parametrize("length", [16, 24, 64])
def test_split_key_is_merged(name: str, length: int) -> None:
    key = bytes(range(length))
    material = keys.split_key(key, name)
    assert len(material) == 4000 * length
    assert keys.merge_key(material, length, name) == key


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 4000 * 32 - 1), bit=st.integers(0, 7))
def test_one_wrong_bit_destroys_the_key(place: int, bit: int) -> None:
    key = bytes(range(32))
    material = bytearray(keys.split_key(key, "sha1"))
    material[place] ^= 1 << bit
    assert keys.merge_key(bytes(material), 32, "sha1") != key


@pytest.mark.parametrize("name", HASHES)
def test_pbkdf2_is_the_same_from_both_libraries(name: str) -> None:
    import hashlib

    assert pbkdf2(name, b"pw", b"salt", 10, 70) == hashlib.pbkdf2_hmac(name, b"pw", b"salt", 10, 70)


def sealed(
    algorithm: str, mode: str, generator: str, iv_hash: str | None
) -> tuple[Header, CipherSpec, bytes, bytes]:
    spec = CipherSpec(BY_NAME[algorithm], mode, generator, iv_hash)
    master = bytes(range(spec.key_bytes))
    digest_salt, digest = keys.master_digest("sha256", master, 1000)
    salt, material = keys.seal_slot("sha256", spec, master, b"secret", 1000)
    slots = new_slots(spec.key_bytes)
    header = Header(
        cipher_name=spec.algorithm.family,
        cipher_mode=spec.mode_text,
        hash_name="sha256",
        payload_offset=0,
        key_bytes=spec.key_bytes,
        digest=digest,
        digest_salt=digest_salt,
        digest_iterations=1000,
        uuid=b"",
        slots=(attrs.evolve(slots[0], is_active=True, iterations=1000, salt=salt), *slots[1:]),
    )
    return header, spec, master, material


@pytest.mark.parametrize(
    ("algorithm", "mode", "generator", "iv_hash"),
    [
        ("aes-256", "xts", "plain64", None),
        ("aes-192", "cbc", "plain64", None),  # its key material is no whole number of sectors
        ("aes-128", "cbc", "essiv", "sha256"),
        ("cast5-128", "ctr", "essiv", "md5"),
    ],
)
def test_sealed_slot_opens_with_its_password_only(
    algorithm: str, mode: str, generator: str, iv_hash: str | None
) -> None:
    header, spec, master, material = sealed(algorithm, mode, generator, iv_hash)
    slot = header.slots[0]
    assert len(material) == header.material_bytes
    assert keys.open_slot(header, spec, slot, material, b"secret") == master
    assert keys.open_slot(header, spec, slot, material, b"Secret") is None
    assert keys.open_slot(header, spec, slot, material, b"") is None
    assert keys.open_slot(header, spec, slot, bytes(len(material)), b"secret") is None


def test_work_an_image_can_ask_for_is_bounded() -> None:
    header, _spec, _master, _material = sealed("aes-256", "xts", "plain64", None)
    keys.check_work(header)
    slots = tuple(attrs.evolve(slot, is_active=True, iterations=30_000_000) for slot in header.slots)
    keys.check_work(attrs.evolve(header, slots=slots))  # eight slots of some seconds each
    greedy = attrs.evolve(header.slots[0], iterations=0xFFFFFFFF)
    with pytest.raises(QmpError, match=TOO_MUCH):
        keys.check_work(header.with_slot(0, greedy))
    with pytest.raises(QmpError, match=TOO_MUCH):
        keys.check_work(attrs.evolve(header, digest_iterations=0xFFFFFFFF))
    # What is not active is not tried.
    keys.check_work(header.with_slot(1, attrs.evolve(header.slots[1], iterations=0xFFFFFFFF)))


def test_iterations_follow_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 8_000_000)
    assert keys.count_iterations("sha256", 32, 2000) == 16_000_000
    assert keys.count_iterations("sha256", 20, 2000, keys.DIGEST_SHARE) == 2_000_000
    assert keys.count_iterations("sha256", 32, 0) == 1000
    assert keys.count_iterations("sha256", 20, 1, keys.DIGEST_SHARE) == 1000
    for wrong in (-1, 1 << 62):
        with pytest.raises(QmpError) as caught:
            keys.count_iterations("sha256", 32, wrong)
        assert caught.value.desc == "PBKDF iterations 8000000 too large to scale: Numerical result out of range"
    with pytest.raises(QmpError) as caught:
        keys.count_iterations("sha256", 32, 1_000_000)
    assert caught.value.desc == "PBKDF iterations 8000000000 larger than 4294967295: Numerical result out of range"


def test_speed_is_measured() -> None:
    assert keys.count_iterations("sha256", 32, 1000) > 10_000
