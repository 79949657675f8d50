"""The names of ciphers, modes, IV generators and hashes: QAPI's, those in headers, and what the libraries have.

Pure. ``cryptography`` is an extra of the package and is imported when the first volume is opened; what it lacks
(serpent, twofish, single des) is refused by name, in the reference's words.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from typing import Any, Final

import attrs

from qsd.drivers.luks.header import Header
from qsd.errors import QmpError

# Raw block encryption: (data, target of at least 15 bytes more) -> bytes written.
Transform = Callable[[Any, Any], int]

MODES: Final = ("ecb", "cbc", "xts", "ctr")
IV_GENERATORS: Final = ("plain", "plain64", "essiv")


@attrs.frozen
class Algorithm:
    """A block cipher with one key length. ``name``: QAPI's; ``family``: the name in headers; lengths in bytes.

    ``library_name``: the class in ``cryptography``, None where it has none; ``is_old``: it stands in its attic;
    ``title``: how the reference calls the family when it lacks the key length that essiv wants.
    """

    name: str
    family: str
    key_bytes: int
    block_bytes: int = 16
    library_name: str | None = None
    is_old: bool = False
    title: str | None = None


_ALGORITHMS: Final = (
    *(Algorithm(f"aes-{8 * n}", "aes", n, library_name="AES", title="AES") for n in (16, 24, 32)),
    Algorithm("des", "des", 8, 8),
    Algorithm("3des", "3des", 24, 8),
    Algorithm("cast5-128", "cast5", 16, 8, "CAST5", is_old=True),
    *(Algorithm(f"serpent-{8 * n}", "serpent", n, title="Serpent") for n in (16, 24, 32)),
    *(Algorithm(f"twofish-{8 * n}", "twofish", n, title="Twofish") for n in (16, 24, 32)),
    Algorithm("sm4", "sm4", 16, library_name="SM4"),
)
BY_NAME: Final = {algorithm.name: algorithm for algorithm in _ALGORITHMS}
# What the reference reads in headers: it has no name for des there.
_IN_HEADERS: Final = {
    (algorithm.family, algorithm.key_bytes): algorithm
    for algorithm in _ALGORITHMS
    if algorithm.family not in ("des", "3des")
}
# Hashes: digest bytes, and the class in ``cryptography`` (None: only hashlib has it).
_HASHES: Final = {
    "md5": (16, "MD5"),
    "sha1": (20, "SHA1"),
    "sha224": (28, "SHA224"),
    "sha256": (32, "SHA256"),
    "sha384": (48, "SHA384"),
    "sha512": (64, "SHA512"),
    "ripemd160": (20, None),
    "sm3": (32, "SM3"),
}


@attrs.frozen
class CipherSpec:
    """How sectors are encrypted. ``iv_hash``: essiv's, or a name in the header that means nothing."""

    algorithm: Algorithm
    mode: str
    iv_generator: str
    iv_hash: str | None = None

    @property
    def key_bytes(self) -> int:
        """Bytes of the whole key: XTS takes two."""
        return self.algorithm.key_bytes * (2 if self.mode == "xts" else 1)

    @property
    def mode_text(self) -> str:
        """The header's cipher mode: ``xts-plain64``, ``cbc-essiv:sha256``."""
        return f"{self.mode}-{self.iv_generator}" + (f":{self.iv_hash}" if self.iv_hash else "")

    def essiv_algorithm(self) -> Algorithm:
        """The cipher that makes essiv's IVs: its key is a digest of the volume's. Raises QmpError."""
        assert self.iv_hash is not None
        wanted = digest_size(self.iv_hash)
        own = self.algorithm
        found = _IN_HEADERS.get((own.family, wanted))
        if found is not None:
            return found
        if own.title is not None:
            raise QmpError(f"No {own.title} cipher with key size {wanted} available")
        raise QmpError(f"Cipher {own.name} not supported with essiv")


def digest_size(name: str) -> int:
    """Bytes of a digest."""
    return _HASHES[name][0]


def check_hash(name: str) -> None:
    """Raise QmpError when there is no hash of this name, or Python's OpenSSL has none."""
    if name not in _HASHES or name not in hashlib.algorithms_available:
        raise QmpError(f"Hash algorithm '{name}' not supported")


def parse_cipher(header: Header) -> CipherSpec:
    """What the header's names mean. Raises QmpError, in the reference's order and words."""
    mode, dash, generator = header.cipher_mode.partition("-")
    if not dash:
        raise QmpError(f"Unexpected cipher mode string format '{header.cipher_mode}'")
    generator, colon, iv_hash = generator.partition(":")
    if colon:
        check_hash(iv_hash)
    if mode not in MODES:
        raise QmpError(f"Cipher mode '{mode}' not supported")
    key_bytes = header.key_bytes // (2 if mode == "xts" else 1)
    algorithm = _IN_HEADERS.get((header.cipher_name, key_bytes))
    if algorithm is None:
        raise QmpError(f"Algorithm '{header.cipher_name}' with key size {key_bytes} bytes not supported")
    check_hash(header.hash_name)
    if generator not in IV_GENERATORS:
        raise QmpError(f"IV generator '{generator}' not supported")
    if generator == "essiv" and not colon:
        raise QmpError("Missing IV generator hash specification")
    if mode == "xts" and header.key_bytes % 2:
        raise QmpError("XTS cipher key length should be a multiple of 2")
    spec = CipherSpec(algorithm, mode, generator, iv_hash if colon else None)
    check_spec(spec)
    return spec


def check_spec(spec: CipherSpec) -> None:
    """Raise QmpError when the parts do not go together, or the libraries lack one."""
    if spec.algorithm.library_name is None:
        raise QmpError(f"Algorithm '{spec.algorithm.name}' not supported")
    if spec.iv_generator == "essiv":
        spec.essiv_algorithm()
    if spec.mode == "xts" and spec.algorithm.block_bytes != 16:
        raise QmpError("Unsupported cipher mode xts")


_LIBRARY: Final = ("cryptography.hazmat.primitives.ciphers", "numpy")


def is_library_loaded() -> bool:
    """Whether ``load_library`` has nothing to do any more."""
    return all(name in sys.modules for name in _LIBRARY)


def load_library() -> None:
    """Import what encryption needs (takes 100 ms and more, once). Raises QmpError when the extra is missing."""
    try:
        for name in _LIBRARY:
            importlib.import_module(name)
    except ImportError:
        raise QmpError("Encryption needs the extra qsd[crypto], which is not installed") from None


def block_transform(algorithm: Algorithm, key: bytes, *, encrypting: bool) -> Transform:
    """Many blocks at once, each by itself (ECB), as one call that lets other threads run.

    The target has 15 bytes more than the data. A transform is for one thread at a time. Raises QmpError.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.decrepit.ciphers import algorithms as old
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    assert algorithm.library_name is not None
    made = getattr(old if algorithm.is_old else algorithms, algorithm.library_name)(key)
    try:
        cipher = Cipher(made, modes.ECB())
        context = cipher.encryptor() if encrypting else cipher.decryptor()
    except UnsupportedAlgorithm:
        # OpenSSL built without it.
        raise QmpError(f"Algorithm '{algorithm.name}' not supported") from None
    return context.update_into


def pbkdf2(hash_name: str, password: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """PBKDF2 (RFC 8018) with HMAC. Takes as long as its count says; other threads run meanwhile.

    Through ``cryptography``, whose OpenSSL may be newer than Python's: 8.5 million rounds of sha256 a second,
    3.9 million through hashlib's 3.0.
    """
    library_name = _HASHES[hash_name][1]
    if library_name is None:
        return hashlib.pbkdf2_hmac(hash_name, password, salt, iterations, length)
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

    return PBKDF2HMAC(getattr(hashes, library_name)(), length, salt, iterations).derive(password)
