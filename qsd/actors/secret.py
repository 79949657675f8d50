"""The ``secret`` object: bytes other objects and drivers may ask for by id (passwords, keys).

A value comes from ``data`` or from ``file``, raw or as base64; with ``keyid`` it is AES-256-CBC ciphertext under
the key in another secret. The value is worked out once, when the object is made: later property changes do not
alter it.
"""

from __future__ import annotations

import binascii
import errno
import re
from collections.abc import Callable
from typing import Any

import attrs
import trio

from qsd.actors.qom import Property, QomObject, declare_type
from qsd.errors import QmpError, errno_text
from qsd.qapi.schema.objects import QCryptoSecretFormat

KEY_BYTES = 32
BLOCK_BYTES = 16
# A secret is a password or a key. The bound keeps a device file that never ends out of memory.
MAX_FILE_BYTES = 16 * 1024 * 1024

# What the C library's decoder and the reference's agree on: whole groups, padding at the end.
_PLAIN_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_ALPHABET = {
    ord(char): rank for rank, char in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
_PAD = ord("=")


@attrs.define(eq=False, slots=False, repr=False)
class Secret(QomObject):
    """A secret. ``value`` is the plain text; it never appears in a repr or a log."""

    typename = "secret"

    iv: str = ""
    keyid: str = ""
    format: QCryptoSecretFormat = QCryptoSecretFormat.RAW
    file: str = ""
    data: str = ""
    value: bytes = b""

    async def load(self, options: Any, lookup: Callable[[str], bytes]) -> None:
        """Work out the value from ``SecretProperties``; ``lookup`` finds the key by id. Raises QmpError."""
        raw = await _source(options)
        if options.keyid is not None:
            raw = _decrypted(raw, options, lookup)
        elif self.format is QCryptoSecretFormat.BASE64:
            raw = decode_base64(raw)
        self.value = raw

    @classmethod
    def from_options(cls, options: Any) -> Secret:
        """Make one with its properties set and no value yet; see ``load``."""
        return cls(
            iv=options.iv or "",
            keyid=options.keyid or "",
            format=options.format or QCryptoSecretFormat.RAW,
            file=options.file or "",
            data=options.data or "",
        )


async def _source(options: Any) -> bytes:
    if options.file is not None:
        if options.data is not None:
            raise QmpError("'file' and 'data' are mutually exclusive")
        return await _read(options.file)
    if options.data is None:
        raise QmpError("Either 'file' or 'data' must be provided")
    data: str = options.data
    return data.encode("utf-8", "surrogateescape")


async def _read(path: str) -> bytes:
    # In a thread that may be left behind: the file may be a pipe nobody writes to, and the daemon must still end.
    try:
        content = await trio.to_thread.run_sync(_read_bounded, path, abandon_on_cancel=True)
    except ValueError:  # a NUL in the name
        raise QmpError(f"Unable to read {path}: Failed to open file “{path}”: Invalid argument") from None
    except OSError as error:
        # The C library opens a directory and fails to read it; Python refuses to open it.
        did = "Error reading" if error.errno == errno.EISDIR else "Failed to open"
        raise QmpError(f"Unable to read {path}: {did} file “{path}”: {errno_text(error.errno or 0)}") from None
    if len(content) > MAX_FILE_BYTES:
        raise QmpError(f"Unable to read {path}: File “{path}” is too large")
    return content


def _read_bounded(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def decode_base64(text: bytes) -> bytes:
    """Decode as leniently as the reference: newlines are skipped, a torn last group is dropped, padding may stand
    anywhere. Raises QmpError for any other character."""
    if _PLAIN_BASE64.fullmatch(text):
        return binascii.a2b_base64(text)
    out = bytearray()
    group: list[int] = []
    for char in text:
        if char == 0x0A:
            continue
        if char != _PAD and char not in _ALPHABET:
            raise QmpError("Base64 data contains invalid characters")
        group.append(char)
        if len(group) == 4:
            out += _decode_group(group)
            group.clear()
    return bytes(out)


def _decode_group(group: list[int]) -> bytes:
    number = 0
    for char in group:
        number = number << 6 | _ALPHABET.get(char, 0)
    three = number.to_bytes(3, "big")
    return three[:1] + (b"" if group[2] == _PAD else three[1:2]) + (b"" if group[3] == _PAD else three[2:])


def _decrypted(raw: bytes, options: Any, lookup: Callable[[str], bytes]) -> bytes:
    key = lookup(options.keyid)
    if len(key) != KEY_BYTES:
        raise QmpError(f"Key should be {KEY_BYTES} bytes in length")
    if options.iv is None:
        raise QmpError("IV is required to decrypt secret")
    iv = decode_base64(options.iv.encode("utf-8", "surrogateescape"))
    if len(iv) != BLOCK_BYTES:
        raise QmpError(f"IV should be {BLOCK_BYTES} bytes in length not {len(iv)}")
    if options.format is QCryptoSecretFormat.BASE64:
        raw = decode_base64(raw)
    if len(raw) % BLOCK_BYTES:
        raise QmpError(f"Length {len(raw)} must be a multiple of block size {BLOCK_BYTES}")
    if not raw:
        return b""
    plain = _aes_cbc(key, iv, raw)
    # PKCS#7: the last byte says how many bytes were added.
    padding = plain[-1]
    if padding == 0 or padding > BLOCK_BYTES:
        raise QmpError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return plain[:-padding]


def _aes_cbc(key: bytes, iv: bytes, raw: bytes) -> bytes:
    try:
        # Imported here: few daemons decrypt secrets, and the library takes long to load.
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        raise QmpError("Decrypting a secret needs the extra qsd[crypto], which is not installed") from None
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    return decryptor.update(raw) + decryptor.finalize()


def _stored(name: str, kind: str, wanted: Any) -> Property:
    def read(item: Secret) -> Any:
        value = getattr(item, name)
        return value.value if isinstance(value, QCryptoSecretFormat) else value

    def write(item: Secret, value: Any) -> None:
        setattr(item, name, value)

    return Property(name, kind, read, wanted, write)


declare_type(
    "secret_common",
    "object",
    _stored("iv", "string", str),
    _stored("keyid", "string", str),
    _stored("format", "QCryptoSecretFormat", QCryptoSecretFormat),
    abstract=True,
)
declare_type(
    "secret",
    "secret_common",
    _stored("file", "string", str),
    _stored("data", "string", str),
    user_creatable=True,
)
