"""Secrets: where the value comes from, how it is decoded and decrypted, and what is refused."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsd.actors.objects import Objects
from qsd.actors.secret import MAX_FILE_BYTES, decode_base64
from qsd.errors import QmpError
from qsd.qapi.schema.objects import ObjectOptions, ObjectType, QCryptoSecretFormat, SecretProperties

KEY = b"k" * 32
IV = b"i" * 16


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def secret(name: str, **members: object) -> ObjectOptions:
    if "format" in members:
        members["format"] = QCryptoSecretFormat(members["format"])
    return SecretProperties(qom_type=ObjectType.SECRET, id=name, **members)


async def value_of(**members: object) -> bytes:
    objects = Objects()
    await objects.add(secret("key", data=b64(KEY), format="base64"))
    await objects.add(secret("short", data="short"))
    await objects.add(secret("s", **members))
    return objects.secrets.get("s")


async def refusal(**members: object) -> str:
    with pytest.raises(QmpError) as caught:
        await value_of(**members)
    return caught.value.desc


def encrypted(plain: bytes, *, padding: int | None = None) -> str:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    count = 16 - len(plain) % 16
    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return b64(
        encryptor.update(plain + bytes([count if padding is None else padding]) * count) + encryptor.finalize()
    )


@pytest.mark.parametrize(
    ("members", "value"),
    [
        ({"data": "abc"}, b"abc"),
        ({"data": ""}, b""),
        ({"data": "é"}, "é".encode()),
        ({"data": "YWJj", "format": "base64"}, b"abc"),
        ({"data": "", "format": "base64"}, b""),
        ({"data": "abc", "iv": "!!"}, b"abc"),
    ],
)
async def test_value_from_data(members: dict[str, str], value: bytes) -> None:
    assert await value_of(**members) == value


@pytest.mark.parametrize(
    ("members", "desc"),
    [
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "a", "file": ""}, "'file' and 'data' are mutually exclusive"),
        ({"data": "!!!", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": " YW Jj", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "x", "keyid": "nope", "iv": "!!"}, "No secret with id 'nope'"),
        ({"data": "x", "keyid": "short", "iv": b64(IV)}, "Key should be 32 bytes in length"),
        ({"data": "x", "keyid": "key"}, "IV is required to decrypt secret"),
        ({"data": "x", "keyid": "key", "iv": "!!"}, "Base64 data contains invalid characters"),
        ({"data": "x", "keyid": "key", "iv": b64(IV[:8])}, "IV should be 16 bytes in length not 8"),
        ({"data": "x", "keyid": "key", "iv": b64(IV)}, "Length 1 must be a multiple of block size 16"),
        (
            {"data": "/nonexistent", "file": "/nonexistent"},
            "'file' and 'data' are mutually exclusive",
        ),
        (
            {"file": "/nonexistent", "keyid": "nope"},
            "Unable to read /nonexistent: Failed to open file “/nonexistent”: No such file or directory",
        ),
        ({"file": "/"}, "Unable to read /: Error reading file “/”: Is a directory"),
        ({"file": "a\0b"}, "Unable to read a\0b: Failed to open file “a\0b”: Invalid argument"),
    ],
)
async def test_refused_with_the_reference_text(members: dict[str, str], desc: str) -> None:
    assert await refusal(**members) == desc


async def test_file_keeps_its_trailing_newline(tmp_path: Path) -> None:
    (tmp_path / "pw").write_bytes(b"letmein\n")
    assert await value_of(file=str(tmp_path / "pw")) == b"letmein\n"


async def test_file_base64_ignores_newlines(tmp_path: Path) -> None:
    (tmp_path / "pw").write_bytes(b"YWJj\nZGVm\n")
    assert await value_of(file=str(tmp_path / "pw"), format="base64") == b"abcdef"


async def test_file_that_never_ends_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        os.truncate(file.fileno(), MAX_FILE_BYTES + 1)
    assert "is too large" in await refusal(file=str(path))


@pytest.mark.parametrize("plain", [b"", b"secret!", b"x" * 16, bytes(range(31))])
async def test_decrypted_with_the_key_of_another_secret(plain: bytes) -> None:
    assert await value_of(data=encrypted(plain), format="base64", keyid="key", iv=b64(IV)) == plain


async def test_decrypting_finds_bad_padding() -> None:
    text = await refusal(data=encrypted(b"abc", padding=202), format="base64", keyid="key", iv=b64(IV))
    assert text == "Incorrect number of padding bytes (202) found on decrypted data"


async def test_decrypting_nothing_gives_nothing() -> None:
    assert await value_of(data="", format="base64", keyid="key", iv=b64(IV)) == b""


async def test_decrypting_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    text = await refusal(data=b64(b"x" * 16), format="base64", keyid="key", iv=b64(IV))
    assert "qsd[crypto]" in text


async def test_refused_secret_leaves_its_id_free() -> None:
    objects = Objects()
    with pytest.raises(QmpError):
        await objects.add(secret("s"))
    await objects.add(secret("s", data="now"))
    assert objects.secrets.get("s") == b"now"


async def test_repr_does_not_tell_the_value() -> None:
    objects = Objects()
    await objects.add(secret("s", data="hunter2"))
    assert "hunter2" not in repr(objects.user["s"])


def test_lookup_of_another_kind_of_object() -> None:
    objects = Objects()
    with pytest.raises(QmpError, match="No secret with id 'zz'"):
        objects.secrets.get("zz")


@given(st.binary(max_size=64))
def test_base64_round_trip(raw: bytes) -> None:
    assert decode_base64(base64.b64encode(raw)) == raw


@pytest.mark.parametrize(
    ("text", "raw"),
    [(b"YWJ", b""), (b"=", b""), (b"YWJj=", b"abc"), (b"YQ==YQ==", b"aa"), (b"YQ==\n", b"a"), (b"YWI=", b"ab")],
)
def test_base64_is_as_lenient_as_the_reference(text: bytes, raw: bytes) -> None:
    assert decode_base64(text) == raw


@given(st.binary(max_size=64))
def test_base64_refuses_only_other_characters(text: bytes) -> None:
    strange = [char for char in text if not (bytes([char]).isalnum() or char in b"+/=\n")]
    if strange:
        with pytest.raises(QmpError, match="Base64 data contains invalid characters"):
            decode_base64(text)
    else:
        assert len(decode_base64(text)) <= len(text)
